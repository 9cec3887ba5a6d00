"""How fast, beside the limit of the machine and beside others, all in one run.

    python -m tools.bench                                       random weights of the size of 124M, nothing downloaded
    python -m tools.bench --against transformers,ctranslate2    beside peers, if they are installed

Each engine has a process of its own, for the thread pools of several in one process slow each other down, and they are
asked in turn, round after round, so that a slow minute of the machine hits them all. Medians of `rounds` rounds.

Limits, measured in the same rounds: a token of one text needs each weight once, so one sweep of x @ w over all weights
is the least it can take; 512 tokens at once need as many multiplications as one large product of that size.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import contextlib
import importlib.util
import json as json_library
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import backends
import cli
import utils
from encoder import END_OF_TEXT, SPELL
from weights.huggingface import hf_name
from weights.params import cast, find_dtype, flatten, param_shapes, unflatten
from weights.tensorflow import save_gpt2_params_to_tf_ckpt

ROOT = Path(__file__).resolve().parent.parent
HPARAMS = {  # of OpenAI's four sizes and of the embedded one
    size: {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    for size, n_vocab, n_ctx, n_embd, n_head, n_layer in [
        ("3M", 2048, 256, 192, 6, 6),
        ("124M", 50257, 1024, 768, 12, 12),
        ("355M", 50257, 1024, 1024, 16, 24),
        ("774M", 50257, 1024, 1280, 20, 36),
        ("1558M", 50257, 1024, 1600, 25, 48),
    ]
}
ENGINES = ("numpy", "jax")
PEERS = ("transformers", "ctranslate2", "picogpt-style")
N_DECODE = 32  # tokens a measurement of decoding takes


def random_params(hparams, dtype="float32"):
    """Weights as GPT-2's are before training, the same in every process."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        if path[-1] in ("g", "b"):
            return np.full(shape, path[-1] == "g", np.float32)
        drawn = rng.standard_normal(shape, dtype=np.float32)
        drawn *= np.float32(0.02)  # in place: peak memory is measured too
        return drawn

    return cast(unflatten({path: draw(path, shape) for path, shape in param_shapes(**hparams).items()}), dtype)


def prompt(hparams, n):
    return np.random.default_rng(1).integers(0, hparams["n_vocab"], n).tolist()


# ---- Engines: each answers `measure(task)` with seconds, in a process of its own ----


class Ours:
    """gpt2.py and inference/ on one of the backends."""

    def __init__(self, backend, hparams, params):
        from inference import kv_cache

        self.backend, self.hparams = backends.get(backend), hparams
        self.device = self.backend.setup(str(params["wte"].dtype))
        self.model = kv_cache.make_model(self.backend.prepare(params), hparams["n_head"], self.backend)

    def decode(self, n_prompt, n=N_DECODE):
        """Seconds a token, after the first."""
        from inference.model import greedy

        ids = greedy(self.model, prompt(self.hparams, n_prompt), n + 1)
        next(ids)
        return timed(lambda: list(ids)) / n

    def prefill(self, n):
        """Seconds for the logits of all n tokens."""
        from inference.model import init_cache

        ids, cache = np.array(prompt(self.hparams, n)), init_cache(self.model, n)
        return timed(lambda: self.backend.to_numpy(self.model.forward(self.model.params, ids, cache, 0)[0][-1, 0]))

    def batch(self, n_rows, n_prompt=10, n=8):
        """Seconds a step, in which each row gets a token."""
        from inference import batching
        from inference.model import init_cache

        rows = [prompt(self.hparams, n_prompt)] * n_rows
        cache = batching.repeat(init_cache(self.model, n_prompt + n + 1), n_rows)
        logits, cache = batching.step_batch(self.model, rows, cache, [0] * n_rows)
        started = None
        for i in range(n + 1):
            best = np.argmax(self.backend.to_numpy(logits), axis=-1)
            started = started or time.perf_counter()
            if i < n:
                logits, cache = batching.step_batch(self.model, best[:, None].tolist(), cache, [n_prompt + i] * n_rows)
        return (time.perf_counter() - started) / n


