"""From text to batches: against tokenizers, and by properties."""

import json
import os
import sys

import numpy as np
import pytest
from conftest import GOLDEN, STORIES, oracle

from encoder import END_OF_TEXT, SPELL, get_encoder
from training import data

TEXTS = [
    "The cat sat on the mat. " * 4,
    "A dög ran.\n\nIt was fast — and glad! 🐕\n" * 5,
    "One day, one day, one day.",
] * 7


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(END_OF_TEXT.join(TEXTS), encoding="utf-8")
    return path


def prepare(command, text, out, *flags):
    return command(str(text), "--out", str(out), *flags, main=data.main)


def test_ids_on_disk_are_the_text(command, text, tmp_path):
    oracle("tokenizers")
    status, out, err = prepare(command, text, tmp_path / "data", "--n_vocab", "300", "--validation", "0.25")
    assert (status, err, out.count("\n")) == (0, "", 3)
    encoder, ids = data.load(tmp_path / "data", n_ctx=8)
    documents = [document for name in data.PARTS for document in encoder.decode(ids[name]).split(END_OF_TEXT)[1:]]
    assert sorted(documents) == sorted(t.strip("\n") for t in TEXTS)
    assert encoder.end_of_text == len(encoder.ids) - 1 == 299
    assert (ids["train"] == 299).sum() + (ids["validation"] == 299).sum() == len(TEXTS), "its id, never its spelling"
    assert (ids["validation"] == 299).sum() == round(len(TEXTS) * 0.25)
    assert ids["train"].dtype == "<u2"
    assert isinstance(ids["train"], np.memmap)


def test_the_tokenizer_is_what_tokenizers_learned(tmp_path):
    """In OpenAI's two files, ids in GPT-2's order, and read by our encoder to the same tokens."""
    tokenizers = oracle("tokenizers")
    documents = TEXTS + ["straße naïve 'tis we'll 123 4567\t\r\n  end"]
    ids, merges = data.learn(documents, 290)
    (tmp_path / "encoder.json").write_text(ids, encoding="utf-8")
    (tmp_path / "vocab.bpe").write_text(merges, encoding="utf-8")
    encoder = get_encoder(tmp_path.name, tmp_path.parent)
    spellings = list(json.loads(ids))
    assert len(spellings) == 290
    assert spellings[:256] == list(SPELL.values())
    assert spellings[-1] == END_OF_TEXT
    theirs = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "encoder.json"), str(tmp_path / "vocab.bpe"))
    for document in documents:
        assert encoder.encode(document) == theirs.encode(document).ids


def test_stories_as_the_embedded_model_knows_them(command, tmp_path):
    """A tokenizer is learned from them, or reused."""
    oracle("tokenizers")
    assert prepare(command, STORIES, tmp_path / "a", "--n_vocab", "600")[0] == 0
    assert prepare(command, STORIES, tmp_path / "b", "--encoder", "3M")[0] == 0
    encoder, ids = data.load(tmp_path / "b", 256)
    assert encoder.ids == get_encoder("3M", data.utils.MODELS_DIR).ids
    assert sum((part == 2047).sum() for part in ids.values()) == 6


def test_a_folder_of_texts(command, text, tmp_path):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    for i, document in enumerate(TEXTS[:4]):
        (tmp_path / "texts" / ("more" if i % 2 else ".") / f"{i}.txt").write_text(document, encoding="utf-8")
    (tmp_path / "texts" / "notes.md").write_text("not this one", encoding="utf-8")
    assert len(data.read_documents(tmp_path / "texts")) == 4


