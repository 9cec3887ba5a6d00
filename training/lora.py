"""LoRA and adapters: fine-tuning with a few per cent of the parameters, the others frozen.

LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1) leaves a matrix w as it is and
learns what to add to it, as a product of two small matrices:

    x @ w   becomes   x @ w + scale * x @ a @ b        w [n_in, n_out], a [n_in, rank], b [rank, n_out]

a starts random, b at 0, so the model is the unchanged one at the start. Why so few numbers suffice: the change of w
that adapts a model to a task is close to a matrix of low rank. With rank 8, a and b of a matrix [768, 768] have 12,288
numbers instead of 589,824. Only they need a gradient and the two averages of AdamW. scale = alpha / rank, so that the
learning rate need not change with the rank. After training, `merge` adds the product to w: the model then has its usual
form and is as fast as before.

Adapters (Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1) are small networks with one
hidden layer. Each block gets two: one after attention and one after the feed-forward network, before the addition to
the residual stream. Because they are not linear they cannot be merged.

Both are kept as further leaves beside `w`, so that params stays a tree of dicts, lists and arrays:

    {"w": w, "b": bias, "lora_a": a, "lora_b": b}
    {"w": w, "b": bias, "adapter": {"down": {"w", "b"}, "up": {"w", "b"}}}

    params = add_lora(params, "c_attn|c_proj", rank=8, seed=0)
    logits = gpt2.gpt2(ids, **apply(params, scale=2.0), n_head=n_head)

`apply` puts an object in the place of `w` that does the right thing in `x @ w`. So no function of a model changes, and
it works for every architecture. What an adapter adds in the place of w, the bias b is added to afterwards: it computes
the same functions as after the bias, since it has a bias of its own.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from gpt2 import gelu, linear
from weights.params import flatten, from_names, leaf_name, matching, named_leaves
from weights.peft import load_lora

LEAVES = ("lora_a", "lora_b")


class LoRA(NamedTuple):
    """Stands for the matrix w + scale * a @ b in `x @ w`; scale is a number, or one for each column of a. x @ a has
    only `rank` numbers for each row, so it is computed first: a @ b would be as large as w."""

    w: Any
    a: Any
    b: Any
    scale: Any
    __array_ufunc__ = None  # NumPy's arrays then leave `x @ w` to __rmatmul__

    def __rmatmul__(self, x):
        return x @ self.w + (x @ self.a * self.scale) @ self.b


class Adapter(NamedTuple):
    """Stands for w in `x @ w`, and adds what a small network computes from the product."""

    w: Any
    down: dict
    up: dict
    __array_ufunc__ = None

    def __rmatmul__(self, x):
        y = x @ self.w
        return y + linear(gelu(linear(y, **self.down)), **self.up)  # [n_out] -> [size] -> [n_out]


def apply(params, scale=1.0):
    """params with a LoRA or an Adapter as `w` wherever there are leaves of one; scale is alpha / rank, see LoRA."""
    if isinstance(params, list):
        return [apply(part, scale) for part in params]
    if not isinstance(params, dict):
        return params
    parts = {key: part if key == "adapter" else apply(part, scale) for key, part in params.items()}
    if "lora_a" in parts:
        parts["w"] = LoRA(parts["w"], parts.pop("lora_a"), parts.pop("lora_b"), scale)
    if "adapter" in parts:
        parts["w"] = Adapter(parts["w"], **parts.pop("adapter"))
    return parts


def merge(params, scale=1.0):
    """params without LoRA's leaves: each w becomes w + scale * a @ b, in the dtype of w."""
    leaves = named_leaves(params)
    for name in [name.removesuffix("lora_a") for name in leaves if name.endswith(".lora_a")]:
        a, b = leaves.pop(f"{name}lora_a"), leaves.pop(f"{name}lora_b")
        leaves[f"{name}w"] = (leaves[f"{name}w"] + scale * (a @ b)).astype(leaves[f"{name}w"].dtype)
    return from_names(leaves)


# ---- At the start ----


def linears(params, pattern, flag):
    """{name: w} of the linear layers whose names the regular expression is found in: "blocks.0.attn.c_attn". Raises
    ValueError if there are none."""
    found = {leaf_name(path[:-1]): w for path, w in flatten(params).items() if path[-1] == "w" and w.ndim == 2}
    if chosen := matching(pattern, found):
        return {name: found[name] for name in chosen}
    kinds = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in found})
    raise ValueError(f"{flag} {pattern!r} matches no linear layer: this model has {', '.join(kinds)} in each block")