class Limits:
    """What the machine can do at best, through NumPy's BLAS."""

    def __init__(self, hparams, params):
        self.hparams, self.weights = hparams, [w for path, w in flatten(params).items() if path[-1] == "w"]
        # Laid out as the NumPy backend has large ones in the end, for they are read faster then.
        self.weights = [np.asfortranarray(w) if w.shape[0] > w.shape[1] else w for w in self.weights]
        self.wte = params["wte"]
        self.device = f"NumPy {np.__version__}"

    def decode(self, n_prompt, n=N_DECODE):
        self.sweep()
        return timed(lambda: [self.sweep() for _ in range(n)]) / n

    def sweep(self):
        for w in self.weights:
            np.ones((1, w.shape[0]), w.dtype) @ w
        np.ones((1, self.wte.shape[1]), self.wte.dtype) @ self.wte.T

    def prefill(self, n):
        """One product of [n, k] and [k, k] with as many multiplications as all weights take for n tokens."""
        k = int((sum(w.size for w in self.weights) + self.wte.size) ** 0.5)
        a, b = np.ones((n, k), np.float32), np.ones((k, k), np.float32)
        return timed(lambda: a @ b)

    def batch(self, n_rows):
        """The sweep, for it reads the same weights however many rows there are."""
        return self.decode(1)


class Transformers:
    def __init__(self, hparams, params):
        import torch
        import transformers

        self.torch, self.hparams = torch, hparams
        config = transformers.GPT2Config(vocab_size=hparams["n_vocab"], n_positions=hparams["n_ctx"],
                                         **{k: hparams[k] for k in ("n_embd", "n_head", "n_layer")})  # fmt: skip
        self.model = transformers.GPT2LMHeadModel(config).eval()
        state = {hf_name(path): torch.from_numpy(w) for path, w in flatten(params).items()}
        self.model.transformer.load_state_dict(state, strict=False)
        self.device = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"

    def generate(self, rows, n):
        ids = self.torch.tensor(rows)
        with self.torch.inference_mode():
            return timed(
                lambda: self.model.generate(ids, attention_mask=self.torch.ones_like(ids), do_sample=False,
                                            max_new_tokens=n, min_new_tokens=n, pad_token_id=0)
            )  # fmt: skip

    def decode(self, n_prompt, n=N_DECODE):
        rows = [prompt(self.hparams, n_prompt)]
        return (self.generate(rows, n + 1) - self.generate(rows, 1)) / n

    def prefill(self, n):
        ids = self.torch.tensor([prompt(self.hparams, n)])
        with self.torch.inference_mode():
            return timed(lambda: self.model(ids, use_cache=False).logits)

    def batch(self, n_rows, n_prompt=10, n=8):
        rows = [prompt(self.hparams, n_prompt)] * n_rows
        return (self.generate(rows, n + 1) - self.generate(rows, 1)) / n


class CTranslate2:
    def __init__(self, hparams, params):
        import ctranslate2

        self.hparams, self.tokens = hparams, [f"t{i}" for i in range(hparams["n_vocab"])]
        loader = ctranslate2.converters.transformers.GPT2Loader()
        spec = loader.get_model_spec(Transformers(hparams, params).model)
        spec.register_vocabulary(self.tokens)
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = self.tokens[-1]
        with tempfile.TemporaryDirectory() as folder:
            spec.validate()
            spec.save(folder)
            self.model = ctranslate2.Generator(folder, compute_type="float32", intra_threads=os.cpu_count())
        self.device = f"CTranslate2 {ctranslate2.__version__}"

    def generate(self, rows, n):
        rows = [[self.tokens[i] for i in row] for row in rows]
        return timed(
            lambda: self.model.generate_batch(rows, max_length=n, min_length=n, sampling_topk=1,
                                              include_prompt_in_result=False)
        )  # fmt: skip

    decode, batch = Transformers.decode, Transformers.batch

    def prefill(self, n):
        rows = [[self.tokens[i] for i in prompt(self.hparams, n)]]
        return timed(lambda: np.asarray(self.model.forward_batch(rows)))


