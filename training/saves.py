"""The files of a training run, which survive an interruption at any moment: Ctrl-C, kill -9, power failure, full disk.

    models/mine/training-400.npz       all that the next step depends on: the state of optimizer.py and the counters
    models/mine/model.ckpt-400.*       the model with the lowest validation loss so far, in OpenAI's layout
    models/mine/checkpoint             the name of the checkpoint to load
    models/mine/model.safetensors      the same model, in Hugging Face's layout (a LLaMA in this alone)
    models/mine/metrics.jsonl          a line for each step and each evaluation

Batches and dropout masks are functions of the seed and the number of the step (data.draw, model.dropout_keys), so no
state of a random generator has to be saved. A file gets its name when it is complete (weights.files.replacing). The
training file is written last: if it exists, so does the model that belongs to it. The last two of each are kept.
"""

import json
import re
import zipfile
from pathlib import Path

import numpy as np

from utils import save_model
from weights.files import replacing, write_text
from weights.params import named_leaves


def save_run(folder, step, state, counters):
    """Saves a run after `step` steps: `state`, a tree of NumPy arrays, and `counters`, a dict that JSON can hold.
    Deletes all saves but the last two."""
    arrays = named_leaves(state)
    with replacing(Path(folder) / f"training-{step}.npz") as part, open(part, "wb") as file:
        np.savez(file, counters=json.dumps(counters), **arrays)
    for old in saved_steps(folder)[:-2]:
        (Path(folder) / f"training-{old}.npz").unlink()


def save_best(folder, step, hparams, params, ending=None):
    """Writes the model that is loaded from `folder` from now on. The one before it is kept, because another process may
    be loading it."""
    save_model(folder, hparams, params, name=f"model.ckpt-{step}", ending=ending)
    found = {int(match[1]) for path in Path(folder).iterdir() if (match := re.search(r"\.ckpt-(\d+)\.", path.name))}
    for old in sorted(found - {step})[:-1]:
        for path in Path(folder).glob(f"model.ckpt-{old}.*"):
            path.unlink()


def saved_steps(folder):
    """The steps at which the run in `folder` was saved, in order."""
    matches = (re.fullmatch(r"training-(\d+)\.npz", path.name) for path in Path(folder).glob("training-*.npz"))
    return sorted(int(match[1]) for match in matches if match)


def load_run(folder):
    """({name: array}, counters) of the last save. Raises ValueError if there is none, OSError if the file is
    damaged."""
    if not (steps := saved_steps(folder)):
        raise ValueError(f"{folder} has no run to resume: leave out --resume to start one")
    path = Path(folder) / f"training-{steps[-1]}.npz"
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(str(arrays.pop("counters")))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise OSError(f"{path}: no saved run, or a damaged one ({error}); delete it to resume the one before") from None


# ---- metrics.jsonl ----


def read_metrics(folder):
    """The lines of metrics.jsonl, as dicts. The last one is left out if it has no end, as after a kill. Raises OSError
    naming the file and the line for any other line that log of train.py cannot have written."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [parse(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]


def parse(line, place):
    """A line of metrics.jsonl, such as {"step": 3, "tokens": 192, "loss": 6.1} -> dict. Raises OSError naming the
    place."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        found = None
    if not isinstance(found, dict) or not {"step", "tokens"} <= found.keys() or not all(map(is_number, found.values())):
        raise OSError(f"{place}: damaged, it is no object with step, tokens and losses; delete the line to go on")
    return found


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def rewind_metrics(folder, step):
    """Deletes the lines about steps after `step`, which will be done again."""
    lines = [json.dumps(line) + "\n" for line in read_metrics(folder) if line["step"] <= step]
    write_text(Path(folder) / "metrics.jsonl", "".join(lines))


def draw_losses(folder, path):
    """Draws the losses of metrics.jsonl over steps, with tokens along the top, into the file `path`."""
    from matplotlib.figure import Figure

    lines, figure = read_metrics(folder), Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, color in (("loss", "#cccccc"), ("train", "#4477aa"), ("validation", "#cc6677")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, label="each batch" if name == "loss" else name)
    axis.set(xlabel="steps", ylabel="loss, nats per token")
    if lines[-1]["step"]:
        n = lines[-1]["tokens"] / lines[-1]["step"]
        tokens = axis.secondary_xaxis("top", functions=(lambda x: x * n / 1e6, lambda x: x * 1e6 / n))
        tokens.set_xlabel("tokens, millions")
    axis.legend()
    figure.savefig(path, dpi=120, format="png")
