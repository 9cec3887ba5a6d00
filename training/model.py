"""The forward pass as training wants it: gpt2.py's layers in gpt2.py's order, with dropout between them, and attention
without the half that the causal mask hides.

Going backward needs what was computed going forward, so what is never computed saves twice.
"""

import itertools

import gpt2
from backends import np

N_PARTS = 4  # more of them skip more of the hidden half (3/8 with 4), but smaller products are slower


def attention(q, k, v):
    """gpt2.attention under a causal mask, the queries in N_PARTS: the first ones never look at the last keys, so these
    are left out. q, k and v are [n_head, n_seq, d_head], as is what comes back."""
    n_seq = q.shape[-2]
    n_part = -(-n_seq // N_PARTS)
    mask = np.tri(n_seq, dtype=bool)
    parts = [(start, min(start + n_part, n_seq)) for start in range(0, n_seq, n_part)]
    return np.concatenate([gpt2.attention(q[:, i:j], k[:, :j], v[:, :j], mask[i:j, :j]) for i, j in parts], axis=1)


def mha(x, c_attn, c_proj, n_head):
    """gpt2.mha with the attention above."""
    q, k, v = np.split(gpt2.linear(x, **c_attn), 3, axis=-1)  # [n_seq, n_embd] -> 3 of [n_seq, n_embd]
    q, k, v = (gpt2.split_heads(part, n_head) for part in (q, k, v))  # [n_seq, n_embd] -> [n_head, n_seq, d_head]
    return gpt2.linear(gpt2.merge_heads(attention(q, k, v)), **c_proj)  # [n_head, n_seq, d_head] -> [n_seq, n_embd]


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