class PicogptStyle:
    """No cache, a list of heads, and every token again through the model: how the first readable GPT-2 did it."""

    device = "gpt2.generate"

    def __init__(self, hparams, params):
        self.hparams, self.params = hparams, params

    def decode(self, n_prompt, n=2):
        import gpt2

        ids = prompt(self.hparams, n_prompt)
        return timed(lambda: gpt2.generate(ids, self.params, self.hparams["n_head"], n)) / n


def engine(name, hparams, params):
    if name in backends.NAMES:
        return Ours(name, hparams, params)
    made = {"limits": Limits, "transformers": Transformers, "ctranslate2": CTranslate2, "picogpt-style": PicogptStyle}
    return made[name](hparams, params)


def timed(f):
    started = time.perf_counter()
    f()
    return time.perf_counter() - started


# ---- A process for each, asked in turn ----


class Worker:
    """An engine in a process of its own, which takes tasks as lines of JSON and answers in kind."""

    def __init__(self, name, setup):
        command = [sys.executable, "-m", "tools.bench", "--worker", json_library.dumps({"name": name, **setup})]
        self.name, self.process = (
            name,
            subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            ),
        )
        self.device = self.answer()

    def ask(self, task, *arguments):
        self.process.stdin.write(json_library.dumps([task, *arguments]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self):
        if not (line := self.process.stdout.readline()):
            raise OSError(f"{self.name} ended without an answer: see above")
        return json_library.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve(setup):
    """The other end of a Worker."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    _, hparams, params = utils.load_folder(Path(setup["folder"]))
    params = cast(params, setup["dtype"])
    served = engine(setup["name"], hparams, params)
    del params  # an engine that keeps a copy needs no second
    print(json_library.dumps(served.device), file=answers, flush=True)
    for line in sys.stdin:
        task, *arguments = json_library.loads(line)
        answer = peak_memory() if task == "memory" else getattr(served, task)(*arguments)
        print(json_library.dumps(answer), file=answers, flush=True)


def peak_memory():
    """Bytes that this process held at most. (Linux counts for ru_maxrss what the process that started it held.)"""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def save_random_model(folder, hparams):
    """Random weights as a model folder in OpenAI's layout, with a tokenizer that knows bytes and made-up words."""
    folder = Path(folder)
    save_gpt2_params_to_tf_ckpt(folder / "model.ckpt", random_params(hparams))
    spellings = [*SPELL.values(), *(f"<{i}>" for i in range(256, hparams["n_vocab"] - 1)), END_OF_TEXT]
    ids = {spelling: i for i, spelling in enumerate(spellings)}
    (folder / "encoder.json").write_text(json_library.dumps(ids), encoding="utf-8")
    (folder / "vocab.bpe").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "hparams.json").write_text(json_library.dumps(hparams), encoding="utf-8")


def cold_start(folder, backend):
    """Seconds from the start of a process to the end of its first token."""
    command = [sys.executable, "gpt2.py", "The", "--n_tokens_to_generate", "1", "--backend", backend]
    command += ["--model_size", str(Path(folder).resolve())]
    return timed(lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True))


# ---- The table ----

TASKS = {  # name: (task, its arguments, tokens for each time it answers)
    "decode, prompt 10": ("decode", [10], 1),
    "decode, prompt 512": ("decode", [512], 1),
    "decode, prompt 990": ("decode", [990], 1),
    "batch of 16, decode": ("batch", [16], 16),
    "prefill 512, all logits": ("prefill", [512], 512),
}


