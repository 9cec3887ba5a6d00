"""Training: from token ids on disk to a model folder that `python gpt2.py "..." --model_size models/mine` loads.

    python -m training.train data/stories --out models/mine

The loop draws a batch, takes a step and writes the loss to metrics.jsonl. Every --eval_every steps it computes the loss
on text that the model is not trained on (validation.bin), prints a sample, and saves. loss.py defines the loss, step.py
and optimizer.py one step, saves.py the files that a run is resumed from.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import contextlib
import functools
import importlib.util
import json
import math
import statistics
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import backends
import cli
import utils
from backends import np
from inference import sampling
from inference.generate import Sequence, generate
from inference.model import make_model
from training import data, devices, optimizer, saves
from training import step as step_library
from training.model import HPARAMS, architecture_faults, forward_of, shorten
from utils import save_tokenizer
from weights.files import locked, new_folder, replacing
from weights.params import flatten, leaf_name, tree_map, unflatten

SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 192, "n_ctx": 256}
# Settings that --resume may change. The sizes are compared too, as hparams.
FREE = ("data", "out", "n_steps", "patience", "resume", "architecture", "n_head_kv", *SIZES, *devices.FLAGS)
ELASTIC = {"devices", "micro_batch_size"}  # other devices, which may need another micro-batch, change only rounding
N_EVALUATED = 65_536  # tokens of each part of the data, at most, for an evaluation


# fmt: off
def main(data: str = "", *, out: str = "models/mine", n_layer: int | None = None, n_head: int | None = None,
         n_embd: int | None = None, n_ctx: int | None = None, architecture: str = "", n_head_kv: int | None = None,
         init_from: str = "", n_steps: int = 1500, batch_size: int = 32, micro_batch_size: int | None = None,
         learning_rate: float = 2e-3, warmup: int = 100, beta2: float = 0.99, weight_decay: float = 0.1,
         clip: float = 1.0, dropout: float = 0.1, dtype: str = "float32", eval_every: int = 100, patience: int = 0,
         seed: int = 0, backend: str = "", resume: bool = False, train_only: str = "", mesh: str = "",
         coordinator: str = "", n_processes: int | None = None, process_id: int | None = None):
    # fmt: on
    """Trains a model on a folder made by `python -m training.data`, and saves it in OpenAI's and Hugging Face's layout.

    Args:
        data: the folder with train.bin and validation.bin
        out: the model folder to make
        n_layer: blocks; left out: 6, or as in --init_from, like the next two and the architecture
        n_head: attention heads, which share n_embd; left out: 6
        n_embd: the size of the vector that stands for one token; left out: 192
        n_ctx: tokens that the model can see; left out: 256; beside --init_from, at most as many as that model
        architecture: gpt2 or llama (as many parameters, only in Hugging Face's layout); left out: gpt2
        n_head_kv: for llama: heads of keys and values, which the n_head heads of queries share; left out: n_head
        init_from: start from this model, with its sizes and its tokenizer; left out: start from random numbers
        n_steps: how often to change the parameters; may be larger with --resume, and the learning rate follows it
        batch_size: windows of n_ctx tokens for one step
        micro_batch_size: windows in a device's memory together, a divisor of its share; left out: 4 on a CPU, else all
        learning_rate: the peak; it is reached after the warm-up, then falls to a twentieth along half a cosine
        warmup: steps in which the learning rate rises
        beta2: how slowly AdamW forgets squared gradients, 0 to less than 1; 0.95 to 0.999 is usual
        weight_decay: how much a matrix is pulled towards 0, times the learning rate
        clip: the largest norm of a gradient; a larger one is scaled down to it
        dropout: the share of the numbers between layers to set to 0 while training, 0 to less than 1
        dtype: float32, or bfloat16 with float32 master weights
        eval_every: steps from one evaluation, sample and save to the next
        patience: stop after so many evaluations without a lower validation loss; 0: never
        seed: the same seed trains the same model on the same machine
        backend: numpy or jax; left out: jax if it is installed, else numpy
        resume: go on from the last save in --out; give the other flags as before, but for a larger --n_steps
        train_only: beside --init_from: train what this expression is found in the name of: "blocks.[4-5].*|ln_f.*"
        mesh: how devices divide the work, such as data=2,model=4 or fsdp=8 (docs/scaling.md); left out: data=all
        coordinator: host:port of process 0, if several processes train one model; auto: as SLURM or Kubernetes says
        n_processes: how many processes there are
        process_id: which of them this one is, 0 to n_processes - 1
    """
    settings = SimpleNamespace(**locals())
    settings.backend = backend or ("jax" if importlib.util.find_spec("jax") else "numpy")
    cli.check(rules(settings))
    try:
        with devices.joined(settings) as is_first, locked(out) if is_first else contextlib.nullcontext():
            run = Run(settings, is_first)
            run.resume() if resume else run.begin() if is_first else run.evaluate()
            run.train()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # JAX's lack of memory
            raise
        raise MemoryError("try a smaller --micro_batch_size (the same result), --n_ctx or --n_embd") from None


def rules(s):
    """Yields (whether the settings break a rule, the message), for cli.check."""
    sizes = [name for name in SIZES if getattr(s, name) is not None]
    yield not s.data, "name the folder that python -m training.data made"
    for name in (*sizes, "n_steps", "batch_size", "eval_every"):
        yield getattr(s, name) == 0, f"--{name} 0 is out of range: 1 or more"
    for name in ("learning_rate", "clip"):
        yield not 0 < getattr(s, name) < math.inf, f"--{name} {getattr(s, name)} is out of range: above 0"
    yield not 0 <= s.weight_decay < math.inf, f"--weight_decay {s.weight_decay} is out of range: 0 (off) or more"
    yield not 0 <= s.dropout < 1, f"--dropout {s.dropout} is out of range: 0 (off) to less than 1"
    yield not 0 <= s.beta2 < 1, f"--beta2 {s.beta2} is out of range: 0 to less than 1"
    yield s.dtype not in ("float32", "bfloat16"), f"--dtype {s.dtype!r}: choose float32 or bfloat16"
    n_embd, n_head = s.n_embd or SIZES["n_embd"], s.n_head or SIZES["n_head"]
    yield n_embd % n_head, f"--n_embd {n_embd} cannot be shared among --n_head {n_head} heads: choose a multiple"
    yield from devices.faults(s)
    yield from architecture_faults(s.architecture, n_embd, n_head, s.n_head_kv)
    sizes += ["architecture"] * bool(s.architecture)
    fixed = [name for name in sizes if name != "n_ctx"]
    yield s.init_from and fixed, f"--{''.join(fixed[:1])} has no effect: --init_from decides"
    yield s.train_only and not s.init_from, "--train_only freezes weights: name those to start from with --init_from"
    yield s.seed >= 2**32, f"--seed {s.seed} is out of range: 0 to {2**32 - 1}"


def starting_point(s):
    """(encoder, ids, hparams, params) for settings s, the params of --init_from or random ones. Raises ValueError if
    the data has another tokenizer than that model."""
    sizes = {name: getattr(s, name) or default for name, default in SIZES.items()}
    if s.init_from:
        known, hparams, params = utils.load_encoder_hparams_and_params(s.init_from)
        n_ctx = hparams["n_ctx"] if s.n_ctx is None else s.n_ctx
        if n_ctx > hparams["n_ctx"]:
            raise ValueError(f"--n_ctx {n_ctx} is more than {s.init_from} has positions for: {hparams['n_ctx']}")
        hparams, params = shorten(hparams, params, n_ctx)
        encoder, ids = data.load(s.data, n_ctx)
        if (known.ids, known.ranks) != (encoder.ids, encoder.ranks):
            raise ValueError(f"{s.data} has other token ids than {s.init_from}: make it with --encoder {s.init_from}")
        return encoder, ids, hparams, params
    encoder, ids = data.load(s.data, sizes["n_ctx"])
    hparams = HPARAMS[s.architecture or "gpt2"](n_vocab=len(encoder.ids), n_head_kv=s.n_head_kv, **sizes)
    return encoder, ids, hparams, step_library.init_params(hparams, s.seed)


class Run:
    """One training run. `state` is that of optimizer.py, on the device; `counters` says how far the run has come."""

    def __init__(self, s, is_first=True):
        self.settings, self.folder, self.is_first, self.seconds = s, Path(s.out), is_first, []
        self.encoder, self.ids, self.hparams, params = starting_point(s)
        self.library = library = devices.make_library(s, params, self.hparams)
        params, self.frozen = step_library.freeze(library, params, s.train_only)
        # Copies, because JAX's step overwrites its state.
        self.state = optimizer.init_state(tree_map(np.array, library.asarray(params)))
        forward, n_ctx = forward_of(library.own(self.hparams)), self.hparams["n_ctx"]
        micro_batch_size = devices.choose_micro_batch_size(s, library)
        loss_of = step_library.make_loss(library, forward, s.dropout, s.dtype)
        adamw_settings = {"weight_decay": s.weight_decay, "beta2": s.beta2}
        self.step = step_library.make_step(library, loss_of, micro_batch_size, s.seed, s.clip, **adamw_settings)
        self.mean_loss = step_library.make_mean_loss(library, forward, micro_batch_size)
        self.windows = {n: data.consecutive(ids, n_ctx, max(1, N_EVALUATED // n_ctx)) for n, ids in self.ids.items()}
        fixed = {name: value for name, value in vars(s).items() if name not in FREE} | self.hparams
        fixed |= {"micro_batch_size": micro_batch_size, "devices": [library.N_DATA, library.N_MODEL]}
        fixed |= {f"checksum of {name}.bin": zlib.crc32(ids) for name, ids in self.ids.items()}
        self.counters = {"step": 0, "best": math.inf, "best_step": 0, "n_worse": 0, "settings": fixed}

    def begin(self):
        """Makes the folder with the first save. It is renamed to its final name when it is complete."""
        if self.folder.exists():
            hint = "--resume goes on with its run" if saves.saved_steps(self.folder) else "delete it"
            raise ValueError(f"{self.folder} is there already: {hint}, or name another folder with --out")
        final = self.folder
        with new_folder(final) as self.folder:
            save_tokenizer(self.settings.data, self.folder, utils.layouts_of(self.hparams))
            self.evaluate()
        self.folder = final

    def resume(self):
        """Goes back to the last save. Raises ValueError if its settings were others."""
        arrays, counters = saves.load_run(self.folder)
        then, now = counters["settings"], self.counters["settings"]
        names = [name for name in now if name not in ELASTIC or then.get("devices", [1, 1]) == now["devices"]]
        if other := [f"{name} {then.get(name)}, not {now[name]}" for name in names if then.get(name) != now[name]]:
            raise ValueError(f"this run had {'; '.join(other)}: resume it with the flags and data that it had")
        if self.settings.n_steps < counters["step"]:
            raise ValueError(f"--n_steps {self.settings.n_steps} is fewer than this run has done: {counters['step']}")
        self.counters = counters | {"settings": now}
        state = unflatten({path: arrays[leaf_name(path)] for path in flatten(self.state)})
        self.state = tree_map(np.array, self.library.asarray(state))
        if self.is_first:
            saves.rewind_metrics(self.folder, counters["step"])

    def train(self):
        """Takes the steps that are left, or stops earlier by --patience."""
        from tqdm import tqdm

        s, n_done, patience = self.settings, self.counters["step"], self.settings.patience or math.inf
        with tqdm(total=s.n_steps, initial=n_done, unit="step", disable=not self.is_first or None) as bar:
            while self.counters["step"] < s.n_steps and self.counters["n_worse"] < patience:
                loss = self.take_step()
                n_tokens = s.batch_size * self.hparams["n_ctx"]
                bar.set_postfix_str(f"loss {loss:.3f}, {n_tokens / self.seconds[-1]:,.0f} tokens/s", refresh=False)
                bar.update()
                if self.counters["step"] % s.eval_every == 0 or self.counters["step"] == s.n_steps:
                    bar.clear()
                    self.evaluate()
        if self.is_first:
            text = "{} is the model of step {best_step}, validation loss {best:.4f}"
            print(text.format(self.folder, **self.counters))

    def take_step(self):
        """Takes one step and logs its loss, which it returns. Raises ValueError if the loss is NaN or infinite."""
        s, n_ctx, n_done, began = self.settings, self.hparams["n_ctx"], self.counters["step"], time.perf_counter()
        read = functools.partial(data.draw, self.ids["train"], n_ctx, s.batch_size, s.seed, n_done)
        batch = self.library.rows(read, (s.batch_size, n_ctx + 1))
        rate = optimizer.learning_rate(n_done, s.learning_rate, s.warmup, s.n_steps)
        self.state, loss = self.step(self.state, batch, n_done, rate, *self.frozen)
        loss = float(loss)  # waits for JAX
        self.seconds.append(time.perf_counter() - began)
        self.counters["step"] = n_done + 1
        self.require_finite(loss, "loss")
        self.log({"loss": loss})
        return loss

    def require_finite(self, loss, name):
        """Raises OSError if a loss is NaN or infinite before the first step, ValueError if it is later."""
        if math.isfinite(loss):
            return
        if not (saved := saves.saved_steps(self.folder)):
            raise OSError(
                f"{self.settings.init_from}: the {name} is {loss} before the first step: a weight is NaN or infinite"
            )
        raise ValueError(
            f"the {name} is {loss} at step {self.counters['step']}: start again with another --out and a "
            f"--learning_rate below {self.settings.learning_rate:g}; {self.folder} stays as of step {saved[-1]}"
        )

    def log(self, line):
        """Appends a line to metrics.jsonl."""
        if not self.is_first:
            return
        n_tokens = self.counters["step"] * self.settings.batch_size * self.hparams["n_ctx"]
        path, line = self.folder / "metrics.jsonl", {"step": self.counters["step"], "tokens": n_tokens, **line}
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}; what was saved before is unchanged") from None

    def evaluate(self):
        """Computes both losses, without dropout, and prints them with a sample. Saves the run, and the model if its
        validation loss is the lowest so far."""
        counters, params = self.counters, step_library.join(self.state["params"], *self.frozen)
        losses = {name: self.mean_loss(params, self.windows[name]) for name in data.PARTS}
        for name, loss in losses.items():
            self.require_finite(loss, f"loss on {name}.bin")
        self.log(losses)
        counters["n_worse"] += 1
        if is_best := losses["validation"] < counters["best"]:
            counters |= {"best": losses["validation"], "best_step": counters["step"], "n_worse": 0}
        state = self.library.to_numpy(self.state)  # in all processes, as each has only a part
        params = step_library.join(state["params"], *map(self.library.to_numpy, self.frozen))
        if not self.is_first:
            return
        if is_best:
            # <|endoftext|> stands between the texts of the data, so the model learns to end a text with it.
            ids = [i for i in [self.encoder.end_of_text] if i is not None]
            ending = utils.Ending(tuple(ids), True) if ids else None
            saves.save_best(self.folder, counters["step"], self.hparams, params, ending)
        saves.save_run(self.folder, counters["step"], state, counters)
        self.draw_losses()
        pace = self.settings.batch_size * self.hparams["n_ctx"] / statistics.median(self.seconds or [math.inf])
        self.seconds.clear()
        print(f"step {counters['step']:5}  train {losses['train']:.4f}  validation {losses['validation']:.4f}"
              f"{f'  {pace:,.0f} tokens/s' if pace else ''}\n       | {self.sample(params)}", flush=True)  # fmt: skip

    def draw_losses(self):
        """Draws loss.png, if matplotlib is installed and there is room on the disk: the run goes on without it."""
        with contextlib.suppress(ModuleNotFoundError, OSError), replacing(self.folder / "loss.png") as part:
            saves.draw_losses(self.folder, part)

    def sample(self, params):
        """A text that the model generates at temperature 0.8, from <|endoftext|> on."""
        end_ids = [] if self.encoder.end_of_text is None else [self.encoder.end_of_text]
        start, n = end_ids or [0], min(40, self.hparams["n_ctx"] - 1)
        warm = sampling.SamplingParams(temperature=0.8)
        row = Sequence(self.encoder, start, n, warm, end_ids=end_ids, seed=self.settings.seed)
        text = "".join(generate(make_model(params, self.hparams, backends.get("numpy")), row))
        return " ".join(text.split())


if __name__ == "__main__":
    cli.run(main, "-m training.train")
