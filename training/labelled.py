"""Texts with labels: read from a file, divided into parts, and the figures that say how well a classifier does.

    spam<TAB>WINNER!! Call 0906 to claim your prize      one line for each text: its label, a tab, the text
    label,text                                           or a CSV file; the line with the names of the columns may
    spam,"WINNER!! Call 0906 to claim your prize"        be left out if these two are all

A classifier is trained on one part, the best moment to stop is chosen by a second (validation), and the reported
figures come from a third (test), which had no influence on anything.
"""

import csv
import io
import re
from pathlib import Path

import numpy as np

from weights.files import check_regular, read_text

PARTS = {"train": 0.7, "validation": 0.1, "test": 0.2}
MAX_LABELS = 1000


def read_table(path):
    """[(label, text)] of a TSV or CSV file. Raises ValueError naming the line for a missing column, an empty label or
    an empty text, OSError for a file that cannot be read."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no file {str(path)!r:.80}: name one with a label, a tab and a text on each line")
    check_regular(path)
    content = read_text(path).removeprefix("\ufeff")
    is_csv = path.suffix.lower() == ".csv" or "\t" not in content
    lines = list(csv.reader(io.StringIO(content))) if is_csv else [line.split("\t") for line in content.splitlines()]
    lines = [(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if any(cell.strip() for cell in line)]
    if not lines:
        raise ValueError(f"{path}: no texts")
    header = [cell.strip().lower() for cell in lines[0][1]]
    if "label" in header or "text" in header:
        if not {"label", "text"} <= set(header):
            raise ValueError(f"{path}: the columns label and text are needed, there are {', '.join(header)}")
        lines = lines[1:]
    else:
        header = ["label", "text"]
    return [read_line(place, line, header) for place, line in lines]


def read_line(place, line, header):
    """The (label, text) of a line; `place` names it in the error."""
    if len(line) != len(header):
        raise ValueError(f"{place}: {len(line)} columns, not {len(header)}: {', '.join(header)}")
    label, text = (line[header.index(name)].strip() for name in ("label", "text"))
    if not label or not text:
        raise ValueError(f"{place}: an empty {'text' if label else 'label'}")
    return label, text


def label_names(examples):
    """The labels in alphabetical order. Raises ValueError if there are too few or too many to learn."""
    counts = {label: 0 for label, _ in examples}
    for label, _ in examples:
        counts[label] += 1
    if len(counts) < 2:
        raise ValueError(f"all texts have the label {next(iter(counts))!r:.40}: two different labels are the least")
    if len(counts) > MAX_LABELS:
        raise ValueError(f"{len(counts):,} different labels, {MAX_LABELS} at most: is the label in the first column?")
    if rare := [label for label, n in counts.items() if n < len(PARTS)]:
        raise ValueError(
            f"the label {rare[0]!r:.40} has {counts[rare[0]]} texts: {len(PARTS)}, one for each part, are the least"
        )
    return sorted(counts)


def split(examples, seed, balance=False):
    """{"train", "validation", "test": [(label, text)]}. Each label is divided in the same proportions (a stratified
    split), at random by the seed. With balance, each label has only as many texts as the rarest one."""
    rng, parts = np.random.default_rng(seed), {name: [] for name in PARTS}
    groups = {name: [example for example in examples if example[0] == name] for name in label_names(examples)}
    fewest = min(map(len, groups.values()))
    for group in groups.values():
        chosen = [group[i] for i in rng.permutation(len(group))][: fewest if balance else None]
        n_test, n_validation = (max(1, round(len(chosen) * PARTS[name])) for name in ("test", "validation"))
        cuts = {"test": chosen[:n_test], "validation": chosen[n_test : n_test + n_validation]}
        cuts["train"] = chosen[n_test + n_validation :]
        for name, part in cuts.items():
            parts[name] += part
    return parts


# ---- A baseline ----


def words(text):
    return re.findall(r"\w+", text.lower())


def naive_bayes(train, texts):
    """The label of each text by multinomial naive Bayes on its words (McCallum & Nigam 1998, section 2.2): the most
    probable label if each word were drawn independently, with the frequencies of the training texts. Each count starts
    at 1, so that no word has probability 0."""
    labels = sorted({label for label, _ in train})
    column = {word: i for i, word in enumerate(sorted({word for _, text in train for word in words(text)}))}
    counts, n_texts = np.ones((len(labels), len(column))), np.zeros(len(labels))
    for label, text in train:
        n_texts[labels.index(label)] += 1
        np.add.at(counts[labels.index(label)], [column[word] for word in words(text)], 1)
    scores = np.log(counts / counts.sum(axis=1, keepdims=True))  # -> [n_labels, n_words]
    prior = np.log(n_texts / n_texts.sum())
    known = ([column[word] for word in words(text) if word in column] for text in texts)
    return [labels[int(np.argmax(prior + scores[:, found].sum(axis=1)))] for found in known]


# ---- Figures ----


def figures(labels, expected, found):
    """{"accuracy", "confusion": [n_labels, n_labels], "precision": {label}, "recall": {label}} of two lists of labels.
    Row i of the confusion matrix counts the texts of label i, column j those of them that were given label j."""
    confusion = np.zeros((len(labels), len(labels)), int)
    for right, answer in zip(expected, found, strict=True):
        confusion[labels.index(right), labels.index(answer)] += 1
    hits, n_found, n_right = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    precision, recall = hits / np.maximum(n_found, 1), hits / np.maximum(n_right, 1)
    return {"accuracy": float(hits.sum() / max(len(expected), 1)), "confusion": confusion.tolist(),
            "precision": dict(zip(labels, precision.tolist(), strict=True)),
            "recall": dict(zip(labels, recall.tolist(), strict=True))}  # fmt: skip


def report(labels, found):
    """Lines of text that show the result of figures."""
    width = max(10, *(len(label[:20]) for label in labels)) + 2
    yield f"{'':{width}}" + "".join(f"{label[:20]:>{width}}" for label in labels) + "  <- answer of the classifier"
    for label, row in zip(labels, found["confusion"], strict=True):
        yield f"{label[:20]:{width}}" + "".join(f"{n:>{width}}" for n in row)
    yield ""
    yield f"{'':{width}}{'precision':>{width}}{'recall':>{width}}"
    for label in labels:
        yield f"{label[:20]:{width}}{found['precision'][label]:>{width}.1%}{found['recall'][label]:>{width}.1%}"


def draw_confusion(labels, confusion, path):
    """Draws the confusion matrix into the PNG file `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4, 3.6), layout="constrained")
    axis.imshow(confusion, cmap="Blues")
    for i, row in enumerate(confusion):
        for j, n in enumerate(row):
            axis.text(j, i, n, ha="center", va="center", color="white" if 2 * n > np.max(confusion) else "black")
    axis.set(xlabel="answer of the classifier", ylabel="label", xticks=range(len(labels)), yticks=range(len(labels)))
    axis.set_xticklabels(labels)
    axis.set_yticklabels(labels)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
