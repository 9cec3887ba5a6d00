"""Tokens per second, beside the limit of the machine and beside other programs, all measured in one run.

    python -m tools.bench                                       random weights of the size of 124M, nothing downloaded
    python -m tools.bench --against transformers,ctranslate2    beside peers, if they are installed

Each engine (tools/engines.py) has a process of its own, as the thread pools of several in one process slow each other
down. They are asked in turn, round after round, so a slow minute of the machine affects all of them. The tables show
the medians of the rounds.

The limits are measured in the same rounds. A token of one sequence needs each weight once, so the least it can take is
one product of a row with every matrix. A prompt of 512 tokens needs as many multiplications as one large product.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import contextlib
import itertools
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from json import dumps, loads
from pathlib import Path

import numpy as np

import backends
import cli
import utils
from encoder import END_OF_TEXT, SPELL
from tools.engines import ENGINES, N_DECODE, PEERS, installed
from tools.tables import draw, markdown
from training.step import init_params
from weights.params import cast, find_dtype, shapes_of
from weights.tokenizer import tokenizer_texts

ROOT = Path(__file__).resolve().parent.parent
OPENAI = {"n_vocab": 50257, "n_ctx": 1024}
HPARAMS = {
    "3M": {"n_vocab": 2048, "n_ctx": 256, "n_embd": 192, "n_head": 6, "n_layer": 6},
    "124M": OPENAI | {"n_embd": 768, "n_head": 12, "n_layer": 12},
    "355M": OPENAI | {"n_embd": 1024, "n_head": 16, "n_layer": 24},
    "774M": OPENAI | {"n_embd": 1280, "n_head": 20, "n_layer": 36},
    "1558M": OPENAI | {"n_embd": 1600, "n_head": 25, "n_layer": 48},
}
TASKS = {  # name: (a method of the engines, its argument, the tokens that it computes in the time it returns)
    "decode, prompt 10": ("decode", 10, 1),
    "decode, prompt 512": ("decode", 512, 1),
    "decode, prompt 990": ("decode", 990, 1),
    "batch of 16, decode": ("batch", 16, 16),
    "prefill 512, all logits": ("prefill", 512, 512),
}

# ---- A model with random weights ----


def save_random_model(folder, hparams):
    """Writes a model folder with random weights, in OpenAI's layout. Its tokenizer has the bytes and pairs of bytes."""
    utils.save_model(folder, hparams, init_params(hparams, seed=0), ["tf"])
    merges = list(itertools.islice(itertools.product(SPELL.values(), repeat=2), hparams["n_vocab"] - len(SPELL) - 1))
    spellings = [*SPELL.values(), *map("".join, merges), END_OF_TEXT]
    encoder_json, vocab_bpe = tokenizer_texts({spelling: i for i, spelling in enumerate(spellings)}, merges)
    Path(folder, "encoder.json").write_text(encoder_json, encoding="utf-8")
    Path(folder, "vocab.bpe").write_text(vocab_bpe, encoding="utf-8")


def weight_bytes(hparams, dtype):
    return sum(map(math.prod, shapes_of(hparams).values())) * np.dtype(find_dtype(dtype)).itemsize


# ---- A process for each engine ----


