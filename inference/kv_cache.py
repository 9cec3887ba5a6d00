"""The forward pass of GPT-2 with a key-value cache: each token goes through the model once.

gpt2.generate sends the whole sequence through the model for each new token. Nothing changes for the earlier tokens: the
causal mask hides later tokens from them. A new token needs only their keys and values, in each layer, to attend to. So
these are kept, in a cache:

    for each layer a pair: keys [n_head, d_head, n_cache] and values [n_head, n_cache, d_head]

Keys are stored transposed: the product q @ k.mT reads them along its rows, which lie contiguous in memory.

A step is a pure function, the cache goes in and comes out:

    logits, cache = forward(params, tokens, cache, position, n_head=...)

The same call computes a prompt at once (prefill), in chunks, or one token at a time (decode), with the same logits.

Cost: n rows go through the model instead of 1 + 2 + ... + n (Pope et al. 2022, "Efficiently Scaling
Transformer Inference", section 2). What is new in this file is marked by the three arguments cache, position and mask.
"""

import functools

import numpy

import backends
import utils
from backends import namespace_of, np, update
from gpt2 import attention, check_inputs, embed, ffn, layer_norm, linear, merge_heads, split_heads, unembed
from inference.model import Model, greedy
from training import lora
from weights.params import cast, tree_map


def init_cache(params, n_cache, *, n_head):
    """An empty cache for n_cache positions, of the params' dtype and library."""
    wpe = params["wpe"]
    d_head, zeros = wpe.shape[-1] // n_head, namespace_of([wpe]).zeros
    shapes = (n_head, d_head, n_cache), (n_head, n_cache, d_head)
    return [tuple(zeros(shape, wpe.dtype) for shape in shapes) for _ in params["blocks"]]


def causal_attention(q, k, v, mask):
    """gpt2.attention for a causal mask, in four chunks of queries. A chunk skips the keys that none of its queries may
    see: for a square mask that saves 3/8 of the work, and the scores of a chunk fit into a processor's cache."""
    n_seq, n_key = mask.shape
    n_chunk = max(64, -(-n_seq // 4))
    if n_seq <= n_chunk:
        return attention(q, k, v, mask)
    chunks = []
    for start in range(0, n_seq, n_chunk):
        end = min(start + n_chunk, n_seq)
        n_seen = n_key - n_seq + end  # the last query of the chunk sees so many keys
        chunks.append(attention(q[:, start:end], k[:, :n_seen], v[:, :n_seen], mask[start:end, :n_seen]))
    return np.concatenate(chunks, axis=1)


def mha(x, c_attn, c_proj, n_head, cache, position, mask):
    """gpt2.mha for tokens that stand from `position` on. Their keys and values are written into the layer's cache, and
    the queries attend to all that it holds. Returns (x, cache)."""
    heads = split_heads(linear(x, **c_attn), 3 * n_head)  # [n_seq, n_embd] -> [3*n_head, n_seq, d_head]
    q, k, v = heads.reshape(3, n_head, *heads.shape[1:])  # [3*n_head, n_seq, d_head] -> 3 of [n_head, n_seq, d_head]
    keys, values = cache = update(cache[0], k.mT, (0, 0, position)), update(cache[1], v, (0, position, 0))
    n_key = mask.shape[-1]
    k, v = keys.mT[:, :n_key], values[:, :n_key]  # [n_head, n_cache, d_head] -> [n_head, n_key, d_head]
    x = merge_heads(causal_attention(q, k, v, mask))  # [n_head, n_seq, d_head] -> [n_seq, n_embd]
    return linear(x, **c_proj), cache


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, cache, position, mask):
    """gpt2.transformer_block with a layer's cache. Returns (x, cache)."""
    new, cache = mha(layer_norm(x, **ln_1), **attn, n_head=n_head, cache=cache, position=position, mask=mask)
    x = x + new
    return x + ffn(layer_norm(x, **ln_2), **mlp), cache


def forward(params, tokens, cache, position, last=None, *, n_head, jit=lambda f: f):
    """(logits, cache) after `tokens`, [n_seq] ids that stand at position, position + 1, ...

    The logits are [n_seq, n_vocab], or those of tokens[last] alone, [n_vocab]: generation needs no others, and each
    costs a product with all of wte. The cache must have room for position + n_seq. Under jit the position may be
    traced, so that one program serves all positions.
    """
    positions = position + np.arange(len(tokens))
    x = embed(tokens, params["wte"], params["wpe"][positions])  # [n_seq] -> [n_seq, n_embd]
    # If position is an int, it tells how much of the cache is filled. Under jit it is a tracer: the mask hides the
    # rest.
    n_key = position + len(tokens) if isinstance(position, (int, numpy.integer)) else cache[0][1].shape[-2]
    mask = np.arange(n_key) <= positions[:, None]  # -> [n_seq, n_key]
    block_step = jit(functools.partial(transformer_block, n_head=n_head))  # all blocks are alike: JAX traces one
    new_cache = []
    for block, layer in zip(params["blocks"], cache, strict=True):
        x, layer = block_step(x, **block, cache=layer, position=position, mask=mask)
        new_cache.append(layer)
    x = x if last is None else x[last]  # [n_seq, n_embd] -> [n_embd]
    return unembed(layer_norm(x, **params["ln_f"]), params["wte"]), new_cache  # [..., n_embd] -> [..., n_vocab]


# ---- As a Model ----


@functools.lru_cache
def compiled(n_head, library):
    """`forward` for a backend, compiled once in a process for all calls of the same shapes."""
    step = library.jit(functools.partial(forward, n_head=n_head, jit=library.jit), donate_argnums=(2,))
    return library.tune(step)


def make_model(params, n_head, library, end_ids=(), stop_at_eos=False):
    """The Model of params that are on the backend `library` already (library.prepare or library.asarray)."""
    n_vocab, n_ctx = params["wte"].shape[0], params["wpe"].shape[0]
    empty = functools.partial(init_cache, n_head=n_head)
    return Model(params, compiled(n_head, library), empty, n_vocab, n_ctx, end_ids, stop_at_eos, library)


def load(folder, library, dtype="float32", adapter=""):
    """(Encoder, Model) of a model folder, with the LoRA of the folder `adapter` merged into it. Raises OSError for one
    that is damaged, ValueError for a LoRA of another model."""
    encoder, hparams, params = utils.load_folder(folder)
    params = lora.merge_folder(params, adapter) if adapter else params
    params = library.prepare(cast(params, dtype))  # the same name, so that no variable keeps the old arrays in memory
    return encoder, make_model(params, hparams["n_head"], library, *utils.read_ending(folder, encoder, hparams))


def generate(inputs, params, n_head, n_tokens_to_generate, backend="numpy"):
    """gpt2.generate with a cache: the same ids, sooner. Raises ValueError as gpt2.check_inputs does."""
    check_inputs(inputs, n_tokens_to_generate, n_vocab=len(params["wte"]), n_ctx=len(params["wpe"]))
    library = backends.get(backend)
    params = library.prepare(tree_map(lambda array: array, params))  # the caller's own tree stays as it is
    return list(greedy(make_model(params, n_head, library), inputs, n_tokens_to_generate))
