"""How tokens per second change with the text, the batch and the model: measured, beside what arithmetic predicts.

    python -m tools.curves --plot curves.png

A token of one sequence needs each weight once, and the keys and values of all tokens before it. With a cache it takes

    (4 N + 8 n_layer n_embd n) bytes / B      N weights of 4 bytes each, n tokens before, B bytes per second from memory

Without a cache all n tokens go through the model again, and each weight is multiplied and added once for each of them:

    2 N n operations / F                      F operations per second

A batch of b sequences reads the weights once for all of them, so it takes no longer than one sequence until the
operations take longer than the reading:

    max(4 N bytes / B, 2 N b operations / F)

B and F are measured in the same rounds as the engines: B by one product of a row with every matrix, F by one large
product (tools/engines.py, Limits).
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import sys
from json import dumps

import backends
import cli
from tools import bench
from tools.engines import N_DECODE, installed
from tools.tables import draw, markdown

CONTEXTS, BATCHES = (10, 128, 256, 512, 990), (1, 2, 4, 8, 16, 32)
N_F = 256  # the tokens whose operations F is measured by


def main(sizes: str = "124M,355M,774M,1558M", *, rounds: int = 5, json: bool = False, plot: str = ""):
    """Measures how tokens per second change with context, batch and model size, in float32, on each backend.

    Args:
        sizes: separated by commas, of 3M, 124M, 355M, 774M, 1558M; contexts and batches are measured on the first
        rounds: how many times each is measured; take 5 or more for a reliable median
        json: print one JSON object instead of the tables
        plot: a .png file for a picture of the curves
    """
    names = sizes.split(",")
    if unknown := [size for size in names if size not in bench.HPARAMS]:
        raise ValueError(f"unknown size {unknown[0]!r}: choose from {', '.join(bench.HPARAMS)}")
    bench.check(rounds, plot)
    tables = {"context": {}, "batch": {}, "size": {}}
    for size in names:
        for title, row, rates in measure(size, rounds, size_alone=size != names[0]):
            tables[title][row] = rates
    print(file=sys.stderr)
    heads = {"context": f"{names[0]}, tokens before", "batch": f"{names[0]}, batch of", "size": "model"}
    found = {"machine": bench.machine(), "rounds": rounds} | tables
    print(dumps(found) if json else "\n".join(report(found, heads)))
    if plot:
        draw(plot, {head: tables[title] for title, head in heads.items()})


def measure(size, rounds, size_alone):
    """Yields (the name of a table, its row, {curve: tokens per second}) for one size of model."""
    hparams, n_weights = bench.HPARAMS[size], bench.weight_bytes(bench.HPARAMS[size], "float32") // 4
    tasks = {("size", size): ("decode", 10, 1), "F": ("one_product", N_F, N_F)}
    if not size_alone:
        tasks |= {("context", n): ("decode", n, 1) for n in CONTEXTS if n + N_DECODE < hparams["n_ctx"]}
        tasks |= {("batch", b): ("batch", b, b) for b in BATCHES}
    with bench.start(["limits", *filter(installed, backends.NAMES), "picogpt-style"], hparams) as (_, workers):
        rates, _, _ = bench.measure(workers, tasks, rounds)
    seconds = {"F": N_F / rates.pop("F")["limits"]["median"]}
    for (title, row), engines in rates.items():
        _, n, n_tokens = tasks[title, row]
        curves = {name.replace("picogpt-style", "uncached"): r["median"] for name, r in engines.items()}
        seconds["B"] = n_tokens / curves.pop("limits")
        if title == "batch":
            curves["predicted"] = n / max(seconds["B"], seconds["F"] * n / N_F)
        else:
            curves |= predicted(seconds, hparams, n_weights, n)
        yield title, row, curves


def predicted(seconds, hparams, n_weights, n):
    """Tokens per second by the arithmetic above, for one sequence with n tokens before."""
    n_cached = 2 * hparams["n_layer"] * hparams["n_embd"] * n
    return {
        "cached, predicted": 1 / (seconds["B"] * (n_weights + n_cached) / n_weights),
        "uncached, predicted": 1 / max(seconds["F"] * n / N_F, seconds["B"]),
    }


def report(found, heads):
    """The lines that are printed without --json."""
    yield f"float32, medians of {found['rounds']} rounds; {found['machine']}"
    for title, head in heads.items():
        yield ""
        rows = {name: {curve: f"{rate:.1f}" for curve, rate in row.items()} for name, row in found[title].items()}
        yield from markdown(f"tokens/s: {head}", rows)


if __name__ == "__main__":
    cli.run(main, "-m tools.curves")