def test_a_folder_named_like_a_text_is_looked_into(command, text, tmp_path):
    inner = tmp_path / "texts" / "book.txt"
    inner.mkdir(parents=True)
    (inner / "chapter.txt").write_text("one\ntwo\nthree\n" * 20, encoding="utf-8")
    assert len(data.read_documents(tmp_path / "texts")) == 1
    assert prepare(command, tmp_path / "texts", tmp_path / "data", "--n_vocab", "257")[0] == 0
    assert len(data.read_documents(inner)) == 1, "named itself"
    (tmp_path / "empty.txt").mkdir()
    assert "has no file that ends in .txt" in prepare(command, tmp_path / "empty.txt", tmp_path / "new")[2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_may_have_no_end_is_not_read(command, tmp_path):
    (tmp_path / "texts").mkdir()
    os.mkfifo(tmp_path / "texts" / "pipe.txt")
    for name in (tmp_path / "texts", tmp_path / "texts" / "pipe.txt", "/dev/zero"):
        status, out, err = prepare(command, name, tmp_path / "data")
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert "a pipe or a device, not a file" in err


@pytest.mark.parametrize("n", [2, 3, 10, 57])
def test_a_split_is_by_document_and_seed(n):
    documents = [f"document {i}" for i in range(n)]
    train, held_out = data.split(documents, 0.1, seed=3)
    assert sorted(train + held_out) == sorted(documents)
    assert len(held_out) == max(1, round(n / 10))
    assert data.split(documents, 0.1, seed=3) == [train, held_out]
    assert n < 10 or any(data.split(documents, 0.1, seed)[1] != held_out for seed in range(4))


def test_one_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    (train,), (held_out,) = data.split([text], 0.1, seed=0)
    assert train + held_out == text
    assert train.endswith("\n")
    assert 0.05 < len(held_out) / len(text) < 0.1
    (train,), (held_out,) = data.split(["word " * 200 + "\nend"], 0.1, seed=0)
    assert len(held_out) == 100, "the next line's end is too far away"


def test_texts_as_windows_writes_them(tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffOne\r\ntwo<|endoftext|>\r\nthree\r\n".encode())
    assert data.read_documents(tmp_path / "text.txt") == ["One\ntwo", "three"]


def test_windows_are_drawn_by_seed_and_step_from_everywhere():
    ids = np.arange(40, dtype="<u2")
    draw = data.draw(ids, 8, 500, seed=1, step=2)
    assert draw.shape == (500, 9)
    assert (np.diff(draw) == 1).all()
    assert set(draw[:, 0]) == set(range(32)), "from the first id on, up to the last"
    assert np.array_equal(draw, data.draw(ids, 8, 500, seed=1, step=2))
    for seed, step in [(1, 3), (2, 2), (2, 1)]:
        assert not np.array_equal(draw, data.draw(ids, 8, 500, seed, step))


@pytest.mark.parametrize("n", [2, 3, 8, 9, 10, 17, 40])
def test_consecutive_windows_predict_each_id_once(n):
    windows = data.consecutive(np.arange(n), 8, n_most=100)
    targets = windows[:, 1:].reshape(-1)
    assert (np.diff(windows) == 1).all()
    assert np.array_equal(targets, np.arange(1, len(targets) + 1))
    assert n - len(targets) <= 8
    spread = data.consecutive(np.arange(8000), 8, n_most=5)
    assert len(spread) == 5
    assert (spread[0, 0], spread[-1, 0]) == (0, 7984)


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (b"", [], "holds no text"),
        (b"\xef\xbb\xbf\r\n", [], "holds no text"),
        (b"<|endoftext|>\n\n<|endoftext|>", [], "holds no text"),
        ("Gr\xfc\xdfe".encode("latin-1"), [], "no UTF-8 text"),
        (b"some text", ["--encoder", "{tmp}"], "vocab.bpe: No such file"),
        (b"short text, one line", ["--n_vocab", "5000"], "is more than this text can give: 2"),
        (b"x", [], "too little text to hold out"),
        (b"some text", ["--n_vocab", "256"], "out of range: 257"),
        (b"some text", ["--n_vocab", "70000"], "to 65536"),
        (b"some text", ["--validation", "1"], "--validation 1.0 is out of range"),
        (b"some text", ["--encoder", "3M", "--n_vocab", "300"], "leave it out beside --encoder"),
        (b"some text", ["--encoder", "nowhere"], "no model 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(content, flags, words, command, tmp_path):
    oracle("tokenizers")
    (tmp_path / "text.txt").write_bytes(content)
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    status, out, err = prepare(command, tmp_path / "text.txt", tmp_path / "data", *flags)
    assert (status, out, err.count("\n")) == (1 if words.startswith(("no UTF-8", "vocab.bpe")) else 2, "", 1)
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_what_is_there_is_not_overwritten(command, tmp_path, text):
    (tmp_path / "data").mkdir()
    assert "is there already" in prepare(command, text, tmp_path / "data")[2]
    assert "no file or folder" in prepare(command, tmp_path / "nothing.txt", tmp_path / "new")[2]
    (tmp_path / "empty").mkdir()
    assert "has no file that ends in .txt" in prepare(command, tmp_path / "empty", tmp_path / "new")[2]


def test_data_shorter_than_the_context(command, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a tiny text.\nThe end.\n", encoding="utf-8")
    prepare(command, tmp_path / "text.txt", tmp_path / "data", "--encoder", str(GOLDEN))
    with pytest.raises(ValueError, match=r"--n_ctx 1[0-9] at most, or more text"):
        data.load(tmp_path / "data", n_ctx=64)
    with pytest.raises(ValueError, match=r"training\.data makes them"):
        data.load(tmp_path, n_ctx=64)
    (tmp_path / "data" / "validation.bin").write_bytes(b"\1\0")
    with pytest.raises(OSError, match=r"validation\.bin has 2 bytes"):
        data.load(tmp_path / "data", n_ctx=8)
    (tmp_path / "data" / "validation.bin").write_bytes(b"\xff\xff\0\0")
    with pytest.raises(OSError, match="id 65535 is outside"):
        data.load(tmp_path / "data", n_ctx=8)


def test_a_missing_tokenizers_is_one_line(command, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    status, _, err = prepare(command, text, tmp_path / "data")
    assert (status, err.count("\n")) == (2, 1)
    assert "python3 -m pip install tokenizers, or train on bytes: --n_vocab 257" in err


def test_bytes_need_no_tokenizers_and_are_what_it_would_give(command, text, tmp_path, monkeypatch):
    oracle("tokenizers")
    assert data.learn_merges(TEXTS, 256) == []
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    status, _, err = prepare(command, text, tmp_path / "data", "--n_vocab", "257")
    assert (status, err) == (0, "")
    encoder, ids = data.load(tmp_path / "data", n_ctx=8)
    assert (len(encoder.ids), encoder.end_of_text) == (257, 256)
    found = b"".join(encoder.token_bytes(i) for name in data.PARTS for i in ids[name] if i != 256)
    assert sorted(found) == sorted("".join(t.strip("\n") for t in TEXTS).encode())
