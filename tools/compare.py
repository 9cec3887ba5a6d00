"""Is this checkout slower than another one? Both are measured in turn, so a slow minute of the machine affects both.

    git worktree add ../before HEAD~1
    python -m tools.compare ../before

For each backend, a process of each checkout holds the same model, with random weights (the workers of tools/bench.py,
each from its own folder). In each round both do each task once, and the order changes from round to round. The ratio of
the two times is taken within the round. Its median is printed with a 95% interval.

The interval is the exact one of the median, from the binomial distribution (Conover 1999, "Practical Nonparametric
Statistics", section 3.2): each ratio is above the true median with probability 1/2, whatever the noise is like, so the
true median lies between the k-th smallest and the k-th largest ratio unless fewer than k of them are on one side of it.
Unlike a bootstrap it assumes nothing about the noise, and gives the same answer each time.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import contextlib
import itertools
import math
import statistics
import sys
import tempfile
from pathlib import Path

import cli
from backends import NAMES
from tools import bench

SLOWER = 0.97  # a checkout is slower at a task if the whole interval of the ratio is below this
N_SETTLING = 2  # rounds that do not count: JAX compiles in them, and NumPy lays out its matrices
TASKS = ("decode", "batch", "prefill", "cold")


# fmt: off
def main(other: str = "", *, rounds: int = 31, tasks: str = "decode,batch,prefill,cold", backends: str = "numpy,jax",
         size: str = "124M"):
    # fmt: on
    """Compares the speed of this checkout with that of another. Exit status 1 if this one is slower at anything.

    Args:
        other: the folder of the other checkout, for example a git worktree of an earlier commit
        rounds: how often each checkout does each task, 6 or more
        tasks: with commas, of decode, batch, prefill and cold (from the start of a process to its first token)
        backends: with commas, of numpy and jax
        size: 3M, 124M, 355M, 774M or 1558M, with random weights
    """
    check(other, rounds, tasks, backends, size)
    slower, roots = [], {"this": bench.ROOT, "other": Path(other).resolve()}
    cli.unwind_on_ctrl_c()  # the temporary folder is to be removed
    with tempfile.TemporaryDirectory() as folder:
        bench.save_random_model(folder, bench.HPARAMS[size])
        print(f"{size}, {rounds} rounds; {bench.machine()}\nspeed of this checkout / speed of {roots['other']}")
        for backend in backends.split(","):
            for task, times in measure(roots, backend, folder, tasks.split(","), rounds, size).items():
                line, is_slower = report(times)
                print(f"{backend:6} {task:8} {line}", flush=True)
                slower += [f"{backend} {task}"] * is_slower
    if slower:
        print(f"slower: {', '.join(slower)}")
        sys.exit(1)


def check(other, rounds, tasks, backends, size):
    """Raises ValueError for what cannot be compared."""
    if not other or not (Path(other) / "tools" / "bench.py").is_file():
        raise ValueError(f"{other!r} is no checkout of this project: name a folder that has a tools/bench.py")
    if rounds < 6:
        raise ValueError(f"--rounds {rounds} is out of range: a 95% interval needs 6 or more")
    for flag, text, known in (("tasks", tasks, TASKS), ("backends", backends, NAMES), ("size", size, bench.HPARAMS)):
        for name in text.split(","):
            if name not in known:
                raise ValueError(f"--{flag} {name!r}: choose from {', '.join(known)}")


def measure(roots, backend, folder, tasks, rounds, size):
    """{task: {"this": [seconds of each round], "other": [the same]}}; the order changes from round to round."""
    times = {task: {name: [] for name in roots} for task in tasks}
    arguments = {"decode": 10, "batch": 16, "prefill": bench.HPARAMS[size]["n_ctx"] // 2}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(bench.Worker(backend, folder, root=root)) for name, root in roots.items()}
        for i, task in itertools.product(range(N_SETTLING + rounds), tasks):
            for name in sorted(workers, reverse=i % 2):
                if task == "cold":
                    times[task][name].append(bench.cold_start(folder, backend, roots[name]))
                else:
                    times[task][name].append(workers[name].ask(task, arguments[task]))
    return {task: {name: seconds[N_SETTLING:] for name, seconds in sides.items()} for task, sides in times.items()}


def report(times):
    """(a line that says how fast this checkout is beside the other, whether it is slower)."""
    ratios = [other / this for this, other in zip(times["this"], times["other"], strict=True)]
    low, high = median_interval(ratios)
    seconds = ", ".join(f"{name} {statistics.median(times[name]):.4f} s" for name in times)
    line = f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}; {seconds})"
    return line + " SLOWER" * (high < SLOWER), high < SLOWER


def median_interval(values, confidence=0.95):
    """(low, high): the exact interval for the median of which `values`, 6 or more, are a sample."""
    n, k = len(values), 0
    while 2 * sum(math.comb(n, i) for i in range(k + 1)) <= (1 - confidence) * 2**n:
        k += 1
    return sorted(values)[k - 1], sorted(values)[n - k]


if __name__ == "__main__":
    cli.run(main, "-m tools.compare")
