"""The parameters of a model: their names and shapes, their dtype, and how to walk a tree of arrays.

`params` is a tree: dicts, lists and tuples, nested, with arrays as its leaves. A leaf is found by its path, the keys
and indices on the way to it: ("blocks", 0, "attn", "c_attn", "w") is params["blocks"][0]["attn"]["c_attn"]["w"].
"""

import functools
import math
import operator
import re

import numpy as np


def param_shapes(n_vocab, n_ctx, n_embd, n_head, n_layer):
    """{path: shape} of all parameters of a GPT-2 of these sizes. `w` is [n_in, n_out], so that `x @ w` needs no
    transpose."""
    block = {
        "ln_1/g": (n_embd,),
        "ln_1/b": (n_embd,),
        "attn/c_attn/w": (n_embd, 3 * n_embd),
        "attn/c_attn/b": (3 * n_embd,),
        "attn/c_proj/w": (n_embd, n_embd),
        "attn/c_proj/b": (n_embd,),
        "ln_2/g": (n_embd,),
        "ln_2/b": (n_embd,),
        "mlp/c_fc/w": (n_embd, 4 * n_embd),
        "mlp/c_fc/b": (4 * n_embd,),
        "mlp/c_proj/w": (4 * n_embd, n_embd),
        "mlp/c_proj/b": (n_embd,),
    }
    blocks = {("blocks", i, *name.split("/")): shape for i in range(n_layer) for name, shape in block.items()}
    norm = {("ln_f", "g"): (n_embd,), ("ln_f", "b"): (n_embd,)}
    return {("wte",): (n_vocab, n_embd), ("wpe",): (n_ctx, n_embd), **blocks, **norm}


def llama_shapes(config):
    """{path: shape} of all parameters of a LLaMA; variants/llama.py says what the sizes in `config` are. There are no
    biases. Without "lm_head" (config["tied"]), wte serves at the output too."""
    n_vocab, n_embd, n_ffn = config["n_vocab"], config["n_embd"], config["n_ffn"]
    n_query, n_key = config["n_head"] * config["d_head"], config["n_head_kv"] * config["d_head"]
    block = {
        "ln_1/g": (n_embd,),
        "attn/c_q/w": (n_embd, n_query),
        "attn/c_k/w": (n_embd, n_key),
        "attn/c_v/w": (n_embd, n_key),
        "attn/c_proj/w": (n_query, n_embd),
        "ln_2/g": (n_embd,),
        "mlp/c_gate/w": (n_embd, n_ffn),
        "mlp/c_up/w": (n_embd, n_ffn),
        "mlp/c_down/w": (n_ffn, n_embd),
    }
    blocks = {("blocks", i, *name.split("/")): shape for i in range(config["n_layer"]) for name, shape in block.items()}
    head = {} if config["tied"] else {("lm_head",): (n_vocab, n_embd)}
    return {("wte",): (n_vocab, n_embd), **blocks, ("ln_f", "g"): (n_embd,), **head}


def architecture(hparams):
    """The name of the architecture that has these hyperparameters. Those of a LLaMA have a number of key/value heads,
    those of a GPT-2 do not."""
    return "llama" if "n_head_kv" in hparams else "gpt2"


def shapes_of(hparams):
    """{path: shape} of all parameters of a model, whichever its architecture."""
    return llama_shapes(hparams) if architecture(hparams) == "llama" else param_shapes(**hparams)


