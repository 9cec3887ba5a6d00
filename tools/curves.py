"""How cost grows: with the text, with the batch, with the model; measured, beside the arithmetic that predicts it.

    python -m tools.curves --plot curves.png

A token of one text needs every weight once, and the keys and values of all tokens before it: with a cache it takes

    (4 N + 8 n_layer n_embd n) bytes / B      N weights of 4 bytes each, n tokens before, B bytes a second from memory

Without a cache all n tokens go through the model again, each weight multiplied and added once for each of them:

    2 N n operations / F                      F operations a second

A batch of b texts reads the weights once for all, so it costs no more than one until the operations take longer:

    max(4 N bytes / B, 2 N b operations / F)

B and F are measured in the same rounds as all else: B by a sweep of x @ w over the weights, F by one large product.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import json as json_library
import statistics
import sys
import tempfile

import backends
import cli
from tools import bench

CONTEXTS, BATCHES = (10, 128, 256, 512, 990), (1, 2, 4, 8, 16, 32)
N_F = 256  # tokens whose operations F is measured by


def main(sizes: str = "124M,355M,774M,1558M", *, rounds: int = 5, json: bool = False, plot: str = ""):
    """Measures how tokens a second change with context, batch and model size, in float32, on each backend.

    Args:
        sizes: with commas, of 3M, 124M, 355M, 774M, 1558M; contexts and batches are measured on the first
        rounds: how often each is asked, 5 or more for a median to trust
        json: print one JSON object in place of the tables
        plot: a .png to draw the curves in
    """
    sizes = sizes.split(",")
    if unknown := [size for size in sizes if size not in bench.HPARAMS]:
        raise ValueError(f"unknown size {unknown[0]!r}: choose from {', '.join(bench.HPARAMS)}")
    if plot and not bench.installed("matplotlib"):
        raise ValueError("--plot needs matplotlib: python3 -m pip install matplotlib")
    if rounds < 1:
        raise ValueError(f"--rounds {rounds} is out of range: 1 or more")
    found = {"machine": bench.machine(), "rounds": rounds, "context": {}, "batch": {}, "size": {}}
    for size in sizes:
        measure_size(found, size, rounds, everything=size == sizes[0])
        print(end=".", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    print(json_library.dumps(found) if json else "\n".join(report(found, sizes[0])))
    if plot:
        draw(found, sizes[0], plot)


def measure_size(found, size, rounds, everything):
    """Adds a row for `size` to found, and if it is the one for `everything`, those for contexts and batches."""
    hparams, n_weights = bench.HPARAMS[size], bench.weight_bytes(bench.HPARAMS[size], "float32") // 4
    engines = [name for name in backends.NAMES if bench.installed(name)]
    cli.unwind_on_ctrl_c()  # the temporary folder is to be removed
    with tempfile.TemporaryDirectory() as folder:
        bench.save_random_model(folder, hparams)
        setup = {"dtype": "float32", "folder": folder}
        workers = {name: bench.Worker(name, setup) for name in ("limits", *engines, "picogpt-style")}
        for n in [n for n in CONTEXTS if everything and n + bench.N_DECODE < hparams["n_ctx"]]:
            seconds = ask(workers, [*engines, "picogpt-style"], "decode", n, rounds)
            found["context"][n] = rates(seconds, 1) | predicted(seconds, hparams, n_weights, n)
        for b in BATCHES if everything else ():
            seconds = ask(workers, engines, "batch", b, rounds)
            found["batch"][b] = rates(seconds, b) | {"predicted": b / max(seconds["B"], seconds["F"] * b / N_F)}
        seconds = ask(workers, [*engines, "picogpt-style"], "decode", 10, rounds)
        found["size"][size] = rates(seconds, 1) | predicted(seconds, hparams, n_weights, 10)
        for worker in workers.values():
            worker.close()


def ask(workers, engines, task, argument, rounds):
    """The median seconds of each engine for a task, and under "B" and "F" those of a sweep over the weights and of the
    operations for N_F tokens. All are asked in turn; two rounds are not counted, in which engines settle in."""
    times = {name: [] for name in (*engines, "B", "F")}
    for _ in range(2 + rounds):
        times["B"].append(workers["limits"].ask("decode", 1))
        times["F"].append(workers["limits"].ask("prefill", N_F))
        for name in engines:
            times[name].append(workers[name].ask(task, argument))
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def rates(seconds, n):
    """Seconds for n tokens by engine -> tokens a second by the name of a curve."""
    return {name.replace("picogpt-style", "uncached"): n / t for name, t in seconds.items() if name not in ("B", "F")}


def predicted(seconds, hparams, n_weights, n):
    """Tokens a second by the arithmetic above, for one text with n tokens before."""
    n_cached = 2 * hparams["n_layer"] * hparams["n_embd"] * n
    return {
        "cached, predicted": 1 / (seconds["B"] * (n_weights + n_cached) / n_weights),
        "uncached, predicted": 1 / max(seconds["F"] * n / N_F, seconds["B"]),
    }


def report(found, first):
    yield f"float32, medians of {found['rounds']} rounds; {found['machine']}"
    for title, head in (("context", f"{first}, tokens before"), ("batch", f"{first}, batch of"), ("size", "model")):
        curves = list(next(iter(found[title].values()))) if found[title] else []
        yield ""
        yield f"| tokens/s: {head} | {' | '.join(curves)} |"
        yield "| --- |" + " --- |" * len(curves)
        for value, row in found[title].items():
            yield f"| {value} | {' | '.join(f'{row[curve]:.1f}' for curve in curves)} |"


def draw(found, first, path):
    """Three pictures side by side: solid lines are measured, dashed ones predicted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"numpy": "#4477aa", "jax": "#ee6677", "uncached": "#999999", "cached, predicted": "black"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (title, head) in zip(axes, (("context", "tokens before"), ("batch", "texts at once"), ("size", "model")),
                                   strict=True):  # fmt: skip
        for curve in next(iter(found[title].values())):
            style = {"ls": "--", "lw": 1} if "predicted" in curve else {"marker": "o"}
            color = colors.get(curve, "#bbbbbb" if "uncached" in curve else "black")
            axis.plot([str(value) for value in found[title]], [row[curve] for row in found[title].values()],
                      label=curve, color=color, **style)  # fmt: skip
        axis.set(xlabel=head, ylabel="tokens/s", yscale="log", title="" if title == "size" else first)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:g}"[0] in "25" else "")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    cli.run(main, "-m tools.curves")
