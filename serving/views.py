"""What the page shows of one prompt, as JSON: the recorded lines, and what follows from them.

    found = walkthrough(tokenizer, params, n_head, ids, text, block=0)

Large arrays are reduced: of a long axis some entries are shown, as they are, and `shown` says which. Nothing is
averaged, so each number on the page is a number of the computation, rounded to DIGITS.
"""

import functools
import itertools
import re
from pathlib import Path

import numpy

import gpt2
from encoder import replace_lone_surrogates, spell
from inference.trace import spell as visible
from serving.cost import count
from serving.record import RETURNED, record, source

DIGITS = 5
MAX_TOKENS = 64  # of a prompt: more rows and columns than that nobody can read
MAX_COLUMNS, MAX_ROWS = 64, 32  # of what is not a token
N_CANDIDATES = 5
TUTORIAL = Path(gpt2.__file__).parent / "docs" / "tutorial.md"


def walkthrough(tokenizer, params, n_head, ids, text, block=0):
    """All that the page shows of a prompt but the broken models."""
    recording = record(gpt2, lambda: gpt2.generate(ids, params, n_head, 1), block)
    logits = one(recording, "gpt2", RETURNED)
    stream = [value for name, value in values_of(recording, "gpt2") if name == "x"]  # after embed and each block
    costs = count(gpt2, lambda params: gpt2.gpt2(ids, **params, n_head=n_head), params)
    return {
        "ids": ids,
        "tokens": [show(tokenizer, i) for i in ids],
        "sizes": sizes(params, n_head) | {"n_seq": len(ids)},
        "dtype": str(params["wte"].dtype),
        "block": block,
        "source": source_lines(gpt2.__file__),
        "calls": [call._asdict() for call in recording.calls],
        **records(recording, sizes(params, n_head), ids),
        "stages": stages(tokenizer, params, stream),
        "norms": rounded(numpy.array([numpy.linalg.norm(x, axis=-1) for x in stream])),
        "losses": losses(tokenizer, logits, ids),
        "pieces": pieces(tokenizer, text),
        "last": last_logits(tokenizer, logits[-1]),
        "cost": [{"line": line} | cost._asdict() for line, cost in sorted(costs.items())],
    }


def values_of(recording, function):
    """Yields (name, value) of all records of a function, but its arguments."""
    for entry in recording.records:
        if recording.calls[entry.call].function == function and entry.line != source(gpt2.__file__).functions[function]:
            yield from entry.values.items()


def one(recording, function, name):
    return next(value for found, value in values_of(recording, function) if found == name)


