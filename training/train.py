"""The loop: from ids on disk to a model folder that `python gpt2.py "..." --model_size models/mine` opens.

    python -m training.train data/stories --out models/mine

Draw a batch, take a step, write down the loss; every so often look at text the model has not trained on, let it speak,
and save. loss.py says what is lowered, step.py how, saves.py what outlives an interruption.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import contextlib
import importlib
import json
import math
import statistics
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import backends
import cli
import utils
from inference import kv_cache, sampling
from inference.stream import Row, stream
from save import new_folder, replacing, save_tokenizer
from training import data, saves

SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 192, "n_ctx": 256}
FREE = ("data", "out", "patience", "resume", *SIZES)  # as flags; the sizes are compared as they turned out
N_EVALUATED = 65_536  # tokens of each part of the data, for an evaluation


# fmt: off
def main(data: str = "", *, out: str = "models/mine", n_layer: int | None = None, n_head: int | None = None,
         n_embd: int | None = None, n_ctx: int | None = None, init_from: str = "", n_steps: int = 1500,
         batch_size: int = 32, rows_at_once: int | None = None, learning_rate: float = 2e-3, warmup: int = 100,
         beta2: float = 0.99, weight_decay: float = 0.1, clip: float = 1.0, dropout: float = 0.1,
         dtype: str = "float32", eval_every: int = 100, patience: int = 0, seed: int = 0, backend: str = "jax",
         resume: bool = False):
    # fmt: on
    """Trains a GPT-2 on a folder made by `python -m training.data`, and saves it in OpenAI's and Hugging Face's layout.

    Args:
        data: the folder with train.bin and validation.bin
        out: the model folder to make
        n_layer: blocks; left out: 6, or as in --init_from, like the next two
        n_head: attention heads, which share n_embd; left out: 6
        n_embd: numbers that stand for one token; left out: 192
        n_ctx: tokens that the model can see; left out: 256; beside --init_from, at most as many as that model
        init_from: go on from this model, with its sizes and its tokenizer; left out: start from random numbers
        n_steps: how often to change the parameters
        batch_size: windows of n_ctx tokens for one step
        rows_at_once: go through the model together, a divisor of batch_size; left out: up to 4 on a CPU, else all
        learning_rate: the peak; it rises to it during the warm-up and falls to a twentieth along a cosine
        warmup: steps
        beta2: how slowly AdamW forgets squared gradients, 0 to less than 1; 0.95 to 0.999 is usual
        weight_decay: how much a matrix is pulled towards 0, times the learning rate
        clip: the norm that a gradient may have
        dropout: the share of activations to leave out while training, 0 to less than 1
        dtype: float32, or bfloat16 with float32 master weights
        eval_every: steps from one evaluation, sample and save to the next
        patience: stop after so many evaluations without a lower validation loss; 0: never
        seed: the same seed trains the same model on the same machine
        backend: jax; numpy says why it cannot
        resume: go on where the run in --out was saved last; give the other flags as before
    """
    settings = SimpleNamespace(**locals())
    check(settings)
    print(backends.get(backend).start(dtype), file=sys.stderr)
    try:
        run = Run(settings)
        if resume:
            run.resume()
        else:
            run.begin()
        run.train()
    except RuntimeError as error:  # JAX's
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError("try a smaller --rows_at_once (the same result), --n_ctx or --n_embd") from None


def check(settings):
    """Raises ValueError for a value out of its range, and for a flag that another leaves without effect."""
    try:
        backends.get(settings.backend).value_and_grad(abs)
    except NotImplementedError as error:
        raise ValueError(str(error)) from None
    for wrong, why in faults(settings):
        if wrong:
            raise ValueError(why)


def faults(s):
    """(is it so?, what is wrong then) for settings s."""
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
    uneven = s.rows_at_once is not None and (s.rows_at_once == 0 or s.batch_size % s.rows_at_once)
    yield uneven, f"--rows_at_once {s.rows_at_once} does not divide --batch_size {s.batch_size}"
    fixed = [name for name in sizes if name != "n_ctx"]
    yield s.init_from and fixed, f"--{''.join(fixed[:1])} has no effect: --init_from decides"
    yield s.seed >= 2**32, f"--seed {s.seed} is out of range: 0 to {2**32 - 1}"


def starting_point(s):
    """(encoder, ids, hparams, params) for settings s. Raises ValueError if the data has another tokenizer than the
    model to go on from."""
    sizes = {name: getattr(s, name) or default for name, default in SIZES.items()}
    if s.init_from:
        known, hparams, params = utils.load_encoder_hparams_and_params(s.init_from)
        n_ctx = hparams["n_ctx"] if s.n_ctx is None else s.n_ctx
        if n_ctx > hparams["n_ctx"]:
            raise ValueError(f"--n_ctx {n_ctx} is more than {s.init_from} has positions for: {hparams['n_ctx']}")
        hparams, params = hparams | {"n_ctx": n_ctx}, params | {"wpe": params["wpe"][:n_ctx]}
        encoder, ids = data.load(s.data, n_ctx)
        if (known.ids, known.ranks) != (encoder.ids, encoder.ranks):
            raise ValueError(f"{s.data} has other token ids than {s.init_from}: make it with --encoder {s.init_from}")
        return encoder, ids, hparams, params
    encoder, ids = data.load(s.data, sizes["n_ctx"])
    hparams = {"n_vocab": len(encoder.ids), **sizes}
    return encoder, ids, hparams, step_library().init_params(hparams, s.seed)


def step_library():
    """training/step.py, which needs packages that nothing else here does."""
    try:
        return importlib.import_module("training.step")
    except ModuleNotFoundError as missing:
        raise ValueError(f"training needs {missing.name}: python3 -m pip install jax optax") from None


class Run:
    """One training run. `state` is (params, opt_state), on the device; `counters` says how far it has come."""

    def __init__(self, settings):
        import jax

        s, library = settings, step_library()
        self.settings, self.folder, self.library = s, Path(s.out), library
        self.encoder, self.ids, self.hparams, params = starting_point(s)
        schedule = library.learning_rate(s.learning_rate, s.warmup, s.n_steps)
        optimizer = library.make_optimizer(schedule, s.weight_decay, s.beta2, s.clip)
        params = jax.tree.map(jax.numpy.array, params)  # copies: the step will overwrite them
        self.state = params, optimizer.init(params)
        self.n_rows = s.rows_at_once or (math.gcd(s.batch_size, 4) if jax.default_backend() == "cpu" else s.batch_size)
        self.step = library.make_step(optimizer, self.hparams["n_head"], self.n_rows, s.dropout, s.dtype)
        self.key, self.seconds = jax.random.key(s.seed), []
        n_ctx = self.hparams["n_ctx"]
        self.windows = {n: data.consecutive(ids, n_ctx, max(1, N_EVALUATED // n_ctx)) for n, ids in self.ids.items()}
        fixed = {name: value for name, value in vars(s).items() if name not in FREE} | self.hparams
        fixed |= {"rows_at_once": self.n_rows} | {f"checksum of {n}.bin": zlib.crc32(i) for n, i in self.ids.items()}
        self.counters = {"step": 0, "best": math.inf, "best_step": 0, "n_worse": 0, "settings": fixed}

    def begin(self):
        """The folder appears under its name when it has everything that loading it takes."""
        if self.folder.exists():
            hint = "--resume goes on with its run" if saves.saved_steps(self.folder) else "delete it"
            raise ValueError(f"{self.folder} is there already: {hint}, or name another folder with --out")
        final = self.folder
        with new_folder(final) as self.folder:
            save_tokenizer(self.settings.data, self.folder)
            self.evaluate()
        self.folder = final

    def resume(self):
        """Goes back to where the run was saved last. Raises ValueError if its settings were others."""
        import jax

        leaves, counters = saves.load_run(self.folder)
        then, now = counters["settings"], self.counters["settings"]
        if other := [f"{name} {then.get(name)}, not {now[name]}" for name in now if then.get(name) != now[name]]:
            raise ValueError(f"this run had {'; '.join(other)}: resume it with the flags and data that it had")
        self.counters = counters
        self.state = jax.tree.unflatten(jax.tree.structure(self.state), map(jax.numpy.array, leaves))
        saves.rewind_metrics(self.folder, counters["step"])

    def train(self):
        """Takes the steps that are left, or fewer if patience runs out."""
        from tqdm import tqdm

        s, patience = self.settings, self.settings.patience or math.inf
        with tqdm(total=s.n_steps, initial=self.counters["step"], unit="step", disable=None) as bar:
            while self.counters["step"] < s.n_steps and self.counters["n_worse"] < patience:
                loss = self.take_step()
                n_tokens = s.batch_size * self.hparams["n_ctx"]
                bar.set_postfix_str(f"loss {loss:.3f}, {n_tokens / self.seconds[-1]:,.0f} tokens/s", refresh=False)
                bar.update()
                if self.counters["step"] % s.eval_every == 0 or self.counters["step"] == s.n_steps:
                    bar.clear()
                    self.evaluate()
        best = self.counters
        print(f"{self.folder} is the model of step {best['best_step']}, validation loss {best['best']:.4f}")

    def take_step(self):
        """One step, written down. Returns its loss; raises ValueError if that is no number any more."""
        import jax

        s, step, began = self.settings, self.counters["step"], time.perf_counter()
        batch = data.draw(self.ids["train"], self.hparams["n_ctx"], s.batch_size, s.seed, step)
        self.state, loss = self.step(self.state, batch, jax.random.fold_in(self.key, step))
        loss = float(loss)
        self.seconds.append(time.perf_counter() - began)
        self.counters["step"] = step + 1
        self.require_number(loss, "loss")
        self.log({"loss": loss})
        return loss

    def require_number(self, loss, name):
        """Raises ValueError if a loss is none."""
        if not math.isfinite(loss) and not (saved := saves.saved_steps(self.folder)):
            raise ValueError(f"the {name} is {loss} before the first step: the model to start from is broken")
        if not math.isfinite(loss):
            raise ValueError(
                f"the {name} is {loss} at step {self.counters['step']}: start again with another --out and a "
                f"--learning_rate below {self.settings.learning_rate:g}; {self.folder} stays as of step {saved[-1]}"
            )

    def log(self, line):
        n_tokens = self.counters["step"] * self.settings.batch_size * self.hparams["n_ctx"]
        path, line = self.folder / "metrics.jsonl", {"step": self.counters["step"], "tokens": n_tokens, **line}
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}; what was saved before still is") from None

    def evaluate(self):
        """Both losses, without dropout, and a sample; saves the run, and the model if it is the best so far."""
        counters, params, n_head = self.counters, self.state[0], self.hparams["n_head"]
        losses = {name: self.library.mean_loss(params, self.windows[name], n_head, self.n_rows) for name in data.PARTS}
        for name, loss in losses.items():
            self.require_number(loss, f"loss on {name}.bin")
        self.log(losses)
        counters["n_worse"] += 1
        if losses["validation"] < counters["best"]:
            counters |= {"best": losses["validation"], "best_step": counters["step"], "n_worse": 0}
            saves.save_best(self.folder, counters["step"], self.hparams, self.to_numpy(params))
        saves.save_run(self.folder, counters["step"], self.leaves(), counters)
        self.draw()
        pace = self.settings.batch_size * self.hparams["n_ctx"] / statistics.median(self.seconds or [math.inf])
        self.seconds.clear()
        print(f"step {counters['step']:5}  train {losses['train']:.4f}  validation {losses['validation']:.4f}"
              f"{f'  {pace:,.0f} tokens/s' if pace else ''}\n       | {self.sample()}", flush=True)  # fmt: skip

    def to_numpy(self, tree):
        return backends.get(self.settings.backend).to_numpy(tree)

    def leaves(self):
        import jax

        return self.to_numpy(jax.tree.leaves(self.state))

    def draw(self):
        """loss.png, where there is matplotlib to draw it, and room; a picture is no reason to stop."""
        with contextlib.suppress(ModuleNotFoundError, OSError), replacing(self.folder / "loss.png") as part:
            saves.draw_losses(self.folder, part)

    def sample(self):
        """What the model writes of its own accord, at temperature 0.8."""
        params = self.to_numpy(self.state[0])
        end_ids = [] if self.encoder.end_of_text is None else [self.encoder.end_of_text]
        start, n = end_ids or [0], min(40, self.hparams["n_ctx"] - 1)
        row = Row(self.encoder, start, n, sampling.Settings(temperature=0.8), end_ids=end_ids, seed=self.settings.seed)
        text = "".join(stream(kv_cache.load(params, self.hparams["n_head"]), row))
        return " ".join(text.split())


if __name__ == "__main__":
    cli.run(main, "-m training.train")
