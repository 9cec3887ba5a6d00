"""LLaMA: what changed since GPT-2. Read gpt2.py first: only the differences are here.

Most open models of today have this architecture. It is GPT-2's decoder, the same residual stream, causal attention and
loop, with these parts replaced:

    GPT-2                           LLaMA                           why                                          source
    layer_norm: subtracts the mean  rms_norm: divides by the root   The mean is not needed: training is as       [1]
    too, and adds a bias            mean square alone               stable, with fewer operations.
    wpe: a learned vector for each  rotary: queries and keys are    A score then depends on the distance of two  [2]
    position, added once at the     turned by an angle that grows   tokens alone, in every layer, and there is
    input                           with their position             no table to learn.
    ffn: gelu(x W) V                swiglu: (silu(x W) * x U) V     The product lets a layer switch its inputs   [3]
                                                                    on and off. At equal parameters the loss is
                                                                    lower, although nobody knows why.
    mha: a key and a value head     gqa: one for each group of      The cache, which a token reads as a whole,   [4]
    for each query head             query heads                     is smaller by n_head / n_head_kv.
    linear: a bias everywhere       no biases                       They change little in large models.          [5]
    wte at the output too           the same, or lm_head            A large model can afford a second table.     [5]

[1] Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", section 3
[2] Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2
[3] Shazeer 2020, "GLU Variants Improve Transformer", section 2
[4] Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models", section 2.2
[5] Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models", section 2.2, for the whole: it took
    [1] to [3] together; [4] came with LLaMA 2

softmax, attention, the heads and unembed are those of gpt2.py; so is linear, with the bias 0. Attention in chunks and
the cache are those of inference/kv_cache.py.

    python -m variants.llama "Once upon a time" --model_size models/mine      the flags are those of gpt2.py

    tokenizer, config, params = load("models/mine")
    logits = llama(tokenizer.encode("Once upon a time"), **params, config=config)  # [n_seq] -> [n_seq, n_vocab]

`params` is a nested dict, see weights/params.py. `config` is a dict too:

    n_vocab, n_ctx, n_embd, n_layer     as in GPT-2; n_ctx is the longest text of training, there is no table of it
    n_head, n_head_kv, d_head           query heads, key/value heads (a divisor of n_head), and the size of each
    n_ffn                               hidden numbers of the feed-forward network; often 8/3 n_embd, as it has three
                                        matrices where GPT-2's has two
    eps                                 rms_norm's
    rope_base, rope_scaling             see frequencies
    tied                                whether wte serves at the output too
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import functools
import json
import math

import numpy

import utils
from backends import keeps_dtype, namespace_of, np
from gpt2 import linear, merge_heads, split_heads, unembed
from inference.kv_cache import causal_attention, causal_mask, extend
from inference.model import Model
from weights.params import architecture, cast

# ---- Functions of a vector ----


def project(x, w):
    """A linear layer without a bias, [..., n_in] -> [..., n_out]: gpt2.linear with the bias 0."""
    return linear(x, w, 0)


@keeps_dtype(compute="float32")
def rms_norm(x, g, eps):
    """Root mean square normalization ([1] section 3): each vector of x, [..., n_embd], divided by the root of the mean
    of its squares, then scaled by g, [n_embd]. gpt2.layer_norm without the mean and the bias."""
    mean_square = (x * x).sum(axis=-1, keepdims=True) / x.shape[-1]  # [..., n_embd] -> [..., 1]
    return g * (x / np.sqrt(mean_square + eps))


@keeps_dtype(compute="float32")
def silu(x):
    """x times the logistic function of x, 1 / (1 + exp(-x)), for x of any shape: a nonlinearity much like gelu
    (Hendrycks & Gimpel 2016, section 2, where it has this name; also called Swish)."""
    return x * (0.5 * (1 + np.tanh(0.5 * x)))  # the logistic function, in a form in which no exp overflows


# ---- The feed-forward network ----


def swiglu(x, c_gate, c_up, c_down):
    """The feed-forward network ([3] section 2): two linear layers side by side, whose product goes into a third.

    In gpt2.ffn each hidden number is a function of one weighted sum. Here silu of one sum, the gate, says how much of
    another sum passes.
    """
    hidden = silu(project(x, **c_gate)) * project(x, **c_up)  # [n_seq, n_embd] -> [n_seq, n_ffn]
    return project(hidden, **c_down)  # [n_seq, n_ffn] -> [n_seq, n_embd]


# ---- Rotary positions ----


def frequencies(config):
    """The angle in radians by which each pair of numbers of a head turns from one position to the next: [d_head/2]
    float64, from 1 down to about 1/rope_base ([2] section 3.2.2).

    Fast pairs tell near positions apart, slow ones far positions. A text longer than those of training would turn the
    slow pairs to angles that were never seen. LLaMA 3.1 therefore divides the frequencies of slow pairs by `factor`:
    those that turn less than low_freq_factor times in n_ctx_original positions, the context before. Pairs that turn
    more than high_freq_factor times stay as they are; in between the change is gradual.
    """
    d_head, scaling = config["d_head"], config["rope_scaling"]
    turning = config["rope_base"] ** -(numpy.arange(0, d_head, 2) / d_head)
    if scaling is None:
        return turning
    n_turns = scaling["n_ctx_original"] * turning / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = numpy.clip((n_turns - low) / (high - low), 0, 1)  # 0: divided by the factor, 1: as it was
    return turning * (kept + (1 - kept) / scaling["factor"])


@functools.lru_cache(maxsize=8)
def rotation_table(n, turning):
    """(cosines, sines), each [n, d_head/2] float64, of the angles at positions 0 to n - 1, for a tuple of frequencies.
    In float64: a float32 angle after 8,000 positions would be off by 0.0002."""
    angles = numpy.outer(numpy.arange(n), turning)
    return numpy.cos(angles), numpy.sin(angles)


def rotations(positions, n, config, dtype):
    """(cosines, sines), each [n_seq, d_head/2], at `positions`, [n_seq] numbers below n, which may be traced. Computed
    once for all layers."""
    dtype = numpy.float32 if numpy.dtype(dtype).itemsize == 2 else dtype
    tables = rotation_table(n, tuple(frequencies(config).tolist()))
    return tuple(np.take(table.astype(dtype), positions, axis=0) for table in tables)


@keeps_dtype(compute="float32")
def rotary(x, cos, sin):
    """Rotary position embedding ([2] section 3.2.2) of queries or keys x, [..., n_seq, d_head]; cos and sin are [n_seq,
    d_head/2].

    Number i and number i + d_head/2 of a head are a point in the plane, which is turned about the origin by the angle
    of its position. Lengths stay. The dot product of two points depends on the angle between them, so the score of a
    query and a key depends on the difference of their positions alone.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]  # [..., n_seq, d_head] -> 2 of [..., n_seq, d_head/2]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


