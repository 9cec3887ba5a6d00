"""The cached forward pass: each token goes through the model once.

gpt2.generate sends the whole sequence through the model for each new token, though nothing changes for the earlier
ones: no token sees a later one. All that a new token needs of them are their keys and values, so these are kept:

    cache    for each layer a pair: keys, [n_head, d_head, n_cache], and values, [n_head, n_cache, d_head], each as the
             products of `attention` run along memory

Reading the prompt at once (prefill), in pieces, or token by token (decode) is the same call, and gives the same logits:

    logits, cache = forward(params, tokens, cache, position)

A pure function: what it remembers is what it is given and gives back.

Cost: n tokens take n forward passes of one token, and not of 1 + 2 + ... + n (Pope et al. 2022, "Efficiently Scaling
Transformer Inference", section 2).
"""

import functools
from typing import Any, NamedTuple

import numpy

import backends
import gpt2
from backends import keeps_dtype, np, numpy_threads, update
from checkpoint import map_params, replace_params
from gpt2 import attention, check_inputs, embed, ffn, layer_norm, linear, merge_heads, split_heads, unembed


class Model(NamedTuple):
    """What the rest of inference knows of a model: two functions, its params, and what it can take."""

    params: Any
    forward: Any  # (params, tokens, cache, position, last) -> (logits of tokens[last], cache), cache donated
    new_cache: Any  # (params, n_cache) -> an empty cache
    n_vocab: int
    n_ctx: int
    backend: Any


def new_cache(params, n_cache, *, n_head):
    """An empty cache for n_cache positions."""
    wpe = params["wpe"]
    d_head, zeros = wpe.shape[-1] // n_head, backends.namespace_of([wpe]).zeros
    shapes = (n_head, d_head, n_cache), (n_head, n_cache, d_head)
    return [tuple(zeros(shape, wpe.dtype) for shape in shapes) for _ in params["blocks"]]


def map_cache(f, cache):
    """The same cache with f(array) for each array."""
    return [tuple(f(array) for array in layer) for layer in cache]


