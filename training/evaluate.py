"""Evaluation: the loss of a model on a text, as numbers that compare with those of other models and publications.

    python -m training.evaluate models/3M text.txt

A model sees at most n_ctx tokens. A longer text is read through a window of that size, which moves on by `stride`
tokens; a prediction that the window before made already is not counted again, so that each token counts once. All of
them but those of the first window have at least n_ctx - stride tokens before them. A smaller stride gives the
predictions more context, so usually a lower loss, and takes more time: publish a perplexity together with its stride.
A perplexity is per token, so it compares only models with the same tokenizer. Bits per byte compare all.

Jelinek et al. 1977 (perplexity); Graves 2013, "Generating Sequences With Recurrent Neural Networks", section 3 (bits).
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import functools
import json as json_library
import math
import sys
from pathlib import Path

import numpy as np

import backends
import cli
import utils
from training import data
from training.loss import perplexity, token_losses
from training.model import forward_of
from weights.params import cast, find_dtype, why_not_finite


def main(model: str = "", text: str = "", *, stride: int | None = None, backend: str = "numpy",
         dtype: str = "float32", models_dir: str = "", json: bool = False):  # fmt: skip
    """Prints the loss of a model on a text file, or on a folder of .txt files.

    Args:
        model: 124M, 355M, 774M, 1558M, 3M or a model folder
        text: a UTF-8 file or a folder of *.txt; <|endoftext|> separates documents
        stride: by how many tokens the window moves on, 1 to n_ctx; left out: half of n_ctx
        backend: numpy or jax
        dtype: float32, bfloat16 or float64
        models_dir: where the folders of models are; left out: models/
        json: print one JSON object
    """
    if not model or not text:
        raise ValueError("name a model, and a text file or a folder of them")
    device = backends.get(backend).setup(dtype)
    find_dtype(dtype)
    documents = data.read_documents(Path(text))
    encoder, hparams, params = utils.load_encoder_hparams_and_params(model, models_dir)
    stride = hparams["n_ctx"] // 2 or 1 if stride is None else stride
    if not 1 <= stride <= hparams["n_ctx"]:
        raise ValueError(f"--stride {stride} is out of range: 1 to n_ctx, {hparams['n_ctx']}")
    ids = data.tokenize(documents, encoder)
    if len(ids) < 2:
        raise ValueError(f"{text}: {len(ids)} token is too short: the first one is not predicted")
    if backend != "numpy":
        print(device, file=sys.stderr)
    with np.errstate(all="ignore"):  # infinite weights are reported below, in one line
        nats = total_loss(cast(params, dtype), ids, hparams, stride, backend)
    if not math.isfinite(nats):
        raise OSError(f"the loss of {model} on {text} is {nats}: {why_not_finite(params, dtype)}")
    found = report(nats, ids, encoder, stride)
    print(json_library.dumps(found) if json else table(found))


def windows(n_ids, n_ctx, stride):
    """(start, first, end) for each window: it reads the ids from `start` on, and its predictions of the ids
    [first:end] count. Each id but the first is counted once."""
    first = 1
    for start in range(0, n_ids - 1, stride):
        end = min(start + n_ctx + 1, n_ids)
        yield start, first, end
        if end == n_ids:
            return
        first = end


def total_loss(params, ids, hparams, stride, backend="numpy"):
    """The sum of the losses, in nats, of all ids but the first."""
    from tqdm import tqdm

    library, n_ctx, total = backends.get(backend), min(hparams["n_ctx"], len(ids) - 1), 0.0
    params = library.asarray(params)
    losses_of = library.jit(functools.partial(window_losses, forward_of(hparams)))
    for start, first, end in tqdm([*windows(len(ids), n_ctx, stride)], unit="window", disable=None):
        # Padded to one length, as JAX compiles a program for each. No earlier token attends to the padding.
        window = np.zeros(n_ctx + 1, np.int32)
        window[: end - start] = ids[start:end]
        losses = library.to_numpy(losses_of(params, window)).astype(np.float64)
        total += losses[first - start - 1 : end - start - 1].sum()
    return float(total)


def window_losses(forward, params, window):
    """The loss of each id of a window but the first."""
    return token_losses(forward(params, window[:-1]), window[1:])  # [n_ctx + 1] -> [n_ctx]


def report(nats, ids, encoder, stride):
    """What --json prints. The bytes are those of the predicted tokens; <|endoftext|> is counted as a token without
    bytes."""
    n_bytes = sum(len(encoder.token_bytes(i)) for i in ids[1:] if i != encoder.end_of_text)
    n_tokens = len(ids) - 1
    return {
        "tokens": n_tokens,
        "bytes": n_bytes,
        "nats_per_token": nats / n_tokens,
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "perplexity": perplexity(nats / n_tokens),
        "stride": stride,
    }


def table(found):
    """What is printed without --json: a line for each figure."""
    rows = found | {"nats_per_byte": found["bits_per_byte"] * math.log(2)}
    return "\n".join(
        f"{name.replace('_', ' '):15}{value:>14{',' if isinstance(value, int) else ',.4f'}}"
        for name, value in rows.items()
    )


if __name__ == "__main__":
    cli.run(main, "-m training.evaluate")