def add_lora(params, pattern, rank, seed):
    """params with leaves lora_a, normal with standard deviation 1 / sqrt(n_in), and lora_b, zeros, in the linear layers
    that linears chooses."""
    rng, leaves = numpy.random.default_rng(seed), {}
    for name, w in linears(params, pattern, "--lora").items():
        (n_in, n_out), dtype = w.shape, w.dtype
        leaves[f"{name}.lora_a"] = rng.normal(scale=n_in**-0.5, size=(n_in, rank)).astype(dtype)
        leaves[f"{name}.lora_b"] = numpy.zeros((rank, n_out), dtype)
    return from_names(named_leaves(params) | leaves)


def add_adapters(params, size, seed):
    """params with adapters of `size` hidden numbers in the last layers of attention and of the feed-forward network.
    up starts at 0: the model is unchanged at the start."""
    rng, leaves = numpy.random.default_rng(seed), {}
    for name, w in linears(params, r"attn\.c_proj$|mlp\.c_(proj|down)$", "adapters:").items():
        n, dtype = w.shape[1], w.dtype
        down = rng.normal(scale=n**-0.5, size=(n, size)).astype(dtype)
        adapter = {"down.w": down, "down.b": numpy.zeros(size, dtype)}
        adapter |= {"up.w": numpy.zeros((size, n), dtype), "up.b": numpy.zeros(n, dtype)}
        leaves |= {f"{name}.adapter.{part}": array for part, array in adapter.items()}
    return from_names(named_leaves(params) | leaves)


# ---- From files, and several at once ----


def load(folder, params):
    """{name: array} of the LoRA in a folder, its scale in lora_b; params are those of its base model, as loaded. Raises
    OSError and ValueError as weights.peft.load_lora does."""
    if not Path(folder).is_dir():
        raise ValueError(f"no adapter folder {str(folder)!r:.80}")
    return load_lora(Path(folder), params)


def merge_folder(params, folder):
    """params with the LoRA of a folder merged into them."""
    return merge(from_names(named_leaves(params) | load(folder, params)))


def lora_leaves(params, scale=1.0):
    """{name: array} of the leaves of LoRA alone, lora_b multiplied by scale: what one fine-tune adds to its base."""
    leaves = named_leaves(params).items()
    return {k: scale * x if k.endswith("lora_b") else x for k, x in leaves if k.endswith(LEAVES)}


def stack(adapters):
    """[{name: array}, ...], each from lora_leaves or load -> {"leaves": {name: array}, "owner": [n_columns]}: the
    matrices of all adapters side by side, lora_a as [n_in, n_columns] and lora_b as [n_columns, n_out]. owner says
    which adapter each column belongs to: 1 for the first one. An adapter with a lower rank than others, or without
    some layer, has zeros there, which add nothing."""
    shapes = {name: array.shape for leaves in adapters for name, array in leaves.items()}
    rank = max((leaves[name].shape[-1] for leaves in adapters for name in leaves if name.endswith("lora_a")), default=0)
    bank = {}
    for name, (n_in, n_out) in shapes.items():
        is_a = name.endswith("lora_a")
        bank[name] = numpy.zeros((n_in, len(adapters) * rank) if is_a else (len(adapters) * rank, n_out), numpy.float32)
        for i, array in ((i, leaves[name]) for i, leaves in enumerate(adapters) if name in leaves):
            part = (bank[name] if is_a else bank[name].T)[:, i * rank : (i + 1) * rank]
            part[:, : min(array.shape[1 if is_a else 0], rank)] = array if is_a else array.T
    return {"leaves": bank, "owner": numpy.repeat(numpy.arange(1, len(adapters) + 1), rank)}


def choose(params, bank, i):
    """params with adapter i of a bank, 1 for the first, 0 for none, ready for a forward pass.

    The columns of other adapters are multiplied by 0. So under vmap, where each row may have another i, all matrices
    are the same for all rows: two products with x serve every row and every adapter.
    """
    if not bank["leaves"]:
        return params
    scale = (bank["owner"] == i).astype(next(iter(bank["leaves"].values())).dtype)
    return apply(from_names(named_leaves(params) | bank["leaves"]), scale)