def check_hparams(file, found, names=None):
    """The five sizes of a GPT-2 in `found`, the object read from `file`, where some may have other `names`. Raises
    OSError unless each is a whole number above 0 that a model can have."""
    names = {name: name for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")} | (names or {})
    hparams = check_sizes(file, found, names)
    if hparams["n_embd"] % hparams["n_head"]:
        raise OSError(f"{file}: n_embd {hparams['n_embd']} cannot be shared among n_head {hparams['n_head']} heads")
    return hparams


def check_sizes(file, found, names):
    """{name: found[its name in the file]} for {name: name in the file}. Raises OSError as above."""
    sizes = {name: found.get(theirs) for name, theirs in names.items()}
    for name, value in sizes.items():
        limit = 1000 if name == "n_layer" else 2**24  # far above any model, far below what would make the loader hang
        if type(value) is not int or not 1 <= value <= limit:
            raise OSError(f"{file}: {names[name]} must be a whole number from 1 to {limit}, not {value!r:.40}")
    return sizes


def require(file, found, supported, model):
    """Raises OSError if an entry of `found`, the object read from `file`, is not one of the values in `supported`,
    {name: values that the model has}; the first one is the default."""
    for name, values in supported.items():
        if (value := found.get(name, values[0])) not in values:
            raise OSError(f"{file}: {name} is {value!r:.60}, {model}'s is {values[0]!r}: no other is computed here")


def not_finite(params):
    """The names of the tensors with numbers that are NaN or infinite, as text; "" if all are finite."""
    leaves = flatten(params).items()
    names = [".".join(map(str, path)) for path, array in leaves if not np.isfinite(np.asarray(array)).all()]
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"


def why_not_finite(params, dtype):
    """Why a model computes NaN or infinity, as text."""
    names = not_finite(params)
    return f"NaN or infinity in {names}" if names else f"{dtype} overflows: try --dtype float64"


# ---- Trees ----


def tree_map(f, *trees):
    """A tree of the same structure as each of `trees`, with f(one leaf of each) as its leaves."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: tree_map(f, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, (list, tuple)):
        make = getattr(first, "_make", type(first))  # a NamedTuple takes its parts one by one
        return make([tree_map(f, *parts) for parts in zip(*trees, strict=True)])
    return f(*trees)


def flatten(tree, path=()):
    """{path: leaf}, in the order of the tree."""
    if not isinstance(tree, (dict, list, tuple)):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {place: leaf for key, part in items for place, leaf in flatten(part, (*path, key)).items()}


def unflatten(leaves):
    """The tree of {path: leaf}: dicts where the keys are strings, lists where they are 0, 1, 2, ..."""
    if () in leaves:
        return leaves[()]
    parts = {}
    for (key, *rest), leaf in leaves.items():
        parts.setdefault(key, {})[tuple(rest)] = leaf
    parts = {key: unflatten(part) for key, part in parts.items()}
    return [parts[i] for i in range(len(parts))] if 0 in parts else parts


def leaf_name(path):
    """("blocks", 0, "ln_1", "g") -> "blocks.0.ln_1.g" """
    return ".".join(map(str, path))


def named_leaves(tree):
    """{"blocks.0.ln_1.g": leaf, ...}: the tree as one dict, from which leaves are chosen by their names."""
    return {leaf_name(path): leaf for path, leaf in flatten(tree).items()}


def from_names(leaves):
    """The inverse of named_leaves, for a tree of dicts and lists."""
    return unflatten({tuple(int(k) if k.isdigit() else k for k in name.split(".")): x for name, x in leaves.items()})


def matching(pattern, names):
    """The names that the regular expression `pattern` is found in. Raises ValueError if it is none."""
    try:
        return [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


def replace_leaves(f, tree):
    """Replaces each leaf of a tree of dicts and lists by f(path, leaf), in place: each old leaf is released before the
    next new one is made, so memory never holds the tree twice. Returns the tree."""
    leaves = flatten(tree)
    for path in [*leaves]:
        parent = functools.reduce(operator.getitem, path[:-1], tree)
        parent[path[-1]] = f(path, leaves.pop(path))
    return tree


# ---- Dtypes ----

DTYPES = ("float32", "bfloat16", "float64")


def empty(shape, dtype):
    """numpy.empty, in memory that begins at a multiple of 64 bytes. JAX uses such an array as it is on a CPU; of any
    other it makes a copy."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n_bytes].view(dtype).reshape(shape)


def cast(params, dtype):
    """params in one of DTYPES; arrays that have it already are not copied. Raises ValueError for any other dtype."""
    dtype = find_dtype(dtype)
    return tree_map(lambda array: array.astype(dtype, copy=False), params)


def find_dtype(name):
    """What NumPy calls one of DTYPES. Raises ValueError for any other name, or if bfloat16's package is missing."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose {', '.join(DTYPES)}")
    if name != "bfloat16":
        return name
    try:
        from ml_dtypes import bfloat16  # NumPy itself has no such dtype
    except ModuleNotFoundError:
        raise ValueError("bfloat16 needs ml_dtypes: python3 -m pip install ml_dtypes") from None
    return bfloat16


# ---- From the tensors of a file to params ----


def assemble(file, shapes, found, name_of, read):
    """The params that `shapes`, {path: shape}, describes, each leaf read(name_of(its path)).

    `found` is {name: shape} of the tensors in `file`. Raises OSError, before anything is read, with the names that are
    missing, that have another shape, or that the model does not have.
    """
    expected = {name_of(path): shape for path, shape in shapes.items()}
    wrong = [f"{name} is missing" for name in expected if name not in found]
    for name, shape in found.items():
        if name not in expected:
            wrong.append(f"{name} has no place in a model of these hyperparameters")
        elif tuple(shape) not in (expected[name], (1, *expected[name])):  # OpenAI stores each w as [1, n_in, n_out]
            wrong.append(f"{name} is {list(shape)}, by the hyperparameters {list(expected[name])}")
    if wrong:
        raise OSError(f"{file}: {'; '.join(wrong[:3])}{f' (and {len(wrong) - 3} more)' if len(wrong) > 3 else ''}")
    return unflatten({path: read(name_of(path)).reshape(shape) for path, shape in shapes.items()})
