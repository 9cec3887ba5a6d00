"""What the page shows of one prompt, as JSON: the recorded lines, and what follows from them.

    found = walkthrough(tokenizer, params, n_head, ids, text, block=0)

The recorded lines come from record.py and arrays.py, the costs from cost.py. The rest is computed here, from the
recorded residual stream and logits, with the functions of gpt2.py.
"""

import functools
import itertools
from pathlib import Path

import numpy

import gpt2
from encoder import replace_lone_surrogates, spell
from inference.trace import spell as visible
from serving.arrays import finite, records, rounded
from serving.cost import count
from serving.record import RETURNED, record, source

MAX_TOKENS = 64  # of a prompt: more rows and columns than that nobody can read
N_CANDIDATES = 3
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
        **records(recording, source(gpt2.__file__).lines, sizes(params, n_head), ids),
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


# ---- What follows from the recording ----


def candidates(tokenizer, logits, n=N_CANDIDATES):
    """The n likeliest tokens after a row of logits: [{id, token, probability}]."""
    probabilities = gpt2.softmax(logits.astype(numpy.float64))
    best = likeliest(logits, n)
    return [{"id": int(i), "token": show(tokenizer, int(i)), "probability": finite(probabilities[i])} for i in best]


def likeliest(logits, n):
    """The ids of the n largest logits, the largest first; of equal ones the lower id first."""
    n = min(n, len(logits))
    kept = numpy.flatnonzero(logits >= numpy.partition(logits, -n)[-n])
    return kept[numpy.argsort(-logits[kept], kind="stable")][:n]


def stages(tokenizer, params, stream):
    """The logit lens: for the residual stream after the embedding and after each block, what the last layer norm and
    the unembedding would make of it: the candidates of each position, as if the model stopped there."""
    found = []
    for x in stream:
        logits = gpt2.unembed(gpt2.layer_norm(x, **params["ln_f"]), params["wte"])
        found.append([candidates(tokenizer, row) for row in logits])
    return found


def losses(tokenizer, logits, ids):
    """For each token of the prompt but the first: the probability that the model gave it, its rank, its loss in nats,
    and what the model would have preferred."""
    found = []
    for row, i in zip(logits[:-1], ids[1:], strict=True):
        probability = gpt2.softmax(row.astype(numpy.float64))[i]
        with numpy.errstate(divide="ignore"):
            loss = finite(-numpy.log(probability))
        rank = int((row > row[i]).sum()) + 1
        found.append({"probability": finite(probability), "loss": loss, "rank": rank,
                      "candidates": candidates(tokenizer, row, 3)})  # fmt: skip
    return found


def last_logits(tokenizer, logits):
    """All logits of the last position, in the order of ids, and the texts of the likeliest 256."""
    best = likeliest(logits, 256)
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