# ---- Attention ----


def queries_keys_values(x, c_q, c_k, c_v, config, rotation):
    """[n_seq, n_embd] -> queries [n_head, n_seq, d_head], keys and values [n_head_kv, n_seq, d_head]. Queries and keys
    are turned to their positions; values are not, as what a token passes on does not depend on where it stands."""
    q = split_heads(project(x, **c_q), config["n_head"])  # [n_seq, n_embd] -> [n_head, n_seq, d_head]
    k, v = (split_heads(project(x, **c), config["n_head_kv"]) for c in (c_k, c_v))  # -> [n_head_kv, n_seq, d_head]
    return rotary(q, *rotation), rotary(k, *rotation), v


def grouped_attention(q, k, v, mask):
    """Grouped-query attention ([4] section 2.2): query heads 0 to n_head / n_head_kv - 1 share key/value head 0, the
    next group shares head 1, and so on. With as many of both it is multi-head attention."""
    n_head, n_seq, d_head = q.shape
    groups = q.reshape(len(k), n_head // len(k), n_seq, d_head)  # -> [n_head_kv, n_group, n_seq, d_head]
    x = causal_attention(groups, k[:, None], v[:, None], mask)  # an axis of length 1 serves all heads of a group
    return x.reshape(n_head, n_seq, d_head)


def gqa(x, c_q, c_k, c_v, c_proj, config, rotation, mask):
    """gpt2.mha with rotary positions and grouped queries, for x, [n_seq, n_embd]."""
    q, k, v = queries_keys_values(x, c_q, c_k, c_v, config, rotation)
    return project(merge_heads(grouped_attention(q, k, v, mask)), **c_proj)


# ---- The model ----


def transformer_block(x, mlp, attn, ln_1, ln_2, config, rotation, mask):
    """gpt2.transformer_block: the new parts in the old places."""
    x = x + gqa(rms_norm(x, **ln_1, eps=config["eps"]), **attn, config=config, rotation=rotation, mask=mask)
    return x + swiglu(rms_norm(x, **ln_2, eps=config["eps"]), **mlp)


def embed(inputs, wte):
    """gpt2.embed without positions, which enter in attention."""
    return wte[np.asarray(inputs)]  # [n_seq] -> [n_seq, n_embd]


def whole(n_seq, config, dtype):
    """What all blocks need to know of a text that is computed as a whole: its rotations and the causal mask."""
    rotation = rotations(numpy.arange(n_seq), n_seq, config, dtype)
    return {"rotation": rotation, "mask": np.tri(n_seq, dtype=bool)}


def final(x, wte, ln_f, lm_head, eps):
    """The logits: gpt2.unembed of the normalized vectors, with wte unless there is an lm_head."""
    return unembed(rms_norm(x, **ln_f, eps=eps), wte if lm_head is None else lm_head)  # -> [..., n_vocab]


def llama(inputs, wte, blocks, ln_f, lm_head=None, *, config):
    """The logits of every position, [n_seq, n_vocab], as gpt2.gpt2 gives them: `inputs` are [n_seq] ids, wte and
    lm_head (None: wte serves again) are [n_vocab, n_embd]."""
    x = embed(inputs, wte)  # [n_seq] -> [n_seq, n_embd]
    where = whole(len(inputs), config, x.dtype)
    for block in blocks:
        x = transformer_block(x, **block, config=config, **where)
    return final(x, wte, ln_f, lm_head, config["eps"])  # [n_seq, n_embd] -> [n_seq, n_vocab]


# ---- With a cache: see inference/kv_cache.py ----


def init_cache(params, n_cache, *, config):
    """An empty cache for n_cache positions. It holds turned keys, so nothing is turned twice."""
    g, n_head, d_head = params["ln_f"]["g"], config["n_head_kv"], config["d_head"]
    zeros, shapes = namespace_of([g]).zeros, ((n_head, d_head, n_cache), (n_head, n_cache, d_head))
    return [tuple(zeros(shape, g.dtype) for shape in shapes) for _ in params["blocks"]]


def cached_gqa(x, c_q, c_k, c_v, c_proj, config, rotation, mask, cache, position):
    """gqa for tokens that stand from `position` on. Returns (x, cache)."""
    q, k, v = queries_keys_values(x, c_q, c_k, c_v, config, rotation)
    k, v, cache = extend(cache, k, v, position, n_key=mask.shape[-1])
    return project(merge_heads(grouped_attention(q, k, v, mask)), **c_proj), cache


def cached_block(x, mlp, attn, ln_1, ln_2, config, **where):
    """transformer_block with a layer's cache. Returns (x, cache)."""
    new, cache = cached_gqa(rms_norm(x, **ln_1, eps=config["eps"]), **attn, config=config, **where)
    x = x + new
    return x + swiglu(rms_norm(x, **ln_2, eps=config["eps"]), **mlp), cache


def forward(params, tokens, cache, position, last=None, *, config, jit=lambda f: f):
    """(logits, cache) after `tokens`, as inference.kv_cache.forward gives them."""
    positions, mask = causal_mask(len(tokens), cache, position)
    x, block_step, new_cache = embed(tokens, params["wte"]), jit(functools.partial(cached_block, config=config)), []
    rotation = rotations(positions, cache[0][1].shape[-2], config, x.dtype)
    for block, layer in zip(params["blocks"], cache, strict=True):
        x, layer = block_step(x, **block, rotation=rotation, mask=mask, cache=layer, position=position)
        new_cache.append(layer)
    x = x if last is None else x[last]  # [n_seq, n_embd] -> [n_embd]
    return final(x, params["wte"], params["ln_f"], params.get("lm_head"), config["eps"]), new_cache


# ---- As a Model, and from files ----


@functools.lru_cache
def forward_on(config, library):
    """`forward` for a config, as JSON, as a backend runs it: compiled by JAX, once in a process for all calls of the
    same shapes; as it is by NumPy."""
    step = functools.partial(forward, config=json.loads(config), jit=library.jit)
    return library.tune(library.jit(step, donate_argnums=(2,)))


def make_model(params, config, library, end_ids=(), stop_at_eos=False):
    """The Model of params that are on the backend `library` already."""
    step, empty = forward_on(json.dumps(config), library), functools.partial(init_cache, config=config)
    return Model(params, step, empty, config["n_vocab"], config["n_ctx"], end_ids, stop_at_eos, library)


def load(path_or_name, dtype="float32"):
    """(tokenizer, config, params) of a LLaMA, which utils.find_model finds; the tokenizer is None for a folder that has
    none. Raises ValueError for a model of another architecture, else as utils.load_encoder_hparams_and_params does."""
    folder = utils.find_model(str(path_or_name))
    config = utils.read_hparams(folder)
    if architecture(config) != "llama":
        raise ValueError(f"{folder} is no LLaMA but a {architecture(config)}: python gpt2.py runs it")
    if utils.has_tokenizer(folder):
        tokenizer, config, params = utils.load_folder(folder)
    else:
        tokenizer, params = None, utils.load_params(folder, config)
    return tokenizer, config, cast(params, dtype)


if __name__ == "__main__":  # python -m variants.llama "prompt"
    from inference.__main__ import main as front_door

    front_door.__kwdefaults__["model_size"] = "smollm2"  # what is left out, also in --help
    cli.run(front_door, "-m variants.llama")
