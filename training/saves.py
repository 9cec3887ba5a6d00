"""A run on disk, so that it can be interrupted at any moment: by Ctrl-C, by kill -9, by a power cut, by a full disk.

    models/mine/training-400.npz       all that the next step depends on: params, optimizer state, the counters
    models/mine/model.ckpt-400.*       the model with the lowest validation loss so far, in OpenAI's layout
    models/mine/checkpoint             which of these is the one to load
    models/mine/model.safetensors      the same model, in Hugging Face's
    models/mine/metrics.jsonl          a line for each step and each evaluation

Batches and dropout are functions of the seed and the number of the step (data.draw, jax.random.fold_in), so the two are
the state of chance and the place in the data. A file gets its name when it is whole (weights.files.replacing). The
training file comes last: if it is there, so is the model that belongs to it. The last two of each stay.
"""

import json
import re
import zipfile
from pathlib import Path

import numpy as np

from utils import save_model
from weights.files import replacing, write_text


def save_run(folder, step, leaves, counters):
    """Saves a run: `leaves`, the arrays of its state, and `counters`, what JSON can hold. Keeps the last two."""
    with replacing(Path(folder) / f"training-{step}.npz") as part, open(part, "wb") as file:
        np.savez(file, counters=json.dumps(counters), **{str(i): leaf for i, leaf in enumerate(leaves)})
    for old in saved_steps(folder)[:-2]:
        (Path(folder) / f"training-{old}.npz").unlink()


def save_best(folder, step, hparams, params):
    """Writes the model that `folder` is loaded as from now on. The one before it stays: somebody may be reading."""
    save_model(folder, hparams, params, name=f"model.ckpt-{step}")
    found = {int(match[1]) for path in Path(folder).iterdir() if (match := re.search(r"\.ckpt-(\d+)\.", path.name))}
    for old in sorted(found - {step})[:-1]:
        for path in Path(folder).glob(f"model.ckpt-{old}.*"):
            path.unlink()


def saved_steps(folder):
    """The steps at which the run in `folder` was saved, in order."""
    matches = (re.fullmatch(r"training-(\d+)\.npz", path.name) for path in Path(folder).glob("training-*.npz"))
    return sorted(int(match[1]) for match in matches if match)


def load_run(folder):
    """(leaves, counters) as they were saved last. Raises ValueError if nothing was, OSError if the file is damaged."""
    if not (steps := saved_steps(folder)):
        raise ValueError(f"{folder} has no run to resume: leave out --resume to start one")
    path = Path(folder) / f"training-{steps[-1]}.npz"
    try:
        with np.load(path) as file:
            return [file[str(i)] for i in range(len(file.files) - 1)], json.loads(str(file["counters"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise OSError(f"{path}: no saved run, or a damaged one ({error}); delete it to resume the one before") from None


# ---- metrics.jsonl ----


def read_metrics(folder):
    """The lines of metrics.jsonl, as dicts; one that was cut short by a kill is left out."""
    found, path = [], Path(folder) / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def rewind_metrics(folder, step):
    """Takes back the lines about steps after `step`: they will be done again."""
    lines = [json.dumps(line) + "\n" for line in read_metrics(folder) if line["step"] <= step]
    write_text(Path(folder) / "metrics.jsonl", "".join(lines))


def draw_losses(folder, path):
    """The curves of metrics.jsonl as a picture: losses over steps, and over tokens along the top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(folder)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
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
    plt.close(figure)
