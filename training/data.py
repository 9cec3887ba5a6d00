"""Training data: text files to token ids on disk (this program), and these to batches (load, draw, consecutive).

    python -m training.data stories.txt --out data/stories --n_vocab 2048

    data/stories/train.bin, validation.bin    token ids, two bytes each, one after the other; read by memory mapping
    data/stories/encoder.json, vocab.bpe      the tokenizer, learned from the training part or taken from a model

Some documents are held out from training, as validation.bin: the loss on text that a model was trained on also falls
when the model learns that text by heart, so only the loss on other text says how well it predicts.

<|endoftext|> separates the documents of a text file. In the .bin files its id comes before each document, so it ends
one document and begins the next, and a model that is given it as its prompt begins a document.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import json
import sys
from pathlib import Path

import numpy as np

import cli
import utils
from encoder import END_OF_TEXT, SPELL, get_encoder
from utils import save_tokenizer
from weights.files import check_regular, locked, new_folder, read_text, replacing, write_text
from weights.tokenizer import tokenizer_texts

PARTS = ("train", "validation")


def main(text: str = "", *, out: str = "data/mine", n_vocab: int | None = None, encoder: str = "",
         validation: float = 0.1, seed: int = 0):  # fmt: skip
    """Converts a text file, or a folder of .txt files, to token ids on disk for `python -m training.train`.

    Args:
        text: a UTF-8 file or a folder of *.txt; <|endoftext|> separates documents
        out: the folder to make
        n_vocab: tokens of the tokenizer to learn, 257 (the bytes and <|endoftext|>) to 65536; left out: 2048
        encoder: take the tokenizer of this model instead: 124M, or a model folder
        validation: the share of documents to hold out, above 0 and below 1
        seed: chooses the documents to hold out
    """
    if not text:
        raise ValueError("name a text file, or a folder of them")
    if encoder and n_vocab is not None:
        raise ValueError("--n_vocab is for a tokenizer to be learned: leave it out beside --encoder")
    if not 0 < validation < 1:
        raise ValueError(f"--validation {validation} is out of range: above 0 and below 1")
    if (out := Path(out)).exists():
        raise ValueError(f"{out} is there already: delete it, or name another folder with --out")
    parts = dict(zip(PARTS, split(read_documents(Path(text)), validation, seed), strict=True))
    tokenizer = utils.find_model(encoder) if encoder else learn(parts["train"], 2048 if n_vocab is None else n_vocab)
    with locked(out), new_folder(out) as folder:
        write(folder, parts, tokenizer)
    print(out)


def read_documents(path):
    """The documents of a file, or of all *.txt files in a folder, none empty: a list of str. Raises ValueError if there
    are none, OSError for a file that cannot be read, has no end (a pipe, a device), or holds no UTF-8."""
    if not path.exists() or path == Path():
        raise ValueError(f"no file or folder {str(path)!r}: name a text to train on")
    files = sorted(file for file in path.rglob("*.txt") if not file.is_dir()) if path.is_dir() else [path]
    for file in files:
        check_regular(file)
    # A text written on Windows may begin with a byte order mark, and end its lines with "\r\n".
    texts = [read_text(file).removeprefix("\ufeff").replace("\r\n", "\n") for file in files]
    documents = [document.strip("\n") for text in texts for document in text.split(END_OF_TEXT)]
    if not (documents := [document for document in documents if document.strip()]):
        raise ValueError(f"{path}: {'holds no text' if files else 'has no file that ends in .txt'}")
    return documents


def split(documents, share, seed):
    """(training, validation), two lists of whole documents, drawn at random, the same ones for the same seed. If there
    is only one document, it is cut in two, at the end of a line if one is near. Raises ValueError if either part would
    be empty."""
    if len(documents) == 1:
        text, cut = documents[0], round(len(documents[0]) * (1 - share))
        cut = text.find("\n", cut, (cut + len(text)) // 2) + 1 or cut
        parts = [[text[:cut]], [text[cut:]]]
    else:
        n_held_out = max(1, round(len(documents) * share))
        order = np.random.default_rng(seed).permutation(len(documents))
        parts = [[documents[i] for i in sorted(part)] for part in (order[n_held_out:], order[:n_held_out])]
    if not all("".join(part).strip() for part in parts):
        raise ValueError(f"too little text to hold out {share} of it: {sum(map(len, documents))} characters")
    return parts


# ---- Tokens ----


def learn(documents, n_vocab):
    """Learns a byte-level BPE of n_vocab tokens -> the texts of (encoder.json, vocab.bpe) in OpenAI's layout: the 256
    bytes in GPT-2's order, then the tokens that merges make, <|endoftext|> last. Raises ValueError if the text has too
    few pairs to merge."""
    if not len(SPELL) + 1 <= n_vocab <= 65536:
        raise ValueError(f"--n_vocab {n_vocab} is out of range: 257 (bytes, {END_OF_TEXT}) to 65536 (two bytes an id)")
    merges = [] if n_vocab == len(SPELL) + 1 else learn_merges(documents, n_vocab - 1)
    spellings = list(dict.fromkeys([*SPELL.values(), *("".join(merge) for merge in merges), END_OF_TEXT]))
    if len(spellings) < n_vocab:
        raise ValueError(f"--n_vocab {n_vocab} is more than this text can give: {len(spellings)} at most")
    return tokenizer_texts({spelling: i for i, spelling in enumerate(spellings)}, merges)


def learn_merges(documents, n_tokens):
    """The pairs to merge, the most frequent first, until there are n_tokens tokens: the 256 bytes and what each merge
    makes (Sennrich et al. 2016, section 3.2)."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ModuleNotFoundError:
        raise ValueError(
            "merges are learned with tokenizers: python3 -m pip install tokenizers, or train on bytes: --n_vocab 257"
        ) from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits as encoder.PIECES does
    alphabet = list(SPELL.values())
    trainer = trainers.BpeTrainer(vocab_size=n_tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def write(out, parts, tokenizer):
    """Writes the tokenizer and the ids of `parts`, {"train", "validation": documents}, into the folder `out`.
    `tokenizer` is what `learn` returned, or the folder of a model."""
    if isinstance(tokenizer, Path):
        save_tokenizer(tokenizer, out, ["tf"])
    else:
        write_text(out / "encoder.json", tokenizer[0])
        write_text(out / "vocab.bpe", tokenizer[1])
    encoder = get_encoder(out.name, out.parent)
    if len(encoder.ids) > 65536:
        raise ValueError(f"{tokenizer} has {len(encoder.ids)} tokens: two bytes an id are enough for 65536")
    if encoder.end_of_text is None:
        print(f"this tokenizer has no {END_OF_TEXT}: documents will follow each other unmarked", file=sys.stderr)
    for name, documents in parts.items():
        ids = tokenize(documents, encoder)
        with replacing(out / f"{name}.bin") as part:
            part.write_bytes(np.asarray(ids, "<u2").tobytes())
        n_bytes = sum(len(document.encode("utf-8", "replace")) for document in documents)
        print(f"{name}.bin: {len(documents):,} documents, {n_bytes:,} bytes, {len(ids):,} tokens")


def tokenize(documents, encoder):
    """The ids of all documents, with that of <|endoftext|> before each (where the encoder has one)."""
    start = [] if encoder.end_of_text is None else [encoder.end_of_text]
    return [i for document in documents for i in start + encoder.encode(document)]


# ---- Batches ----


def load(folder, n_ctx):
    """(encoder, {"train", "validation": ids}) from a folder made by main; the ids, [n] uint16, are memory-mapped.
    Raises ValueError for a context longer than the text, OSError for files that are damaged."""
    folder = Path(folder)
    if not all((folder / f"{name}.bin").is_file() for name in PARTS):
        raise ValueError(f"{str(folder)!r} has no train.bin and validation.bin: python -m training.data makes them")
    for name in PARTS:
        if (n_bytes := (folder / f"{name}.bin").stat().st_size) < 4 or n_bytes % 2:
            raise OSError(f"{folder / name}.bin has {n_bytes} bytes: two for each token, and two tokens, are the least")
    ids = {name: np.memmap(folder / f"{name}.bin", "<u2", mode="r") for name in PARTS}
    encoder = get_encoder(folder.name, folder.parent)
    if (largest := max(int(part.max()) for part in ids.values())) >= len(encoder.ids):
        raise OSError(f"{folder}: id {largest} is outside its tokenizer's vocabulary of {len(encoder.ids)}")
    if len(ids["train"]) <= n_ctx:
        raise ValueError(
            f"{folder / 'train.bin'} has {len(ids['train'])} tokens, fewer than --n_ctx {n_ctx} and the one after: "
            f"--n_ctx {max(len(ids['train']) - 1, 0)} at most, or more text"
        )
    return encoder, ids


def draw(ids, n_ctx, n_rows, seed, step, rows=slice(None)):
    """The batch of a step: n_rows windows of n_ctx + 1 ids from random places, [n_rows, n_ctx + 1], or these `rows` of
    it alone. It depends on the arguments alone, so a run that is resumed continues with the batches that it would have
    had."""
    starts = np.random.default_rng((seed, step)).integers(0, len(ids) - n_ctx, n_rows)[rows]
    return np.stack([ids[i : i + n_ctx + 1] for i in starts]).astype(np.int32)


def consecutive(ids, n_ctx, n_most):
    """Consecutive windows, [n_rows, n_ctx + 1]. Each begins with the last id of the one before, so each id is predicted
    once. As many as fit into the text, or n_most spread over it. A short text is one short window."""
    n_ctx = min(n_ctx, len(ids) - 1)
    starts = np.arange(0, len(ids) - n_ctx, n_ctx)
    starts = starts[np.linspace(0, len(starts) - 1, min(len(starts), n_most)).astype(int)]
    return np.stack([ids[i : i + n_ctx + 1] for i in starts]).astype(np.int32)


if __name__ == "__main__":
    cli.run(main, "-m training.data")