class Worker:
    """An engine in a process of its own, which runs the checkout in the folder `root` and ends with a `with` block.
    Questions and answers are lines of JSON: [task, argument] and a number. The task "memory" asks for peak_memory."""

    def __init__(self, name, folder, dtype="float32", root=ROOT):
        setup = {"name": name, "dtype": dtype, "folder": folder}
        command = [sys.executable, "-m", "tools.bench", "--worker", dumps(setup)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        self.name, self.process = name, subprocess.Popen(command, cwd=root, **pipes)
        try:
            self.device = self.answer()
        except KeyboardInterrupt:
            self.process.kill()  # else it would miss the folder that is removed now
            raise

    def ask(self, *question):
        with contextlib.suppress(BrokenPipeError):  # the process has ended, so there is no answer either
            print(dumps(question), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        if not (line := self.process.stdout.readline()):
            raise OSError(f"{self.name} ended without an answer: see above")
        return loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate()  # closes its stdin, which ends it, and waits


@contextlib.contextmanager
def start(names, hparams, folder="", dtype="float32"):
    """Yields (a model folder, {name: its Worker}). The model is that of `folder`, or one with random weights."""
    cli.unwind_on_ctrl_c()  # then the temporary folder is removed
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        if not folder:
            save_random_model(folder := scratch, hparams)
        yield folder, {name: stack.enter_context(Worker(name, folder, dtype)) for name in names}


def serve(name, dtype, folder):
    """What the process of a Worker does: answers the questions that it reads from stdin."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes to stderr, and not between the answers
    _, hparams, params = utils.load_folder(Path(folder))
    params = cast(params, dtype)
    engine = ENGINES[name](name, hparams, params)
    del params  # an engine that has made a copy needs these no more
    print(dumps(engine.device), file=out, flush=True)
    for line in sys.stdin:
        task, *arguments = loads(line)
        answer = peak_memory() if task == "memory" else getattr(engine, task)(*arguments)
        print(dumps(answer), file=out, flush=True)


def peak_memory():
    """The most bytes that this process has held. (On Linux ru_maxrss also counts the process that started this one.)"""
    if peak := proc_field("self/status", "VmHWM"):
        return int(peak.split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def proc_field(file, name):
    """What a file of Linux's /proc says about `name`; "" on other systems."""
    with contextlib.suppress(OSError):
        for line in Path("/proc", file).read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return ""


def machine():
    """The processor and the software, with the environment variables that choose kernels and threads: they may cost
    half the speed."""
    cpu = proc_field("cpuinfo", "model name") or platform.processor() or platform.machine()
    told = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("OPENBLAS_", "OMP_", "MKL_", "XLA_"))]
    software = f"{platform.system()}, Python {platform.python_version()}"
    return f"{cpu}, {os.cpu_count()} cores, {software}{', ' * bool(told)}{' '.join(told)}"


# ---- Measuring ----


def measure(workers, tasks, rounds):
    """({task: {engine: rates}}, {task: {engine: seconds that the first time took longer}}, {engine: peak bytes}).

    rates are {"median", "min", "max": tokens per second, "of_limit": the median's share of the limit}. The first time,
    in which JAX compiles, is not among them. The first task decodes, and is asked three times before the memory is
    read, as NumPy converts its matrices only after some tokens.
    """
    seconds, waited, peak = defaultdict(list), defaultdict(list), {}
    for _ in range(1 + rounds):
        for name, (task, argument, _) in tasks.items():
            for engine, worker in workers.items():
                if not hasattr(ENGINES[engine], task):
                    continue
                started = time.perf_counter()
                seconds[name, engine].append(worker.ask(task, argument))
                waited[name, engine].append(time.perf_counter() - started)
                if engine not in peak:
                    worker.ask(task, argument)
                    worker.ask(task, argument)
                    peak[engine] = worker.ask("memory")
        print(end=".", flush=True, file=sys.stderr)
    rates, compiling = {name: {} for name in tasks}, {name: {} for name in tasks}
    for (name, engine), (first, *others) in waited.items():
        compiling[name][engine] = first - statistics.median(others)
        rates[name][engine] = summary(tasks[name][2] / t for t in seconds[name, engine][1:])
        rates[name][engine]["of_limit"] = rates[name][engine]["median"] / rates[name]["limits"]["median"]
    return rates, compiling, peak


def summary(rates):
    rates = sorted(rates)
    return {"median": statistics.median(rates), "min": rates[0], "max": rates[-1]}


def cold_start(folder, backend, root=ROOT):
    """Seconds from the start of a process to the end of its first token, by the checkout in the folder `root`."""
    command = [sys.executable, "gpt2.py", "The", "--n_tokens_to_generate", "1", "--backend", backend]
    command += ["--model_size", str(Path(folder).resolve())]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise OSError(f"{root}: gpt2.py failed: {done.stderr[-200:]}")
    return time.perf_counter() - started


# ---- The command ----


