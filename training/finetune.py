"""Fine-tuning: from weights that somebody else made to a model for one's own task, in minutes.

    python -m training.finetune classify spam.tsv --model_size 3M --out models/spam      texts -> labels
    python -m training.finetune predict models/spam "WINNER!! Call now"
    python -m training.finetune instruct tasks.json --model_size 3M --out models/mine    instructions -> answers
    python gpt2.py "Name three colours." --model_size models/mine --chat

--train says which parameters change (tuning.py), classify.py and instruct.py what is computed, lora.py how a few per
cent of the parameters suffice.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import contextlib
import json as json_library
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import backends
import cli
import utils
from gpt2 import softmax
from training import classify as classifiers
from training import instruct as instructions
from training import labelled, tuning
from weights.files import locked, new_folder, read_text, replacing, write_text

# {method: (epochs, learning rate)} of classify, where the flags are left out
CLASSIFY = {"head": (40, 3e-3), "last_block": (4, 1e-3), "all": (4, 5e-4), "lora": (5, 2e-3), "adapters": (5, 2e-3)}
INSTRUCT = {"all": (4, 1e-3), "last_block": (4, 1e-3), "lora": (4, 3e-3)}


# fmt: off
def classify(data: str = "", *, model_size: str = "3M", out: str = "models/classifier", train: str = "all",
             train_only: str = "", balance: bool = False, n_epochs: int | None = None, batch_size: int = 16,
             learning_rate: float | None = None, weight_decay: float = 0.1, dropout: float = 0.1, lora: str = "c_",
             rank: int = 8, alpha: float | None = None, adapter_size: int = 16, seed: int = 0, backend: str = "",
             json: bool = False):
    # fmt: on
    """Trains a classifier of texts on a TSV or CSV file with a label and a text on each line.

    Args:
        data: label<TAB>text on each line, or a .csv; columns of other names or order need a header with label and text
        model_size: the model to start from: 3M, 124M, 355M, 774M, 1558M or a model folder
        out: the folder to make
        train: what to train: head, last_block, all, lora or adapters
        train_only: train the new output layer and the names that this expression is found in: "blocks.[4-5].*|ln_f.*"
        balance: use only as many texts of each label as the rarest one has
        n_epochs: how often to go through the texts; left out: 4 or 5, and 40 for head, which takes seconds
        batch_size: texts for one step
        learning_rate: the peak, after a short warm-up; left out: 5e-4 to 3e-3, by --train
        weight_decay: how much a matrix is pulled towards 0, times the learning rate
        dropout: the share of activations to set to 0 while training, 0 to less than 1
        lora: for --train lora: a regular expression for the names of layers, "attn.c_attn|mlp.c_fc"; c_: all
        rank: for --train lora: the rank of the product that is added to a matrix
        alpha: for --train lora: the product is multiplied by alpha / rank; left out: twice the rank
        adapter_size: for --train adapters: numbers in the hidden layer
        seed: the same seed splits and trains in the same way on the same machine
        backend: numpy or jax; left out: jax if it is installed, else numpy
        json: print one JSON object
    """
    s = SimpleNamespace(**locals())
    library, out = tuning.prepare(s, CLASSIFY, tuning.METHODS), Path(out)
    examples = labelled.read_table(data)
    labels, parts = labelled.label_names(examples), labelled.split(examples, seed, balance)
    folder = utils.find_model(model_size)
    encoder, hparams, params = utils.load_folder(folder)
    rows, n_cut = tokenize(parts, labels, encoder, hparams["n_ctx"])
    report_data(parts, labels, n_cut, hparams["n_ctx"])
    added, scale = tuning.add_parameters(params, s)
    added = added | {"cls_head": {"w": classifiers.init_head(hparams["n_embd"], len(labels), seed)}}
    start = classifiers.Classifier(encoder, hparams, added, labels, scale)

    def save(trained, evaluation):
        """The base model is written once; later, only the file with what was trained is replaced."""
        with contextlib.nullcontext(out) if out.exists() else new_folder(out) as part:
            if part != out:
                utils.save_tokenizer(folder, part, ["hf"])
                utils.save_model(part, hparams, params, ["hf"], ending=utils.read_ending(folder, encoder, hparams))
            classifiers.save(part, trained, labels, scale, evaluation)

    with locked(out):
        best = classifiers.train(library, start, rows, s, save)
        found = evaluate(library, out, parts, rows["test"], best)
        write_text(out / "result.json", json_library.dumps(found, indent=1) + "\n")
    print(json_library.dumps(found) if json else "\n".join(table(out, labels, found)))


def tokenize(parts, labels, encoder, n_ctx):
    """({part: ([ids of each text], [the number of its label])}, how many texts were cut to n_ctx)."""
    found, n_cut = {}, 0
    for name, part in parts.items():
        rows, n = classifiers.tokenize(encoder, [text for _, text in part], n_ctx)
        found[name], n_cut = (rows, [labels.index(label) for label, _ in part]), n_cut + n
    return found, n_cut


def report_data(parts, labels, n_cut, n_ctx):
    """Prints how many texts there are of each label, and what is odd about them."""
    for name, part in parts.items():
        counts = {label: sum(label == other for other, _ in part) for label in labels}
        shown = ", ".join(f"{n} {label} ({n / len(part):.0%})" for label, n in counts.items())
        print(f"{name}: {len(part):,} texts: {shown}", file=sys.stderr)
    known = {text for _, text in parts["train"]}
    if n_copies := sum(text in known for _, text in parts["test"]):
        print(f"{n_copies} texts of test are in train too, word for word", file=sys.stderr)
    report_cut(n_cut, "text", n_ctx)


def report_cut(n, what, n_ctx):
    """Prints how many texts or examples have lost their beginnings, if any have."""
    if n:
        are = " is" if n == 1 else "s are"
        print(f"{n} {what}{are} longer than {n_ctx} tokens: only the last {n_ctx} are used", file=sys.stderr)


def evaluate(library, folder, parts, rows, best):
    """The figures of the saved classifier on the test part, and those of naive Bayes; draws confusion.png."""
    classifier = classifiers.load(folder)
    answers = classifiers.predict(library, classifier, rows[0]).argmax(axis=-1)
    expected = [label for label, _ in parts["test"]]
    found = labelled.figures(classifier.labels, expected, [classifier.labels[i] for i in answers])
    guesses = labelled.naive_bayes(parts["train"], [text for _, text in parts["test"]])
    found |= {"baseline": labelled.figures(classifier.labels, expected, guesses)["accuracy"]}
    with contextlib.suppress(ModuleNotFoundError), replacing(folder / "confusion.png") as part:
        labelled.draw_confusion(classifier.labels, found["confusion"], part)
    return found | {"epoch": best["epoch"], "validation_accuracy": best["accuracy"], "labels": classifier.labels}


def table(out, labels, found):
    """The lines that classify prints."""
    yield f"test accuracy {found['accuracy']:.1%}; naive Bayes on the same words {found['baseline']:.1%}"
    yield ""
    yield from labelled.report(labels, found)
    yield ""
    yield f"{out} is the classifier of epoch {found['epoch']}, validation accuracy {found['validation_accuracy']:.1%}"


# fmt: off
def instruct(data: str = "", *, model_size: str = "3M", out: str = "models/assistant", train: str = "all",
             train_only: str = "", n_epochs: int | None = None, batch_size: int = 16,
             learning_rate: float | None = None, weight_decay: float = 0.1, dropout: float = 0.1, lora: str = "c_",
             rank: int = 8, alpha: float | None = None, seed: int = 0, backend: str = "", json: bool = False):
    # fmt: on
    """Trains a model to answer, on a JSON list of {"instruction", "input", "output"}; a tenth of them is held out.

    Args:
        data: the JSON file
        model_size: the model to start from: 3M, 124M, 355M, 774M, 1558M or a model folder
        out: the folder to make; gpt2.py --model_size it --chat then answers
        train: what to train: last_block, all or lora
        train_only: train the names that this regular expression is found in: "blocks.[4-5].*|ln_f.*"
        n_epochs: how often to go through the examples; left out: 4
        batch_size: examples for one step
        learning_rate: the peak, after a short warm-up; left out: 1e-3 (lora: 3e-3)
        weight_decay: how much a matrix is pulled towards 0, times the learning rate
        dropout: the share of activations to set to 0 while training, 0 to less than 1
        lora: for --train lora: a regular expression for the names of layers, "attn.c_attn|mlp.c_fc"; c_: all
        rank: for --train lora: the rank of the product that is added to a matrix
        alpha: for --train lora: the product is multiplied by alpha / rank; left out: twice the rank
        seed: the same seed holds out the same examples and trains in the same way on the same machine
        backend: numpy or jax; left out: jax if it is installed, else numpy
        json: print one JSON object
    """
    s = SimpleNamespace(**locals())
    library, out = tuning.prepare(s, INSTRUCT, tuple(INSTRUCT)), Path(out)
    examples, held_out = instructions.split(instructions.read_examples(data), seed)
    folder = utils.find_model(model_size)
    encoder, hparams, params = utils.load_folder(folder)
    if encoder.end_of_text is None:
        raise ValueError(f"the tokenizer of {model_size} has no <|endoftext|>, which is to end an answer")
    n_ctx = hparams["n_ctx"]
    rows, held_rows = ([instructions.tokenize(encoder, e, n_ctx) for e in part] for part in (examples, held_out))
    print(f"{len(examples):,} examples to train on, {len(held_out):,} held out", file=sys.stderr)
    report_cut(sum(cut for *_, cut in rows + held_rows), "example", n_ctx)
    added, scale = tuning.add_parameters(params, s)

    def save(trained, evaluation):
        instructions.save(out, folder, encoder, hparams, params, trained, scale, s, evaluation["epoch"])

    rows, held_rows = ([row[:2] for row in part] for part in (rows, held_rows))
    with locked(out):
        before, best = instructions.train(library, hparams, added, scale, rows, held_rows, s, save)
        shown = held_out[: instructions.N_SHOWN]
        tuned = utils.load_folder(out)[2]
        old, new = (instructions.answers(p, hparams, encoder, backends.get("numpy"), shown) for p in (params, tuned))
        report = instructions.report(shown, old, new, (before, best["held_out"]))
        write_text(out / "report.md", "\n".join(report))
    after = best["held_out"]
    found = {"before": before, "after": after, "change": after / before - 1, "epoch": best["epoch"]}
    text = f"held-out loss per token of the answers: {before:.4f} before, {after:.4f} after ({found['change']:+.1%})"
    print(json_library.dumps(found) if json else f"{text}\n{out / 'report.md'} shows answers before and after")


def predict(model: str = "", text: str = "", *, file: str = "", backend: str = "numpy", json: bool = False):
    """Prints the label of a text and its probability, or of each text in a file, a line for each.

    Args:
        model: a folder made by classify
        text: the text
        file: a file with a text on each line; a .tsv or .csv has labels too, and the accuracy goes to stderr
        backend: numpy or jax
        json: print a JSON object for each text, with the probabilities of all labels
    """
    if not model or bool(text) == bool(file):
        raise ValueError("name a classifier, and either a text or a --file with texts")
    library, classifier = backends.get(backend), classifiers.load(utils.model_folder(model))
    library.setup()
    labels, texts = read_texts(file, classifier.labels) if file else ([], [text])
    for i, some in enumerate(texts, 1):
        if not some.strip():
            raise ValueError(f"{f'{file}, line {i}: ' * bool(file)}an empty text has no label")
    rows, n_cut = classifiers.tokenize(classifier.encoder, texts, classifier.hparams["n_ctx"])
    report_cut(n_cut, "text", classifier.hparams["n_ctx"])
    answers = []
    for some, chances in zip(texts, softmax(classifiers.predict(library, classifier, rows)), strict=True):
        answers.append(classifier.labels[int(chances.argmax())])
        by_label = dict(zip(classifier.labels, map(float, chances), strict=True))
        found = {"text": some, "label": answers[-1], "probabilities": by_label}
        print(json_library.dumps(found, ensure_ascii=False) if json else f"{answers[-1]}\t{max(by_label.values()):.3f}")
    if labels:
        accuracy = np.mean([a == b for a, b in zip(labels, answers, strict=True)])
        print(f"accuracy {accuracy:.1%} on {len(labels):,} texts", file=sys.stderr)


def read_texts(file, known):
    """(labels, texts) of a file, without labels if it is neither .tsv nor .csv. Raises ValueError for a label that is
    not one of the `known` ones."""
    if Path(file).suffix.lower() not in (".tsv", ".csv"):
        texts = read_text(file).removeprefix("\ufeff").splitlines()
        if not texts:
            raise ValueError(f"{file}: no texts")
        return [], texts
    labels, texts = zip(*labelled.read_table(file), strict=True)
    if unknown := set(labels) - set(known):
        raise ValueError(f"{file}: {min(unknown)!r:.40} is no label of this classifier: it has {', '.join(known)}")
    return labels, texts


COMMANDS = {"classify": classify, "predict": predict, "instruct": instruct}

if __name__ == "__main__":
    cli.run(COMMANDS, "-m training.finetune")
