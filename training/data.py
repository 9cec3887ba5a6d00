"""Text to train on: from files to token ids, and from these to batches.

    python -m training.data stories.txt --out data/stories --n_vocab 2048

    data/stories/train.bin, validation.bin    the ids, two bytes each, end to end, mapped into memory
    data/stories/encoder.json, vocab.bpe      the tokenizer, learned from the training part or taken from a model

<|endoftext|> separates the documents of a text file. In the .bin files its id stands before each document: so it ends
one and starts the next, and a model that is asked to begin with it begins a document.
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
from encoder import END_OF_TEXT, SPELL, get_encoder, read_text
from save import new_folder, replacing, save_tokenizer, write_text

PARTS = ("train", "validation")


def main(text: str = "", *, out: str = "data/mine", n_vocab: int | None = None, encoder: str = "",
         validation: float = 0.1, seed: int = 0):  # fmt: skip
    """A text file, or a folder of .txt files, to token ids on disk, ready for `python -m training.train`.

    Args:
        text: a UTF-8 file or a folder of *.txt; <|endoftext|> separates documents
        out: the folder to make
        n_vocab: how many tokens the tokenizer is to learn, 257 to 65536; left out: 2048
        encoder: take the tokenizer of this model instead: 124M, or a model folder
        validation: the share of documents to hold out, above 0 and below 1
        seed: which ones
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
    with new_folder(out) as folder:
        write(folder, parts, tokenizer)
    print(out)


def read_documents(path):
    """The documents of a file or folder, none empty. Raises ValueError if there are none, OSError if one is no text."""
    if not path.exists() or path == Path():
        raise ValueError(f"no file or folder {str(path)!r}: name a text to train on")
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    # As Windows writes it, a text may begin with a mark and end its lines with two characters.
    texts = [read_text(file).removeprefix("\ufeff").replace("\r\n", "\n") for file in files]
    documents = [document.strip("\n") for text in texts for document in text.split(END_OF_TEXT)]
    if not (documents := [document for document in documents if document.strip()]):
        raise ValueError(f"{path}: {'holds no text' if files else 'has no file that ends in .txt'}")
    return documents


def split(documents, share, seed):
    """(training, validation): whole documents, drawn by the seed. One document alone is cut in two, at a line's end if
    one is near. Raises ValueError if either would be empty."""
    if len(documents) == 1:
        text, cut = documents[0], round(len(documents[0]) * (1 - share))
        cut = text.find("\n", cut, (cut + len(text)) // 2) + 1 or cut
        parts = [[text[:cut]], [text[cut:]]]
    else:
        n_held_out = max(1, round(len(documents) * share))
        order = np.random.default_rng(seed).permutation(len(documents))
        held_out = {int(i) for i in order[:n_held_out]}
        parts = [[d for i, d in enumerate(documents) if (i in held_out) is wanted] for wanted in (False, True)]
    if not all("".join(part).strip() for part in parts):
        raise ValueError(f"too little text to hold out {share} of it: {sum(map(len, documents))} characters")
    return parts


# ---- Tokens ----


def learn(documents, n_vocab):
    """A byte-level BPE of n_vocab tokens -> the texts of (encoder.json, vocab.bpe), as OpenAI has them: 256 bytes in
    GPT-2's order, what merges make of them, <|endoftext|> last. Raises ValueError if the text gives fewer."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ModuleNotFoundError:
        raise ValueError("a tokenizer is learned with tokenizers: python3 -m pip install tokenizers") from None
    if not len(SPELL) + 1 <= n_vocab <= 65536:
        raise ValueError(f"--n_vocab {n_vocab} is out of range: 257 (bytes, {END_OF_TEXT}) to 65536 (two bytes an id)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # which splits as encoder.PIECES does
    alphabet = list(SPELL.values())
    trainer = trainers.BpeTrainer(vocab_size=n_vocab - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    spellings = list(dict.fromkeys([*SPELL.values(), *("".join(merge) for merge in merges), END_OF_TEXT]))
    if len(spellings) < n_vocab:
        raise ValueError(f"--n_vocab {n_vocab} is more than this text can give: {len(spellings)} at most")
    ids = {spelling: i for i, spelling in enumerate(spellings)}
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    return json.dumps(ids, ensure_ascii=False), "\n".join(lines) + "\n"


def write(out, parts, tokenizer):
    """Fills the folder `out`; `tokenizer` is what `learn` returned, or a folder."""
    if isinstance(tokenizer, Path):
        save_tokenizer(tokenizer, out, ["tf"])
    else:
        write_text(out / "encoder.json", tokenizer[0])
        write_text(out / "vocab.bpe", tokenizer[1])
    encoder = get_encoder(out.name, out.parent)
    if len(encoder.ids) > 65536:
        raise ValueError(f"{tokenizer} has {len(encoder.ids)} tokens: two bytes an id are enough for 65536")
    if encoder.end_of_text is None:
        print(f"this tokenizer has no {END_OF_TEXT}: nothing will stand between documents", file=sys.stderr)
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
    """(encoder, {"train", "validation": ids}) from a folder made by main; the ids [n] are mapped. Raises
    ValueError for a context that is longer than the text, OSError for files that are damaged."""
    folder = Path(folder)
    if not all((folder / f"{name}.bin").exists() for name in PARTS):
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


def draw(ids, n_ctx, n_rows, seed, step):
    """The batch of a step: windows [n_rows, n_ctx + 1] from anywhere in ids. Made of its arguments alone, so a run that
    was interrupted goes on with the very batches it would have had."""
    starts = np.random.default_rng((seed, step)).integers(0, len(ids) - n_ctx, n_rows)
    return np.stack([ids[i : i + n_ctx + 1] for i in starts]).astype(np.int32)


def consecutive(ids, n_ctx, n_most):
    """Windows side by side, [n_rows, n_ctx + 1], each beginning with the id that the one before ended with: no id is
    predicted twice. As many as fit into the text, or n_most spread over it. A short text is one short window."""
    n_ctx = min(n_ctx, len(ids) - 1)
    starts = np.arange(0, len(ids) - n_ctx, n_ctx)
    starts = starts[np.linspace(0, len(starts) - 1, min(len(starts), n_most)).astype(int)]
    return np.stack([ids[i : i + n_ctx + 1] for i in starts]).astype(np.int32)


if __name__ == "__main__":
    cli.run(main, "-m training.data")
