"""A recording as JSON: which arrays there are, what their axes mean, and their numbers.

Large arrays are reduced: of a long axis some entries are shown, as they are, and `shown` says which. Nothing is
averaged, so each number on the page is a number of the computation, rounded to DIGITS.
"""

import re

import numpy

from serving.record import RETURNED

DIGITS = 6
MAX_COLUMNS, MAX_ROWS = 64, 32  # of an axis that is not one of tokens or heads


def records(recording, lines, sizes, ids):
    """{"arrays": [...], "records": [...]} for the page; an array that several records have is there once. `lines` is
    the source, `sizes` the model's, ids the prompt's."""
    arrays, places = [], {}

    def encode(value, name, line):
        is_ids = isinstance(value, list) and all(type(i) is int for i in value)
        if isinstance(value, (dict, list, tuple)) and not is_ids:
            return {"tree": [*leaves(value)]}
        if not isinstance(value, (numpy.ndarray, list)) or len(value) == 0:
            return {"text": repr(value)}
        if id(value) not in places:
            places[id(value)] = len(arrays)
            axes = axis_names(numpy.shape(value), name, lines[line - 1], sizes)
            arrays.append(reduced(numpy.asarray(value), axes, ids) | {"is_list": is_ids})
        return {"array": places[id(value)]}

    found = []
    for line, call, values in recording.records:
        encoded = {name: encode(value, name, line) for name, value in values.items()}
        found.append({"line": line, "call": call, "values": encoded})
    return {"arrays": arrays, "records": found}


def leaves(tree, path=""):
    """Yields [name, shape] of the arrays in a tree."""
    for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(part, (dict, list, tuple)):
            yield from leaves(part, f"{path}{key}.")
        else:
            yield [f"{path}{key}", [*numpy.shape(part)]]


# ---- What is shown of an array ----


def reduced(array, axes, ids):
    """An array with named axes as JSON: shown has the entries of each axis that are shown (None: all)."""
    found = {"shape": [*array.shape], "dtype": str(array.dtype), "axes": axes, "shown": []}
    part = array
    for place, axis in enumerate(axes):
        entries = which(array, place, axis, ids)
        found["shown"].append(entries)
        part = part if entries is None else numpy.take(part, entries, axis=place)
    return found | {"values": rounded(part)}


def which(array, place, axis, ids):
    """The entries of an axis that are shown: all (None), the likeliest tokens, the prompt's, or every second, third,
    ..."""
    n, is_last = array.shape[place], place == array.ndim - 1
    if axis == "n_vocab":
        best = numpy.argsort(-array.reshape(-1, n)[-1], kind="stable")[:MAX_COLUMNS] if is_last else dict.fromkeys(ids)
        return [int(i) for i in best]
    if axis == "n_ctx":
        return [*range(len(ids))]
    limit = MAX_COLUMNS if is_last else MAX_ROWS
    if axis in ("n_seq", "n_query", "n_key", "n_head") or n <= limit:
        return None
    return [*range(0, n, -(-n // limit))]


def rounded(array, digits=DIGITS):
    """Nested lists of numbers with so many significant digits; None for what is not finite."""
    if array.dtype.kind in "biu":
        return array.astype(int).tolist()
    flat = [finite(v, digits) for v in array.astype(numpy.float64).ravel().tolist()]
    for n in reversed(array.shape[1:]):
        flat = [flat[i : i + n] for i in range(0, len(flat), n)]
    return flat


def finite(number, digits=DIGITS):
    """A number with so many significant digits, or None, as JSON has neither NaN nor infinity."""
    return float(f"{number:.{digits}g}") if abs(number) < float("inf") else None


# ---- What the axes mean ----


def axis_names(shape, name, line, sizes):
    """The name of each axis, as the comments of gpt2.py write it: from the comment at the end of the line, else by the
    name and the shape of the array."""
    if named := names_in_comment(line, shape, sizes):
        return named
    widths = width_names(sizes)
    last = widths.get(shape[-1], "")
    if name == "mask":
        return ["n_query", "n_key"]
    if len(shape) == 3:
        return ["n_head", "n_query", "n_key"]
    if len(shape) == 2:
        return [{"w": widths.get(shape[0], ""), "wte": "n_vocab", "wpe": "n_ctx"}.get(name, "n_seq"), last]
    return ["n_seq" if name in ("inputs", "ids", RETURNED) else last]


def names_in_comment(line, shape, sizes):
    """The axes behind the arrow of a comment such as `# [..., n_in] -> [..., n_out]`, if it is for this shape."""
    arrow = re.search(r"->[^\[]*\[([^\]]*)\]$", line)
    if not arrow or line.startswith("def "):
        return None
    named = arrow[1].split(", ")
    if named[0] == "...":
        named = (["n_head", "n_seq"] if len(shape) == 3 else ["n_seq"])[: len(shape) - len(named) + 1] + named[1:]
    named = [
        width_names(sizes).get(n, axis) if axis == "n_out" else axis for axis, n in zip(named, shape, strict=False)
    ]
    named = ["n_query", "n_key"] if named == ["n_seq", "n_seq"] else named
    return named if len(named) == len(shape) else None


def width_names(sizes):
    """{length of an axis: its name}; of two names for the same length the later one."""
    d = sizes["n_embd"]
    names = {"d_head": sizes["d_head"], "3*n_embd": 3 * d, "4*n_embd": 4 * d, "n_embd": d, "n_vocab": sizes["n_vocab"]}
    return {n: name for name, n in names.items()} | {1: "1"}