def measure(workers, tasks, rounds, progress=lambda: None):
    """({task: {engine: [seconds]}}, {task: {engine: seconds that the first time took longer, as it compiles}},
    {engine: peak bytes after three times the first task, which decodes}). In each round all engines are asked in turn
    for each task, so that rows compare as well as columns; the first round is not counted."""
    asked = {name: [w for w in workers if t[0] == "decode" or w.name != "picogpt-style"] for name, t in tasks.items()}
    times, waited = ({name: {worker.name: [] for worker in workers} for name in tasks} for _ in range(2))
    peak = {}
    for _ in range(1 + rounds):
        for name, (task, arguments, _) in tasks.items():
            for worker in asked[name]:
                started = time.perf_counter()
                times[name][worker.name].append(worker.ask(task, *arguments))
                waited[name][worker.name].append(time.perf_counter() - started)
                if worker.name not in peak:  # the first task decodes; and again, for what an engine does only in time
                    for _ in range(2):
                        worker.ask(task, *arguments)
                    peak[worker.name] = worker.ask("memory")
        progress()
    compiling = {name: {e: w[0] - statistics.median(w[1:]) for e, w in waited[name].items() if w} for name in tasks}
    times = {name: {engine: seconds[1:] for engine, seconds in times[name].items()} for name in tasks}
    return times, compiling, peak


def summarize(times, tasks):
    """{task: {engine: {"median", "min", "max": tokens a second, "of_limit"}}}"""
    found = {}
    for name, by_engine in times.items():
        n = tasks[name][2]
        rates = {engine: sorted(n / t for t in seconds) for engine, seconds in by_engine.items() if seconds}
        limit = statistics.median(rates["limits"])
        found[name] = {
            engine: {
                "median": statistics.median(r),
                "min": r[0],
                "max": r[-1],
                "of_limit": statistics.median(r) / limit,
            }
            for engine, r in rates.items()
        }
    return found


def table(summary, engines):
    """Markdown, for the README to show as it is."""
    yield f"| tokens/s: median (min to max), share of the limit | {' | '.join(engines)} |"
    yield "| --- |" + " --- |" * len(engines)
    for name, row in summary.items():
        cells = []
        for engine in engines:
            if engine not in row:
                cells.append("")
                continue
            r = row[engine]
            share = "" if engine == "limits" else f", {r['of_limit']:.2f}"
            cells.append(f"{r['median']:.1f} ({r['min']:.1f} to {r['max']:.1f}){share}")
        yield f"| {name} | {' | '.join(cells)} |"


