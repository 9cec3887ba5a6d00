"""The forward pass of training: the layers of gpt2.py, or of variants/llama.py, in the same order, with dropout between
them.

It differs from gpt2.gpt2 in two places. Dropout sets some activations (the numbers that pass from layer to layer) to 0,
so that the model does not learn its texts by heart. And attention skips most of the scores that the causal mask hides:
the backward pass needs all results of the forward pass, and computes a gradient for each, so a result that is left out
saves time and memory in both.

    forward = forward_of(hparams)                    the one place in training/ that knows architectures
    logits = forward(params, inputs)                 [n_seq] -> [n_seq, n_vocab], without dropout
    logits = forward(params, inputs, drop=dropout(rate, key))
"""

import functools
import itertools
import math

import numpy  # NumPy itself; np, below, follows its arguments

import gpt2
from backends import np
from inference.kv_cache import causal_attention
from variants import llama
from weights.params import architecture, shapes_of


def no_dropout(x):
    return x


def mha(x, c_attn, c_proj, n_head):
    """gpt2.mha with causal_attention, which computes the same in parts: x is [n_seq, n_embd] and stays so."""
    q, k, v = np.split(gpt2.linear(x, **c_attn), 3, axis=-1)  # [n_seq, n_embd] -> 3 of [n_seq, n_embd]
    q, k, v = (gpt2.split_heads(part, n_head) for part in (q, k, v))  # [n_seq, n_embd] -> [n_head, n_seq, d_head]
    x = causal_attention(q, k, v, np.tri(len(x), dtype=bool))
    return gpt2.linear(gpt2.merge_heads(x), **c_proj)  # [n_head, n_seq, d_head] -> [n_seq, n_embd]


def hidden(params, inputs, n_head, drop=no_dropout):
    """All of gpt2.gpt2 but the logits, with the function `drop` applied to the embeddings and to what attention and mlp
    add in each block: [n_seq] ids -> [n_seq, n_embd]."""
    x = drop(gpt2.embed(inputs, params["wte"], params["wpe"]))  # [n_seq] -> [n_seq, n_embd]
    for block in params["blocks"]:
        x = x + drop(mha(gpt2.layer_norm(x, **block["ln_1"]), **block["attn"], n_head=n_head))
        x = x + drop(gpt2.ffn(gpt2.layer_norm(x, **block["ln_2"]), **block["mlp"]))
    return gpt2.layer_norm(x, **params["ln_f"])


def llama_hidden(params, inputs, config, drop=no_dropout):
    """The same for variants.llama.llama."""
    x, eps = drop(llama.embed(inputs, params["wte"])), config["eps"]
    where = llama.whole(len(inputs), config, x.dtype)
    for block in params["blocks"]:
        x = x + drop(llama.gqa(llama.rms_norm(x, **block["ln_1"], eps=eps), **block["attn"], config=config, **where))
        x = x + drop(llama.swiglu(llama.rms_norm(x, **block["ln_2"], eps=eps), **block["mlp"]))
    return llama.rms_norm(x, **params["ln_f"], eps=eps)


def forward(params, inputs, n_head, drop=no_dropout):
    """gpt2.gpt2 with dropout: [n_seq] ids -> [n_seq, n_vocab] logits."""
    return gpt2.unembed(hidden(params, inputs, n_head, drop), params["wte"])  # [n_seq, n_embd] -> [n_seq, n_vocab]


def llama_forward(params, inputs, config, drop=no_dropout):
    """The same for variants.llama.llama."""
    return gpt2.unembed(llama_hidden(params, inputs, config, drop), params.get("lm_head", params["wte"]))


# ---- The architectures ----


def gpt2_hparams(n_head_kv=None, **sizes):
    return sizes


def llama_hparams(n_head_kv=None, **sizes):
    """The config (variants/llama.py) of a LLaMA with as many parameters as a GPT-2 of these sizes, so that the two can
    be compared. That decides n_ffn, which comes out near 8/3 n_embd: a multiple of 8, as vectors of a processor are."""
    config = sizes | {"n_head_kv": n_head_kv or sizes["n_head"], "d_head": sizes["n_embd"] // sizes["n_head"]}
    config |= {"eps": 1e-5, "rope_base": 10000.0, "rope_scaling": None, "tied": True, "n_ffn": 0}
    n_missing = n_params(sizes) - n_params(config)
    return config | {"n_ffn": max(8, 8 * round(n_missing / (8 * 3 * sizes["n_embd"] * sizes["n_layer"])))}


def architecture_faults(name, n_embd, n_head, n_head_kv):
    """Pairs (whether these flags of train.py have this fault, its message)."""
    is_llama, shared = name == "llama", n_head_kv is not None
    yield name not in ("", *HPARAMS), f"--architecture {name!r}: choose {' or '.join(HPARAMS)}"
    yield (
        is_llama and n_embd // n_head % 2,
        f"--n_embd {n_embd} / --n_head {n_head} is odd: llama turns pairs of numbers",
    )
    yield shared and not is_llama, "--n_head_kv is for --architecture llama"
    yield (
        shared and (n_head_kv == 0 or n_head % n_head_kv),
        f"--n_head_kv {n_head_kv} does not divide --n_head {n_head}",
    )


def n_params(hparams):
    """The number of parameters of a model."""
    return sum(map(math.prod, shapes_of(hparams).values()))


HPARAMS = {"gpt2": gpt2_hparams, "llama": llama_hparams}  # the hyperparameters of a new model, from its sizes


def shorten(hparams, params, n_ctx):
    """(hparams, params) of the same model for texts of n_ctx tokens at most."""
    return hparams | {"n_ctx": n_ctx}, params | ({"wpe": params["wpe"][:n_ctx]} if "wpe" in params else {})


def hidden_of(hparams):
    """The function (params, inputs, drop=...) -> [n_seq, n_embd], what the logits are computed from, for the
    architecture that has these hyperparameters."""
    if architecture(hparams) == "llama":
        return functools.partial(llama_hidden, config=hparams)
    return functools.partial(hidden, n_head=hparams["n_head"])


def forward_of(hparams):
    """The function (params, inputs, drop=...) -> logits for the architecture that has these hyperparameters."""
    if architecture(hparams) == "llama":
        return functools.partial(llama_forward, config=hparams)
    return functools.partial(forward, n_head=hparams["n_head"])


# ---- Dropout, with random numbers that NumPy and JAX agree on ----


def dropout(rate, key):
    """A function of x, [n_seq, n_embd], that sets each number to 0 with probability `rate` and divides the others by
    1 - rate, so that the mean stays as it was (Srivastava et al. 2014, section 10). Any number may be missing, so the
    model cannot come to depend on a particular pair of numbers. Each call draws other numbers; key is one row of
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
