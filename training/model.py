"""The forward pass as training wants it: gpt2.py's layers in gpt2.py's order, with dropout between them, and attention
without most of what the causal mask hides.

Going backward takes what was computed going forward, so what is never computed saves twice.
"""

import itertools

import gpt2
from backends import np
from inference.kv_cache import causal_attention


def mha(x, c_attn, c_proj, n_head):
    """gpt2.mha, in parts."""
    q, k, v = np.split(gpt2.linear(x, **c_attn), 3, axis=-1)  # [n_seq, n_embd] -> 3 of [n_seq, n_embd]
    q, k, v = (gpt2.split_heads(part, n_head) for part in (q, k, v))  # [n_seq, n_embd] -> [n_head, n_seq, d_head]
    x = causal_attention(q, k, v, np.tri(len(x), dtype=bool))
    return gpt2.linear(gpt2.merge_heads(x), **c_proj)  # [n_head, n_seq, d_head] -> [n_seq, n_embd]


def dropout(rate, key):
    """A function of x that sets each number to 0 with probability `rate`, by other coins at each call, and scales those
    that stay, so that their sum is the same on average: none may rely on one other (Srivastava et al. 2014)."""
    if rate == 0:
        return lambda x: x
    import jax

    n_calls = itertools.count()

    def drop(x):
        kept = jax.random.bernoulli(jax.random.fold_in(key, next(n_calls)), 1 - rate, x.shape)
        return np.where(kept, x / (1 - rate), x.dtype.type(0))

    return drop


def forward(params, inputs, n_head, drop):
    """gpt2.gpt2, with `drop` on the embeddings and on what each part adds: [n_seq] ids -> [n_seq, n_vocab] logits."""
    x = drop(gpt2.embed(inputs, params["wte"], params["wpe"]))  # [n_seq] -> [n_seq, n_embd]
    for block in params["blocks"]:
        x = x + drop(mha(gpt2.layer_norm(x, **block["ln_1"]), **block["attn"], n_head=n_head))
        x = x + drop(gpt2.ffn(gpt2.layer_norm(x, **block["ln_2"]), **block["mlp"]))
    return gpt2.unembed(gpt2.layer_norm(x, **params["ln_f"]), params["wte"])  # [n_seq, n_embd] -> [n_seq, n_vocab]
