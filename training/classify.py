"""A classifier from a language model: the output layer is replaced by one with a column for each class.

The language model's last layer gives a score to each token of the vocabulary, from the vector of the last position. A
classifier needs one score for each class from the same vector:

    logits = hidden(ids)[last] @ cls_head        [n_embd] @ [n_embd, n_classes] -> [n_classes]

Why the last token: attention is causal, so only the last position has seen the whole text. In a batch, texts are padded
on the right to the same length; `last` is the position of the last real token of each. No real token can see the
padding, so it changes nothing (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training",
section 3.2).
"""

import functools
import json
from typing import Any, NamedTuple

import numpy as np

import utils
from backends import np as xp
from training import lora, tuning
from training.loss import token_losses
from training.model import dropout, hidden_of, no_dropout
from training.step import join
from weights.files import replacing
from weights.huggingface import read_header, widen
from weights.params import from_names, named_leaves

FILE = "classifier.safetensors"


class Classifier(NamedTuple):
    """A loaded classifier: params has cls_head, and perhaps leaves of LoRA, multiplied by scale, or of adapters."""

    encoder: Any
    hparams: dict
    params: dict
    labels: list
    scale: float


def init_head(n_embd, n_classes, seed):
    """cls_head, [n_embd, n_classes], small random numbers."""
    return np.random.default_rng(seed).normal(scale=0.02, size=(n_embd, n_classes)).astype(np.float32)


def last_vector(params, row, hidden, scale=1.0, drop=no_dropout):
    """[n_embd], the vector at the last token of a text: row has "ids" [n_seq] and "last"; hidden is that of
    training.model.hidden_of. Or the finished vector, if row has it as "x"."""
    return row["x"] if "x" in row else hidden(lora.apply(params, scale), row["ids"], drop=drop)[row["last"]]


def class_logits(params, row, hidden, scale=1.0, drop=no_dropout):
    """[n_classes] logits of a text."""
    return last_vector(params, row, hidden, scale, drop) @ params["cls_head"]["w"]


def make_loss(library, hidden, dropout_rate, scale):
    """The function that training differentiates: (trainable, rows, keys, *frozen) -> the mean loss of the rows, each
    times its "weight"."""

    def row_loss(params, row, key):
        logits = class_logits(params, row, hidden, scale, dropout(dropout_rate, key))
        return row["weight"] * token_losses(logits[None], row["label"][None])[0]

    def loss(trainable, rows, keys, *frozen):
        params = join(trainable, *frozen)
        return xp.mean(library.vmap(row_loss, in_axes=(None, 0, 0))(params, rows, keys))

    return loss


# ---- Batches ----


def tokenize(encoder, texts, n_ctx):
    """([ids of each text], how many were cut): a text longer than n_ctx tokens loses its beginning, as its last token
    is the one that is classified."""
    rows = [encoder.encode(text) for text in texts]
    return [ids[-n_ctx:] for ids in rows], sum(len(ids) > n_ctx for ids in rows)


def batch(rows, labels, order, n_ctx):
    """The batch of the examples whose numbers are in `order`. -1 stands for a row that fills the batch: weight 0."""
    chosen = [rows[max(i, 0)] for i in order]
    weight = np.array([i >= 0 for i in order], np.float32)
    found = {"label": np.array([labels[i] for i in order], np.int32), "weight": weight * len(order) / weight.sum()}
    if isinstance(chosen[0], np.ndarray):
        return found | {"x": np.stack(chosen)}
    ids = tuning.pad(chosen, tuning.bucket(max(map(len, chosen)), n_ctx))
    return found | {"ids": ids, "last": np.array([len(row) - 1 for row in chosen], np.int32)}


def over_texts(library, f, params, rows, n_ctx, batch_size=32):
    """f(params, row) for each text, [n_texts, ...]: texts of similar length together, so that little is padding."""
    compute = library.jit(library.vmap(f, in_axes=(None, 0)))
    results = [None] * len(rows)
    for group in tuning.groups(sorted(range(len(rows)), key=lambda i: len(rows[i])), batch_size):
        inputs = batch(rows, [0] * len(rows), group, n_ctx)
        found = library.to_numpy(compute(params, {name: inputs[name] for name in {*inputs} - {"label", "weight"}}))
        for i, result in zip(group, found, strict=True):
            if i >= 0:
                results[i] = result
    return np.stack(results)