# fmt: off
def main(model_size: str = "124M", *, models_dir: str = "", against: str = "", rounds: int = 5, dtype: str = "float32",
         backend: str = "", json: bool = False, plot: str = "", worker: str = ""):
    # fmt: on
    """Measures decoding, batches and prefill on each backend and peer, beside the limit of the machine.

    Args:
        model_size: 3M, 124M, 355M, 774M or 1558M, with random weights; or a model folder
        models_dir: where the folders of models are; left out: models/ of this repository
        against: peers, separated by commas: transformers, ctranslate2, picogpt-style; those installed are measured
        rounds: how many times each is measured; take 5 or more for a reliable median
        dtype: float32, bfloat16 or float64
        backend: numpy or jax; left out: both
        json: print one JSON object instead of the table
        plot: a .png file for a picture of the table
        worker: for the processes that this program starts itself
    """
    if worker:
        return serve(**loads(worker))
    find_dtype(dtype)
    check(rounds, plot)
    engines = choose_engines(backend, against)
    folder = "" if model_size in HPARAMS else str(utils.model_folder(model_size, models_dir).resolve())
    hparams = HPARAMS.get(model_size) or utils.read_hparams(Path(folder))
    tasks = {name: task for name, task in TASKS.items() if task[1] < hparams["n_ctx"] - N_DECODE}
    with start(["limits", *engines], hparams, folder, dtype) as (folder, workers):
        cold = {e: statistics.median(cold_start(folder, e) for _ in range(rounds)) for e in engines if e not in PEERS}
        rates, compiling, peak = measure(workers, tasks, rounds)
    print(file=sys.stderr)
    found = {"machine": machine(), "model": model_size, "dtype": dtype, "rounds": rounds}
    found |= {"engines": {name: worker.device for name, worker in workers.items()}}
    found |= {"tokens_per_second": rates, "first_token_of_a_process_seconds": cold}
    found |= {"compiling_seconds": compiling, "peak_bytes": peak, "weight_bytes": weight_bytes(hparams, dtype)}
    print(dumps(found) if json else "\n".join(report(found)))
    if plot:
        medians = {name: {e: r["median"] for e, r in row.items()} for name, row in rates.items()}
        draw(plot, {f"{model_size}, {dtype}": medians}, style="o")


def check(rounds, plot):
    """Raises ValueError if there are no rounds, and if there is a picture to draw but no matplotlib."""
    if plot and not installed("matplotlib"):
        raise ValueError("--plot needs matplotlib: python3 -m pip install matplotlib")
    if rounds < 1:
        raise ValueError(f"--rounds {rounds} is out of range: 1 or more")


def choose_engines(backend, against):
    """The names of the engines to measure. Raises ValueError for an unknown one; a peer that is not installed is left
    out, and a line on stderr says so."""
    if backend:
        backends.get(backend)
    peers = [peer for peer in against.split(",") if peer]
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"unknown peer {peer!r}: choose from {', '.join(PEERS)}")
        if not installed(peer):
            print(f"{peer} is not installed and left out", file=sys.stderr)
    return list(filter(installed, [*([backend] if backend else backends.NAMES), *peers]))


def report(found):
    """The lines that are printed without --json."""
    yield f"{found['model']}, {found['dtype']}, medians of {found['rounds']} rounds; {found['machine']}"
    yield "; ".join(found["engines"].values())
    yield ""
    rows = {name: {e: cell(e, r) for e, r in row.items()} for name, row in found["tokens_per_second"].items()}
    yield from markdown("tokens/s: median (min to max), share of the limit", rows)
    yield ""
    for name, seconds in found["first_token_of_a_process_seconds"].items():
        yield f"first token of a new process, {name}: {seconds:.2f} s"
    for name, peak in found["peak_bytes"].items():
        share = peak / found["weight_bytes"]
        yield f"peak memory after decoding, {name}: {peak / 1e6:.0f} MB, {share:.2f} × the weights"
    compiling = [f"{row['jax']:.1f} s ({name})" for name, row in found["compiling_seconds"].items() if "jax" in row]
    if compiling:
        yield f"the first time on JAX, compiling or loading what is compiled, took longer by {', '.join(compiling)}"


def cell(engine, rates):
    share = "" if engine == "limits" else f", {rates['of_limit']:.2f}"
    return f"{rates['median']:.1f} ({rates['min']:.1f} to {rates['max']:.1f}){share}"


if __name__ == "__main__":
    cli.run(main, "-m tools.bench")
