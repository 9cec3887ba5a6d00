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

import numpy  # NumPy itself; np, below, follows its arguments

import backends
from backends import namespace_of, np, update
from gpt2 import attention, check_inputs, embed, ffn, layer_norm, linear, merge_heads, split_heads, unembed
from inference.model import Model, greedy
from weights.params import tree_map


def init_cache(params, n_cache, *, n_head):
    """An empty cache for n_cache positions, of the params' dtype and library."""
    wpe = params["wpe"]
    d_head, zeros = wpe.shape[-1] // n_head, namespace_of([wpe]).zeros
    shapes = (n_head, d_head, n_cache), (n_head, n_cache, d_head)
    return [tuple(zeros(shape, wpe.dtype) for shape in shapes) for _ in params["blocks"]]


def causal_attention(q, k, v, mask):
    """gpt2.attention for a causal mask, in chunks of queries: four, or more if that would be over 256 queries each. A
    chunk skips the keys that none of its queries may see: for a square mask that saves 3/8 of the work. And memory
    holds the scores of one chunk at a time, which grow with n_seq and not with its square."""
    n_seq, n_key = mask.shape
    n_chunk = min(max(64, -(-n_seq // 4)), 256)
    if n_seq <= n_chunk:
        return attention(q, k, v, mask)
    chunks = []
    for start in range(0, n_seq, n_chunk):
        end = min(start + n_chunk, n_seq)
        n_seen = n_key - n_seq + end  # the last query of the chunk sees so many keys
        seen = k[..., :n_seen, :], v[..., :n_seen, :]
        chunks.append(attention(q[..., start:end, :], *seen, mask[start:end, :n_seen]))
    return np.concatenate(chunks, axis=-2)


def causal_mask(n_seq, cache, position):
    """For n_seq tokens that stand at position, position + 1, ...: (their positions [n_seq], the mask [n_seq, n_key]).

    If position is an int, it tells how much of the cache is filled, and n_key counts that alone. Under jit it is a
    tracer: n_key is all of the cache, and the mask hides what is not filled.
    """
    positions = position + np.arange(n_seq)
    n_key = position + n_seq if isinstance(position, (int, numpy.integer)) else cache[0][1].shape[-2]
    return positions, np.arange(n_key) <= positions[:, None]  # -> [n_seq, n_key]


def extend(cache, k, v, position, n_key):
    """Writes new keys and values, [n_head, n_seq, d_head], into a layer's cache from `position` on. Returns (the first
    n_key keys that it holds, their values, the cache)."""
    keys, values = cache = update(cache[0], k.mT, (0, 0, position)), update(cache[1], v, (0, position, 0))
    return keys.mT[:, :n_key], values[:, :n_key], cache  # [n_head, n_cache, d_head] -> [n_head, n_key, d_head]


def mha(x, c_attn, c_proj, n_head, cache, position, mask):
    """gpt2.mha for tokens that stand from `position` on. Their keys and values are written into the layer's cache, and
    the queries attend to all that it holds. Returns (x, cache)."""
    heads = split_heads(linear(x, **c_attn), 3 * n_head)  # [n_seq, n_embd] -> [3*n_head, n_seq, d_head]
    q, k, v = heads.reshape(3, n_head, *heads.shape[1:])  # [3*n_head, n_seq, d_head] -> 3 of [n_head, n_seq, d_head]
    k, v, cache = extend(cache, k, v, position, n_key=mask.shape[-1])  # -> [n_head, n_key, d_head]
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
    positions, mask = causal_mask(len(tokens), cache, position)
    x = embed(tokens, params["wte"], params["wpe"][positions])  # [n_seq] -> [n_seq, n_embd]
    block_step = jit(functools.partial(transformer_block, n_head=n_head))  # all blocks are alike: JAX traces one
    new_cache = []
    for block, layer in zip(params["blocks"], cache, strict=True):
        x, layer = block_step(x, **block, cache=layer, position=position, mask=mask)
        new_cache.append(layer)
    x = x if last is None else x[last]  # [n_seq, n_embd] -> [n_embd]
    return unembed(layer_norm(x, **params["ln_f"]), params["wte"]), new_cache  # [..., n_embd] -> [..., n_vocab]


# ---- As a Model ----


@functools.lru_cache
def forward_on(n_head, library):
    """`forward` as a backend runs it: compiled by JAX, once in a process for all calls of the same shapes; as it is by
    NumPy."""
    step = library.jit(functools.partial(forward, n_head=n_head, jit=library.jit), donate_argnums=(2,))
    return library.tune(step)


def make_model(params, hparams, library, end_ids=(), stop_at_eos=False):
    """The Model of params that are on the backend `library` already (library.prepare or library.asarray). Of hparams
    only n_head is used: params tell the other sizes."""
    n_head, n_vocab, n_ctx = hparams["n_head"], params["wte"].shape[0], params["wpe"].shape[0]
    empty = functools.partial(init_cache, n_head=n_head)
    return Model(params, forward_on(n_head, library), empty, n_vocab, n_ctx, end_ids, stop_at_eos, library)


def generate(inputs, params, n_head, n_tokens_to_generate, backend="numpy"):
    """gpt2.generate with a cache: the same ids, sooner. Raises ValueError as gpt2.check_inputs does."""
    check_inputs(inputs, n_tokens_to_generate, n_vocab=len(params["wte"]), n_ctx=len(params["wpe"]))
    library = backends.get(backend)
    params = library.prepare(tree_map(lambda array: array, params))  # the caller's own tree stays as it is
    return list(greedy(make_model(params, {"n_head": n_head}, library), inputs, n_tokens_to_generate))