def machine():
    """What this ran on, in words, with what the environment tells the libraries: it may cost half the speed."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    told = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("OPENBLAS_", "OMP_", "MKL_", "XLA_"))]
    software = f"{platform.system()}, Python {platform.python_version()}"
    return f"{cpu}, {os.cpu_count()} cores, {software}{', ' * bool(told)}{' '.join(told)}"


# fmt: off
def main(model_size: str = "124M", *, models_dir: str = "", against: str = "", rounds: int = 5, dtype: str = "float32",
         backend: str = "", json: bool = False, plot: str = "", worker: str = ""):
    # fmt: on
    """Measures decoding, batches and prefill on each backend and peer, beside the limit of the machine.

    Args:
        model_size: 3M, 124M, 355M, 774M or 1558M, with random weights; or a model folder
        models_dir: where the folders of models are; left out: models/ of this repository
        against: peers, with commas: transformers, ctranslate2, picogpt-style; those installed are measured
        rounds: how often each is asked, 5 or more for a median to trust
        dtype: float32, bfloat16 or float64
        backend: numpy or jax; left out: both
        json: print one JSON object in place of the table
        plot: a .png to draw the table in
        worker: for the processes that this program starts itself
    """
    if worker:
        serve(json_library.loads(worker))
        return
    cli.unwind_on_ctrl_c()  # the temporary folder is to be removed
    engines, folder, hparams = check(model_size, models_dir, against, rounds, dtype, backend, plot)
    tasks = {name: task for name, task in TASKS.items() if task[1][0] < hparams["n_ctx"] - N_DECODE}
    with tempfile.TemporaryDirectory() as scratch:
        if not folder:
            save_random_model(folder := scratch, hparams)
        cold = {e: [cold_start(folder, e) for _ in range(rounds)] for e in engines if e in backends.NAMES}
        workers = [Worker(name, {"dtype": dtype, "folder": folder}) for name in ["limits", *engines]]
        times, compiling, peak = measure(workers, tasks, rounds, lambda: print(end=".", flush=True, file=sys.stderr))
    summary = summarize(times, tasks)
    found = {
        "machine": machine(), "model": model_size, "dtype": dtype, "rounds": rounds,
        "engines": {w.name: w.device for w in workers}, "tokens_per_second": summary,
        "first_token_of_a_process_seconds": {e: statistics.median(t) for e, t in cold.items()},
        "compiling_seconds": compiling,
        "peak_bytes": peak, "weight_bytes": weight_bytes(hparams, dtype),
    }  # fmt: skip
    for w in workers:
        w.close()
    print(file=sys.stderr)
    print(json_library.dumps(found) if json else "\n".join(report(found, ["limits", *engines])))
    if plot:
        draw(found, ["limits", *engines], plot)


def check(model_size, models_dir, against, rounds, dtype, backend, plot):
    """(engines, the model folder or "", hparams). Raises ValueError for what is unknown."""
    find_dtype(dtype)
    if plot and not installed("matplotlib"):
        raise ValueError("--plot needs matplotlib: python3 -m pip install matplotlib")
    if rounds < 1:
        raise ValueError(f"--rounds {rounds} is out of range: 1 or more")
    if backend:
        backends.get(backend)
    engines = [backend] if backend else [name for name in backends.NAMES if installed(name)]
    for peer in filter(None, against.split(",")):
        if peer not in PEERS:
            raise ValueError(f"unknown peer {peer!r}: choose from {', '.join(PEERS)}")
        if installed(peer):
            engines.append(peer)
        else:
            print(f"{peer} is not installed and left out", file=sys.stderr)
    if model_size in HPARAMS:
        return engines, "", HPARAMS[model_size]
    folder = utils.model_folder(model_size, models_dir)
    return engines, str(folder.resolve()), utils.read_hparams(folder)


def installed(name):
    return importlib.util.find_spec(name.replace("picogpt-style", "numpy")) is not None


def weight_bytes(hparams, dtype):
    sizes = (int(np.prod(shape)) for shape in param_shapes(**hparams).values())
    return sum(sizes) * {"float32": 4, "bfloat16": 2, "float64": 8}[dtype]


def report(found, engines):
    yield f"{found['model']}, {found['dtype']}, medians of {found['rounds']} rounds; {found['machine']}"
    yield "; ".join(found["engines"][name] for name in engines)
    yield ""
    yield from table(found["tokens_per_second"], engines)
    yield ""
    for name, seconds in found["first_token_of_a_process_seconds"].items():
        yield f"first token of a new process, {name}: {seconds:.2f} s"
    for name in engines:
        share = found["peak_bytes"][name] / found["weight_bytes"]
        yield f"peak memory after decoding, {name}: {found['peak_bytes'][name] / 1e6:.0f} MB, {share:.2f} × the weights"
    compiling = {name: row["jax"] for name, row in found["compiling_seconds"].items() if "jax" in row}
    if compiling:
        took = ", ".join(f"{seconds:.1f} s ({name})" for name, seconds in compiling.items())
        yield f"the first time on JAX, compiling or loading what is compiled, took longer by {took}"


def draw(found, engines, path):
    """Bars: tokens a second by task and engine, the limit as a line across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(found["tokens_per_second"])
    figure, axes = plt.subplots(1, len(tasks), figsize=(3 * len(tasks), 3.5), layout="constrained")
    for axis, task in zip(np.atleast_1d(axes), tasks, strict=True):
        row = found["tokens_per_second"][task]
        names = [name for name in engines if name in row and name != "limits"]
        axis.bar(names, [row[name]["median"] for name in names], color="#4477aa")
        line = axis.axhline(row["limits"]["median"], color="#cc6677", label="limit, as NumPy's BLAS reaches it")
        axis.set_title(task, fontsize=10)
        axis.tick_params(axis="x", rotation=60)
    np.atleast_1d(axes)[0].set_ylabel("tokens/s")
    figure.legend(handles=[line], loc="outside lower center")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main, "-m tools.bench")