@keeps_dtype
def causal_attention(q, k, v, mask):
    """gpt2.attention under a mask that lets the last query look at all keys, each one before at one key less at least.
    Many queries are served in four parts, and no part computes scores for keys that none of it may look at: of a square
    mask that saves 3/8, and the parts fit into a processor's cache."""
    n_seq, n_key = mask.shape
    if isinstance(mask, numpy.ndarray) and mask.all():  # known, and hiding nothing: one token after others
        return gpt2.softmax(gpt2.attention_scores(q, k)) @ v  # [n_head, 1, d_head] -> [n_head, 1, d_head]
    n_part = max(64, -(-n_seq // 4))
    if n_seq <= n_part:
        return attention(q, k, v, mask)
    parts = []
    for start in range(0, n_seq, n_part):
        end = min(start + n_part, n_seq)
        seen = n_key - n_seq + end
        parts.append(attention(q[:, start:end], k[:, :seen], v[:, :seen], mask[start:end, :seen]))
    return np.concatenate(parts, axis=1)


def mha(x, c_attn, c_proj, n_head, cache, position, mask):
    """gpt2.mha for the tokens from `position` on: the keys and values of those before come from a layer's cache.
    Returns (x, the cache with those of x)."""
    heads = split_heads(linear(x, **c_attn), 3 * n_head)  # [n_seq, n_embd] -> [3*n_head, n_seq, d_head]
    q, k, v = heads.reshape(3, n_head, *heads.shape[1:])  # [3*n_head, n_seq, d_head] -> 3 of [n_head, n_seq, d_head]
    keys, values = cache = update(cache[0], k.mT, (0, 0, position)), update(cache[1], v, (0, position, 0))
    n_key = mask.shape[-1]
    k, v = keys.mT[:, :n_key], values[:, :n_key]  # [n_head, n_cache, d_head] -> [n_head, n_key, d_head]
    x = merge_heads(causal_attention(q, k, v, mask))  # [n_head, n_seq, d_head] -> [n_seq, n_embd]
    return linear(x, **c_proj), cache


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, cache, position, mask):
    """gpt2.transformer_block, likewise."""
    new, cache = mha(layer_norm(x, **ln_1), **attn, n_head=n_head, cache=cache, position=position, mask=mask)
    x = x + new
    return x + ffn(layer_norm(x, **ln_2), **mlp), cache


def forward(params, tokens, cache, position, last=None, *, n_head, jit=lambda f: f):
    """(logits, cache) after `tokens`, [n_seq] ids that stand at position, position + 1, ...

    logits are [n_seq, n_vocab], or [n_vocab] for tokens[last] alone: the others cost as much and nobody asks for them.
    The cache must have room up to position + n_seq. Under jit the position may be traced, one program for all.
    """
    positions, filled = position + np.arange(len(tokens)), []
    x = embed(tokens, params["wte"], params["wpe"][positions])  # [n_seq] -> [n_seq, n_embd]
    # A position that is a number says how much of the cache is filled. A traced one does not: the mask hides the rest.
    n_key = position + len(tokens) if isinstance(position, (int, numpy.integer)) else cache[0][0].shape[-1]
    mask = np.arange(n_key) <= positions[:, None]  # -> [n_seq, n_key]
    block_step = jit(functools.partial(transformer_block, n_head=n_head))  # JAX traces one block, for all are alike
    for block, layer in zip(params["blocks"], cache, strict=True):
        x, layer = block_step(x, **block, cache=layer, position=position, mask=mask)
        filled.append(layer)
    x = x if last is None else x[last]  # [n_seq, n_embd] -> [n_embd]
    return unembed(layer_norm(x, **params["ln_f"]), params["wte"]), filled  # [..., n_embd] -> [..., n_vocab]


@functools.lru_cache
def compiled(n_head, backend):
    """`forward` for a backend by its name, compiled once in a process for all calls of the same shapes."""
    jit = backends.get(backend).jit
    step = jit(functools.partial(forward, n_head=n_head, jit=jit), donate_argnums=(2,))
    return numpy_threads.adaptive(step) if backend == "numpy" else step


def load(params, n_head, backend="numpy"):
    """params -> the Model. They stay as they are, and are not to be changed in place, for the Model may share them. On
    a CPU, JAX's has all matrices a second time, NumPy's in time those of mlp.c_proj."""
    return take(map_params(lambda _, array: array, params), n_head, backend)


def take(params, n_head, backend="numpy"):
    """load, but the nest `params` becomes the Model's: its arrays give way one by one to those of the backend, so that
    a model is never in memory twice, unless somebody else holds them."""
    library = backends.get(backend)
    n_vocab, n_ctx = len(params["wte"]), len(params["wpe"])
    forms = {"w": library.matrix, "wte": library.table}
    params = replace_params(lambda path, array: forms.get(path[-1], library.asarray)(array), params)
    empty = functools.partial(new_cache, n_head=n_head)
    return Model(params, compiled(n_head, backend), empty, n_vocab, n_ctx, library)


def start(model, n_tokens):
    """An empty cache for at least n_tokens."""
    return model.new_cache(model.params, min(model.n_ctx, model.backend.n_cache(n_tokens)))


def read(model, tokens, cache, position):
    """(logits after the last of the list `tokens`, cache): on JAX padded to one of few lengths, each compiled once.

    What the padding leaves in the cache lies behind every query, and the tokens to come overwrite it.
    """
    n_padded = min(model.backend.n_padded(len(tokens)), cache[0][0].shape[-1] - position)
    padded = numpy.zeros(n_padded, numpy.int32)
    padded[: len(tokens)] = tokens
    return model.forward(model.params, padded, cache, position, len(tokens) - 1)


def generate(inputs, params, n_head, n_tokens_to_generate, backend="numpy"):
    """gpt2.generate, the same ids, faster."""
    check_inputs(inputs, n_tokens_to_generate, n_vocab=len(params["wte"]), n_ctx=len(params["wpe"]))
    return list(greedy(load(params, n_head, backend), inputs, n_tokens_to_generate))


def greedy(model, inputs, n_tokens_to_generate):
    """Yields the likeliest ids to follow the list `inputs`, each as soon as it is known."""
    cache = start(model, len(inputs) + n_tokens_to_generate)
    tokens, position = inputs, 0
    for _ in range(n_tokens_to_generate):
        logits, cache = read(model, tokens, cache, position)
        tokens, position = [int(np.argmax(model.backend.to_numpy(logits)))], position + len(tokens)
        yield tokens[0]
