"""weights/library_tokenizer.py: tokenizers of other kinds, against the `tokenizers` library itself."""

import json
import random
import shutil

import pytest
from conftest import GOLDEN, oracle

import encoder
import utils
from weights.library_tokenizer import LibraryTokenizer

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
TEXTS = ["Once upon a time", "", " ", "  two", "it's 12345", "\n\n é日😀", "<|end|>", "a<|end|>b<|begin|>", "x\ud83dy"]


def byte_level(tokenizers):
    """As Llama 3's: another pattern, and a token before each text."""
    ours = encoder.get_encoder(GOLDEN.name, GOLDEN.parent)
    vocab = {spelling: i for spelling, i in ours.ids.items() if i != 511}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [*ours.ranks], ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    found.decoder = tokenizers.decoders.ByteLevel()
    found.add_special_tokens(["<|begin|>", "<|end|>", "<|endoftext|>"])
    found.post_processor = tokenizers.processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 511)])
    return found


def sentence_piece(tokenizers, scheme="first"):
    """As Llama 2's: ▁ for a space, also before a text, and bytes for what has no token."""
    pieces = ["<unk>", "<|begin|>", "<|end|>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Oncepatimshwxyb12345'"]
    merges = [("▁", "t"), ("i", "m"), ("▁t", "im"), ("▁tim", "e"), ("▁", "a"), ("c", "e"), ("▁", "O")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *map("".join, merges)])}
    model = tokenizers.models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    found.add_special_tokens(["<unk>", "<|begin|>", "<|end|>"])
    found.post_processor = tokenizers.processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    return found


KINDS = {"byte-level": byte_level, "SentencePiece": sentence_piece}


@pytest.fixture(params=KINDS)
def both(request, tmp_path):
    """(our object, the library's) for the same file."""
    theirs = KINDS[request.param](oracle("tokenizers"))
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = encoder.get_encoder(tmp_path.name, tmp_path.parent)
    assert isinstance(ours, LibraryTokenizer)
    return ours, theirs


def test_ids_are_the_librarys_and_special_tokens_are_text_unless_allowed(both):
    ours, theirs = both
    rng = random.Random(0)
    texts = TEXTS + ["".join(rng.choices([*"On ce'12\n", "<|end|>", "<|begin|>", "é"], k=12)) for _ in range(200)]
    for text in texts:
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        theirs.encode_special_tokens = False
        assert ours.encode(text, ours.special) == theirs.encode(whole, add_special_tokens=False).ids, text
        assert [*ours.prefix, *ours.encode(text, ours.special)] == theirs.encode(whole).ids, text
        theirs.encode_special_tokens = True
        assert ours.encode(text) == theirs.encode(whole, add_special_tokens=False).ids, text
        assert not {*ours.special.values()} & {*ours.encode(text)}
        decoded = ours.decode(ours.encode(text))
        assert decoded.removeprefix(" ") == whole.removeprefix(" "), "SentencePiece puts a space before a text"
    with pytest.raises(ValueError, match="no special token"):
        ours.encode("a", "<|other|>")


def test_attributes_are_those_of_an_encoder(both):
    ours, theirs = both
    assert ours.ids == theirs.get_vocab()
    assert ours.n_vocab == theirs.get_vocab_size()
    assert ours.spellings[ours.special["<|end|>"]] == "<|end|>"
    assert ours.decode([ours.special["<|end|>"]]) == "<|end|>"
    assert ours.end_of_text == ours.special.get("<|endoftext|>")
    assert utils.first_ids(ours, "Once") == [ours.special["<|begin|>"], *ours.encode("Once")]
    assert utils.first_ids(ours, "") == [ours.special["<|begin|>"]]
    with pytest.raises(ValueError, match="is not in the vocabulary"):
        ours.token_bytes(10**6)
    assert b"".join(map(ours.token_bytes, ours.encode("😀"))).endswith("😀".encode())


@pytest.mark.parametrize(("add", "expected"), [(True, True), (False, False), (None, True)])
def test_tokenizer_config_says_whether_a_token_is_put_before_each_text(tmp_path, add, expected):
    byte_level(oracle("tokenizers")).save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<|begin|>"}} | ({} if add is None else {"add_bos_token": add})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert encoder.get_encoder(tmp_path.name, tmp_path.parent).prefix == (511,) * expected


def test_a_model_with_such_a_tokenizer_answers(tmp_path, command):
    """The golden GPT-2, whose tokens are the same; the front door, batches and beams know nothing of the tokenizer."""
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "hf", folder)
    tokenizer = byte_level(oracle("tokenizers"))
    found = json.loads(tokenizer.to_str())
    found["added_tokens"] = found["added_tokens"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(found), encoding="utf-8")
    arguments = ["Once upon", "--model_size", str(folder), "--n_tokens_to_generate", "3"]
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    assert json.loads(command(*arguments, "--json")[1])["text"] == out.removesuffix("\n")
    assert command(*arguments, "--num_beams", "2")[0] == command(*arguments, "--bad_words", "a")[0] == 0


def test_a_file_that_ends_each_text_and_a_missing_library_are_one_line(tmp_path, command, monkeypatch):
    tokenizers = oracle("tokenizers")
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "hf", folder)
    tokenizer = byte_level(tokenizers)
    end = tokenizers.processors.TemplateProcessing("$A <|end|>", special_tokens=[("<|end|>", 512)])
    tokenizer.post_processor = end
    tokenizer.save(str(folder / "tokenizer.json"))
    status, out, err = command("Once", "--model_size", str(folder))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "post_processor adds tokens after each text" in err
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    status, out, err = command("Once", "--model_size", str(folder))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "python3 -m pip install tokenizers" in err