def predict(library, classifier, rows):
    """[n_texts, n_classes] logits of lists of ids."""
    f = functools.partial(class_logits, hidden=hidden_of(classifier.hparams), scale=classifier.scale)
    return over_texts(library, f, library.asarray(classifier.params), rows, classifier.hparams["n_ctx"])


# ---- Training ----


def train(library, classifier, parts, s, save):
    """Trains a classifier by the settings s; parts is {"train", "validation": (rows of ids, numbers of labels)}. Calls
    save({name: leaf} of what was trained, evaluation) for the best so far, and returns the best evaluation.

    If only the head is trained, the vectors that it reads never change: they are computed once.
    """
    hidden, n_ctx = hidden_of(classifier.hparams), classifier.hparams["n_ctx"]
    trainable, frozen = tuning.choose(library, classifier.params, s)
    if trainable.keys() == {"cls_head.w"}:
        vector = functools.partial(last_vector, hidden=hidden)
        base = library.asarray(classifier.params)
        parts = {k: (list(over_texts(library, vector, base, rows, n_ctx)), y) for k, (rows, y) in parts.items()}
        frozen = [{}]
    loss_of = make_loss(library, hidden, s.dropout, classifier.scale)
    logits_of = functools.partial(class_logits, hidden=hidden, scale=classifier.scale)
    rows, labels = parts["validation"]

    def evaluate(params):
        logits = over_texts(library, logits_of, params, rows, n_ctx)
        accuracy = float(np.mean(logits.argmax(axis=-1) == labels))
        loss = float(np.mean(token_losses(logits, np.array(labels))))
        # Accuracy has few steps on few texts: of equal ones, the lower loss is better.
        return {"accuracy": accuracy, "validation": loss, "score": accuracy - 1e-6 * loss}

    def batches(epoch):
        texts, numbers = parts["train"]
        order = tuning.shuffled([len(text) for text in texts], s.batch_size, s.seed, epoch)
        return [batch(texts, numbers, group, n_ctx) for group in order]

    return tuning.tune(library, loss_of, trainable, frozen, batches, s, evaluate, save)


# ---- Files ----


def save(folder, trained, labels, scale, evaluation):
    """Writes what was trained into one file, so that an interruption leaves the one before or the new one."""
    import safetensors.numpy

    about = {"labels": labels, "scale": scale, "evaluation": evaluation}
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in trained.items()}
    with replacing(folder / FILE) as part:
        part.write_bytes(safetensors.numpy.save(tensors, {"format": "np", "classifier": json.dumps(about)}))


def load(folder):
    """The Classifier of a folder. Raises ValueError if it has none, OSError for files that are damaged."""
    import safetensors

    file = folder / FILE
    if not file.exists():
        raise ValueError(f"{folder} has no {FILE}: python -m training.finetune classify makes such a folder")
    encoder, hparams, params = utils.load_folder(folder)
    tensors = {name: widen(t).reshape(t.shape) for name, t in read_header(file).items()}
    with safetensors.safe_open(file, "numpy") as opened:
        about = (opened.metadata() or {}).get("classifier", "{}")
    leaves = named_leaves(params)
    wrong = [name for name, x in tensors.items() if name in leaves and leaves[name].shape != x.shape]
    try:
        about = json.loads(about)
        labels, scale, n = about["labels"], float(about["scale"]), tensors["cls_head.w"].shape
        if wrong or n != (hparams["n_embd"], len(labels)):
            raise ValueError(f"{(wrong or ['cls_head.w'])[0]} has another shape than the model")
        return Classifier(encoder, hparams, from_names(leaves | tensors), labels, scale)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{file}: no classifier, or a damaged one ({type(error).__name__}: {error})") from None