def sizes(params, n_head):
    (n_vocab, n_embd), n_ctx = params["wte"].shape, len(params["wpe"])
    found = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head}
    return found | {"n_layer": len(params["blocks"]), "d_head": n_embd // n_head}


def show(tokenizer, i):
    """The text of a token on one line, with visible white space."""
    return visible(tokenizer.decode([i])) if i in tokenizer.spellings else f"id {i}"


# ---- The source ----


@functools.cache
def source_lines(file):
    """The lines of a file, with the reason for each statement and the section of the tutorial that quotes it."""
    found, sections = source(file), quoted_in_tutorial()
    lines = []
    for number, text in enumerate(found.lines, 1):
        is_code = number in found.statements or number in found.functions.values()
        section = sections.get(code_of(text)) if is_code else None
        lines.append({"text": text, "why": found.why(number) if is_code else "", "section": section or ""})
    return {"file": Path(file).name, "lines": lines, "functions": found.functions}


@functools.cache
def quoted_in_tutorial():
    """{line of code: the title of the section of docs/tutorial.md that quotes it}."""
    title, found = "", {}
    for line in TUTORIAL.read_text(encoding="utf-8").splitlines() if TUTORIAL.exists() else ():
        title = line.strip("# ") if line.startswith("## ") else title
        if len(code_of(line)) > 12:
            found.setdefault(code_of(line), title)
    return found


def code_of(line):
    return line.partition("  # ")[0].strip()


# ---- Records and arrays ----


def records(recording, sizes, ids):
    """{"arrays", "records"}: an array that several records have is there once."""
    arrays, places = [], {}

    def encode(value, *where):
        if isinstance(value, (dict, list, tuple)) and not (isinstance(value, list) and all_whole(value)):
            return {"tree": [*leaves(value)]}
        if not isinstance(value, (numpy.ndarray, list)) or len(value) == 0:
            return {"text": repr(value)}
        if id(value) not in places:
            places[id(value)] = len(arrays)
            arrays.append(reduced(numpy.asarray(value), *where, sizes, ids) | {"is_list": isinstance(value, list)})
        return {"array": places[id(value)]}

    lines = source(gpt2.__file__).lines
    found = []
    for entry in recording.records:
        function = recording.calls[entry.call].function
        values = {n: encode(v, n, function, lines[entry.line - 1]) for n, v in entry.values.items()}
        found.append({"line": entry.line, "call": entry.call, "values": values})
    return {"arrays": arrays, "records": found}


def all_whole(value):
    return all(type(i) is int for i in value)


def leaves(tree, path=""):
    """Yields [name, shape] of the arrays in a tree."""
    for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(part, (dict, list, tuple)):
            yield from leaves(part, f"{path}{key}.")
        else:
            yield [f"{path}{key}", [*numpy.shape(part)]]


def reduced(array, name, function, line, sizes, ids):
    """An array as JSON: shape, dtype, names of the axes, which entries of each axis are shown (None: all), values."""
    axes = axis_names(array.shape, name, function, line, sizes)
    shown = [which(axis, n, place == array.ndim - 1, array, ids) for place, (axis, n) in enumerate(zip(axes, array.shape))]
    part = array
    for place, entries in enumerate(shown):
        part = part if entries is None else numpy.take(part, entries, axis=place)
    return {
        "shape": [*array.shape],
        "dtype": str(array.dtype),
        "axes": axes,
        "shown": shown,
        "values": rounded(part),
    }


def which(axis, n, is_last, array, ids):
    """The entries of an axis of length n that are shown: all (None), the likeliest tokens, the prompt's, or every
    second, third ..."""
    if axis == "n_vocab":
        best = numpy.argsort(-array.reshape(-1, n)[-1], kind="stable")[:MAX_COLUMNS] if is_last else dict.fromkeys(ids)
        return [int(i) for i in best]
    if axis == "n_ctx":
        return [*range(len(ids))]
    limit = MAX_COLUMNS if is_last else MAX_ROWS
    if axis in ("n_seq", "n_query", "n_key", "n_head") or n <= limit:
        return None
    return [*range(0, n, -(-n // limit))]


def axis_names(shape, name, function, line, sizes):
    """The name of each axis, as the comments of gpt2.py write it: from the comment at the end of the line, else by the
    name and the shape of the array."""
    if name == "mask":
        return ["n_query", "n_key"]
    if arrow := re.search(r"->[^\[]*\[([^\]]*)\]$", line) if "def " not in line else None:
        named = [part.strip() for part in arrow[1].split(",")]
        if named[-1] == "n_out":
            named[-1] = width_names(sizes).get(shape[-1], "n_out")
        if named[0] == "...":
            named = [*(["n_head", "n_seq"] if len(shape) == 3 else ["n_seq"])[: len(shape) - len(named) + 1], *named[1:]]
        if len(named) == len(shape):
            return named
    width = width_names(sizes)
    last = width.get(shape[-1], "") if shape else ""
    if len(shape) == 3:
        is_pairs = function == "softmax" or (function == "attention" and name == "weights")
        return ["n_head", "n_query", "n_key"] if is_pairs else ["n_head", "n_seq", "d_head"]
    if len(shape) == 2:
        return [{"w": width.get(shape[0], ""), "wte": "n_vocab", "wpe": "n_ctx"}.get(name, "n_seq"), last]
    return ["n_seq" if name in ("inputs", "ids", RETURNED, "bad") else last][: len(shape)]


def width_names(sizes):
    """{length of an axis: its name}; of two names with the same length the later one."""
    d = sizes["n_embd"]
    names = {"d_head": sizes["d_head"], "3*n_embd": 3 * d, "4*n_embd": 4 * d, "n_embd": d, "n_vocab": sizes["n_vocab"]}
    return {n: name for name, n in names.items()} | {1: "1"}


def rounded(array, digits=DIGITS):
    """Nested lists of numbers with so many significant digits; None for what is not finite."""
    if array.dtype.kind in "biu":
        return array.astype(int).tolist()
    flat = [float(f"{v:.{digits}g}") for v in array.astype(numpy.float64).ravel().tolist()]
    flat = flat if numpy.isfinite(array).all() else [v if abs(v) < float("inf") else None for v in flat]
    for n in reversed(array.shape[1:]):
        flat = [flat[i : i + n] for i in range(0, len(flat), n)]
    return flat


# ---- What follows from the recording ----


def candidates(tokenizer, logits, n=N_CANDIDATES):
    """The n likeliest tokens after a row of logits: [{id, token, probability}]."""
    probabilities = gpt2.softmax(logits.astype(numpy.float64))
    best = numpy.argsort(-logits, kind="stable")[:n]
    return [
        {"id": int(i), "token": show(tokenizer, int(i)), "probability": none_if_odd(probabilities[i])} for i in best
    ]


def none_if_odd(number):
    return float(f"{number:.{DIGITS}g}") if numpy.isfinite(number) else None


def stages(tokenizer, params, stream):
    """The logit lens: for the residual stream after the embedding and after each block, what the last layer norm and
    the unembedding would make of it: the candidates of each position, as if the model stopped there."""
    found = []
    for x in stream:
        logits = gpt2.unembed(gpt2.layer_norm(x, **params["ln_f"]), params["wte"])
        found.append([candidates(tokenizer, row, 3 if i < len(x) - 1 else N_CANDIDATES) for i, row in enumerate(logits)])
    return found


def losses(tokenizer, logits, ids):
    """For each token of the prompt but the first: the probability that the model gave it, its rank, its loss in nats,
    and what the model would have preferred."""
    found = []
    for row, i in zip(logits, ids[1:]):
        probability = gpt2.softmax(row.astype(numpy.float64))[i]
        with numpy.errstate(divide="ignore"):
            loss = none_if_odd(-numpy.log(probability))
        rank = int((row > row[i]).sum()) + 1
        found.append({"probability": none_if_odd(probability), "loss": loss, "rank": rank,
                      "candidates": candidates(tokenizer, row, 3)})  # fmt: skip
    return found


def last_logits(tokenizer, logits):
    """All logits of the last position, in the order of ids, and the texts of the likeliest 256."""
    best = numpy.argsort(-logits, kind="stable")[:256]
    return {"logits": rounded(logits, 9), "texts": {int(i): show(tokenizer, int(i)) for i in best}}


def pieces(tokenizer, text):
    """How the text became tokens: for each piece its bytes, and the symbols after each merge."""
    found = []
    for piece in tokenizer.split(replace_lone_surrogates(text)):
        steps = [[*spell(piece)], *itertools.islice(merges(spell(piece), tokenizer.ranks), 200)]
        found.append({"text": visible(piece), "bytes": [*piece.encode()], "steps": steps,
                      "ids": tokenizer.encode(piece)})  # fmt: skip
    return found


def merges(spelled, ranks):
    """Yields the symbols after each merge, as encoder.merge makes them: the lowest rank first, and of equal ones the
    leftmost."""
    symbols = [*spelled]
    while found := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]:
        _, i = min(found)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        yield [*symbols]
