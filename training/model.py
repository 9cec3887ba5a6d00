"""The forward pass of training: the layers of gpt2.py, in the same order, with dropout between them.

It differs from gpt2.gpt2 in two places. Dropout sets some activations to 0, so that the model does not learn its texts
by heart. And attention skips most of the scores that the causal mask hides: the backward pass keeps and goes through
everything that the forward pass computed, so leaving something out saves time and memory twice.
"""

import itertools

import numpy

import gpt2
from backends import np
from inference.kv_cache import causal_attention


def mha(x, c_attn, c_proj, n_head):
    """gpt2.mha with causal_attention, which computes the same in parts: x is [n_seq, n_embd] and stays so."""
    q, k, v = np.split(gpt2.linear(x, **c_attn), 3, axis=-1)  # [n_seq, n_embd] -> 3 of [n_seq, n_embd]
    q, k, v = (gpt2.split_heads(part, n_head) for part in (q, k, v))  # [n_seq, n_embd] -> [n_head, n_seq, d_head]
    x = causal_attention(q, k, v, np.tri(len(x), dtype=bool))
    return gpt2.linear(gpt2.merge_heads(x), **c_proj)  # [n_head, n_seq, d_head] -> [n_seq, n_embd]


def hidden(params, inputs, n_head, drop):
    """All of gpt2.gpt2 but the logits, with the function `drop` applied to the embeddings and to what attention and mlp
    add in each block: [n_seq] ids -> [n_seq, n_embd]."""
    x = drop(gpt2.embed(inputs, params["wte"], params["wpe"]))  # [n_seq] -> [n_seq, n_embd]
    for block in params["blocks"]:
        x = x + drop(mha(gpt2.layer_norm(x, **block["ln_1"]), **block["attn"], n_head=n_head))
        x = x + drop(gpt2.ffn(gpt2.layer_norm(x, **block["ln_2"]), **block["mlp"]))
    return gpt2.layer_norm(x, **params["ln_f"])


def forward(params, inputs, n_head, drop):
    """The logits from these: [n_seq] ids -> [n_seq, n_vocab]."""
    return gpt2.unembed(hidden(params, inputs, n_head, drop), params["wte"])  # [n_seq, n_embd] -> [n_seq, n_vocab]


# ---- Dropout, with random numbers that NumPy and JAX agree on ----


def dropout(rate, key):
    """A function of x, [n_seq, n_embd], that sets each number to 0 with probability `rate` and divides the others by
    1 - rate, so that the mean stays as it was (Srivastava et al. 2014, section 10). Any number may be missing, so the
    model cannot come to depend on a particular pair of numbers. Each call draws anew; key is one row of
    dropout_keys."""
    if rate == 0:
        return lambda x: x
    threshold, n_calls = numpy.uint32(min(round(rate * 2**32), 2**32 - 1)), itertools.count()

    def drop(x):
        rows = mix(mix(key, [next(n_calls)]), numpy.arange(len(x)))[:, None]  # -> [n_seq, 1]
        kept = mix(rows, numpy.arange(x.shape[-1])) >= threshold  # -> [n_seq, n_embd]
        return np.where(kept, x / (1 - rate), x.dtype.type(0))

    return drop


def dropout_keys(seed, n_done, n_batch):
    """A key, [1], for each text of the batch that follows n_done others: [n_batch, 1] uint32. It depends on the place
    of the text in the batch alone, not on how the batch is divided among micro-batches or devices."""
    return mix(mix(mix(numpy.zeros(1, numpy.uint32), [seed]), [n_done]), numpy.arange(n_batch))[:, None]


def mix(key, number):
    """A random-looking uint32 for each pair of a uint32 of the array `key` and a whole number: the same pair, the same
    result, in any order and on any machine (a counter-based generator: Salmon et al. 2011, "Parallel Random Numbers: As
    Easy as 1, 2, 3"). dropout mixes in the seed, the step, the row, the call, the position and the column in turn."""
    # 0x9E3779B9, 2^32 divided by the golden ratio, is there because murmur3 would map 0 to 0.
    number = np.asarray(number).astype(numpy.uint32) + numpy.uint32(0x9E3779B9)
    return murmur3(key ^ murmur3(number))


def murmur3(x):
    """The last step of Austin Appleby's hash MurmurHash3 ("fmix32", 2011): a one-to-one map of the uint32 numbers. Each
    multiplication carries a bit to all higher ones, each shift brings high bits down to the low ones, and after three
    shifts a change of one bit of x changes each bit of the result with probability 1/2."""
    x = (x ^ x >> 16) * numpy.uint32(0x85EBCA6B)  # modulo 2^32: an array of uint32 wraps around
    x = (x ^ x >> 13) * numpy.uint32(0xC2B2AE35)
    return x ^ x >> 16
