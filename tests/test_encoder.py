"""The tokenizer against tiktoken and tokenizers built from the same two files, published ids, and hard texts."""

import itertools
import json
import random

import numpy as np
import pytest
import regex
from conftest import GOLDEN, ROOT, STORIES, openai_tokenizer, oracle

import encoder

LONG_EXAMPLE = "292 7568 355 7568 292 7568 257 3228 11 2488 15498 860 292 7568 3829 292 7568 74"
PUBLISHED = {  # tiktoken's tests/test_encoding.py, picoGPT's README, and the tests of LLMs-from-scratch
    "hello world": [31373, 995],
    "": [],
    "0": [15],
    "00": [405],
    "000": [830],
    "0000": [2388],
    "00000": [20483],
    "000000": [10535],
    "0000000": [24598],
    "00000000": [8269],
    "0" * 9: [10535, 830],
    "0" * 10: [8269, 405],
    "0" * 16: [25645],
    "0" * 17: [8269, 10535, 830],
    "Not all heroes wear capes.": [3673, 477, 10281, 5806, 1451, 274, 13],
    "Hello, world. Is this-- a test?": [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30],
    "This is some text": [1212, 318, 617, 2420],
    "Implementations": [3546, 26908, 602],
    "asdf asdfasdf a!!, @aba 9asdf90asdfk": [int(i) for i in LONG_EXAMPLE.split()],
    "\n": [198],
    "Hello, I am": [15496, 11, 314, 716],
    "Every effort moves you": [6109, 3626, 6100, 345],
    "London": [23421],
    " London": [3576],
}
FOLDERS = {  # the two small tokenizers are part of the repository, OpenAI's is not
    "golden": lambda: GOLDEN,
    "3M": lambda: ROOT / "models" / "3M",
    "openai": openai_tokenizer,
}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request):
    return FOLDERS[request.param]()


@pytest.fixture(scope="module")
def ours(folder):
    return encoder.get_encoder(folder.name, folder.parent)


@pytest.fixture(scope="module")
def openai():
    return encoder.get_encoder("", openai_tokenizer())


def tiktoken_of(folder):
    tiktoken = oracle("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ours = encoder.get_encoder(folder.name, folder.parent)
    if folder == openai_tokenizer():  # its ids follow the ranks, which this function of tiktoken's demands
        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    else:
        ranks = {ours.token_bytes(i): i for i in ours.spellings if i != ours.end_of_text}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    special = {encoder.END_OF_TEXT: ours.end_of_text}
    theirs = tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return theirs.encode_ordinary


def tokenizers_of(folder):
    tokenizers = oracle("tokenizers")
    model = tokenizers.models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return lambda text: theirs.encode(text).ids


def random_texts(n, seed=0):
    """Texts from all of Unicode, from its first pages, and from characters at which tokenizers differ."""
    rng = random.Random(seed)
    tricky = " \n\t\r'sdmtlreAbcé019.,!日🙂👍🏽\u2028\u0085\u00a0\u200b\u0301\x1c\0"
    for _ in range(n):
        top = rng.choice([0x110000, 0x3000, 0x250, None])
        letters = [rng.choice(tricky) if top is None else chr(rng.randrange(top)) for _ in range(rng.randrange(60))]
        yield encoder.replace_lone_surrogates("".join(letters))


@pytest.mark.parametrize("oracle_of", [tiktoken_of, tokenizers_of])
def test_random_texts_equal_the_oracle(folder, ours, oracle_of):
    oracle = oracle_of(folder)
    for text in [*random_texts(2000), *PUBLISHED]:
        assert ours.encode(text) == oracle(text), repr(text)


@pytest.fixture(scope="module")
def prose(openai):
    """(a text, its ids): the stories and the text of this repository, and 600,000 characters of their words and signs
    in any order."""
    files = [STORIES, ROOT / "models" / "3M" / "README.md", *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/*.py"))]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    text += "".join(random.Random(0).choices(regex.split(r"(\W)", text), k=300_000))
    assert len(text) > 600_000
    return text, openai.encode(text)


@pytest.mark.parametrize("oracle_of", [tiktoken_of, tokenizers_of])
def test_prose_and_code_equal_the_oracle(prose, oracle_of):
    text, ids = prose
    assert ids == oracle_of(openai_tokenizer())(text)


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_ids(openai, text):
    assert openai.encode(text) == PUBLISHED[text]


def test_published_pieces(openai):
    assert [openai.decode([i]) for i in openai.encode("zjqfl")] == ["z", "j", "q", "fl"]


def test_decode_undoes_encode(ours):
    for text in random_texts(300, seed=1):
        ids = ours.encode(text)
        assert ours.decode(ids) == text


@pytest.mark.parametrize("unit", ["a", "^", " ", "\n", "0", "'s", "ab", "é"])
def test_a_long_run_of_the_same(openai, unit):
    text = unit * ((1_000_000 if unit == "a" else 100_000) // len(unit))
    ids = openai.encode(text)
    assert openai.decode(ids) == text
    assert openai._cached_encode_piece.cache_info().currsize <= 2**16


def test_cost_of_a_long_piece_grows_about_linearly(ours):
    """Counted, not timed: a merge that searches all pairs again would look ranks up a million times here."""

    class Counting(dict):
        lookups = 0

        def get(self, *args):
            Counting.lookups += 1
            return dict.get(self, *args)

    symbols = [encoder.SPELL[byte] for byte in b"a thousand and one " * 250]
    encoder.merge(symbols, Counting(ours.ranks))
    assert Counting.lookups < 6 * len(symbols)


def test_merge_takes_the_lowest_rank_first_and_goes_from_left_to_right():
    assert encoder.merge(list("hello"), {("l", "l"): 0, ("h", "e"): 1, ("he", "ll"): 2}) == ["hell", "o"]
    assert encoder.merge(list("aaa"), {("a", "a"): 0}) == ["aa", "a"]
    assert encoder.merge(list("abc"), {("b", "c"): 0, ("a", "b"): 1}) == ["a", "bc"]
    assert encoder.merge([], {}) == []


def merge_one_by_one(symbols, ranks):
    """The best pair, the leftmost one if it occurs several times, is merged; then all pairs are looked at again."""
    symbols = list(symbols)
    while found := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]:
        i = min(found)[1]
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    return symbols


def merge_everywhere(symbols, ranks):
    """The algorithm as its paper gives it: the best pair is merged wherever it occurs; then all pairs are looked at
    again."""
    while pairs := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
        best, merged, i = min(pairs, key=ranks.get), [], 0
        while i < len(symbols):
            n = 2 if tuple(symbols[i : i + 2]) == best else 1
            merged.append("".join(symbols[i : i + n]))
            i += n
        symbols = merged
    return symbols


@pytest.mark.parametrize("plain", [merge_one_by_one, merge_everywhere])
def test_merge_equals_the_plain_algorithm(plain):
    """The two differ only for ranks that no training gives: where a merge makes a pair that has a lower rank than its
    own. The first, which is that of tiktoken and tokenizers, is compared for such ranks too."""
    rng = random.Random(3)
    for _ in range(3000):
        known, pairs = ["a", "b"], []
        for _ in range(rng.randrange(8)):
            pairs.append((rng.choice(known), rng.choice(known)))
            known.append("".join(pairs[-1]))
        if plain is merge_one_by_one:
            rng.shuffle(pairs)
        else:  # one way to each symbol, and each is made before it is used
            made = {"".join(pair): pair for pair in reversed(pairs)}
            pairs = [pair for pair in dict.fromkeys(pairs) if made["".join(pair)] == pair]
        ranks = {pair: rank for rank, pair in enumerate(dict.fromkeys(pairs))}
        symbols = rng.choices("ab", k=rng.randrange(30))
        assert encoder.merge(symbols, ranks) == plain(symbols, ranks), (symbols, ranks)


def test_end_of_text_is_plain_text_unless_allowed(ours):
    text = f"a{encoder.END_OF_TEXT}{encoder.END_OF_TEXT} b"
    assert ours.end_of_text not in ours.encode(text)
    assert ours.decode(ours.encode(text)) == text
    a, b = ours.encode("a"), ours.encode(" b")
    expected = [*a, ours.end_of_text, ours.end_of_text, *b]
    assert ours.encode(text, allowed_special={encoder.END_OF_TEXT}) == expected
    assert ours.encode(text, allowed_special=encoder.END_OF_TEXT) == expected
    assert ours.decode(expected) == text
    with pytest.raises(ValueError, match="no special token"):
        ours.encode(text, allowed_special={"<|pad|>"})


def test_lone_surrogates_become_u_fffd(ours):
    assert ours.decode(ours.encode("a\ud83d")) == "a\ufffd"
    assert ours.decode(ours.encode("\udc4d b")) == "\ufffd b"
    assert ours.encode("\ud83d\udc4d") == ours.encode("👍"), "two halves are a whole"


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_ids_out_of_range_raise(ours, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is not in the vocabulary of {len(ours.spellings)}"):
        ours.decode([1, bad])


DAMAGES = {
    "cut JSON": ("encoder.json", '{"a": 0', "not JSON"),
    "deep JSON": ("encoder.json", "[" * 100_000, "not JSON"),
    "a list": ("encoder.json", "[]", "a JSON object was expected"),
    "nothing in it": ("encoder.json", "{}", "has no id; each of the 256 bytes"),
    "no number": ("encoder.json", '{"a": "b"}', "its ids must be"),
    "an id twice": ("encoder.json", {"!": 1}, "its ids must be"),
    "a list as an id": ("encoder.json", {"!": [0]}, "its ids must be"),
    "a fraction": ("encoder.json", {"!": 0.5}, "its ids must be"),
    "true": ("encoder.json", {"!": True}, "its ids must be"),
    "an id too large": ("encoder.json", {"!": 2**24}, "its ids must be"),
    "a byte less": ("encoder.json", {"!": ...}, "'!' has no id"),
    "no spelling": ("encoder.json", {"日": 512}, "is none of the characters that stand for bytes"),
    "a token that nothing makes": ("encoder.json", {"new": 512}, "no merge leads to 'new': the merges were cut short"),
    "a merge to nothing": ("vocab.bpe", "q z\n", "merges lead to 'qz', which has no id"),
    "a negative id": ("encoder.json", {"!": -1}, "its ids must be"),
    "not UTF-8": ("encoder.json", b"\xff\xfe", "no UTF-8 text"),
    "three symbols": ("vocab.bpe", "#version: 0.2\na b c\n", "is not two symbols"),
    "missing": ("vocab.bpe", None, "No such file"),
    "a folder": ("vocab.bpe", ..., "Is a directory"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named(tmp_path, kind):
    name, content, message = DAMAGES[kind]
    for file in ("encoder.json", "vocab.bpe"):
        (tmp_path / file).write_bytes((GOLDEN / file).read_bytes())
    if isinstance(content, dict):
        found = json.loads((GOLDEN / name).read_text(encoding="utf-8")) | content
        content = json.dumps({key: value for key, value in found.items() if value is not ...})
    (tmp_path / name).unlink()
    if content is ...:
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OSError) as raised:
        encoder.get_encoder(tmp_path.name, tmp_path.parent)
    assert message in str(raised.value)
    assert (name if name == "encoder.json" or "merge" not in message else "encoder.json") in str(raised.value)


def test_no_merges_at_all_are_a_tokenizer_of_bytes(tmp_path):
    (tmp_path / "encoder.json").write_text(json.dumps({c: i for i, c in enumerate(encoder.SPELL.values())}))
    (tmp_path / "vocab.bpe").write_bytes(b"")
    assert len(encoder.get_encoder(tmp_path.name, tmp_path.parent).encode("hello")) == 5


@pytest.mark.parametrize("n_lines", [0, 1, 2, 100, 255])
def test_merges_that_were_cut_at_the_end_of_a_line_are_noticed(tmp_path, n_lines):
    """257 lines are all of them."""
    (tmp_path / "encoder.json").write_bytes((GOLDEN / "encoder.json").read_bytes())
    lines = (GOLDEN / "vocab.bpe").read_bytes().splitlines(keepends=True)
    (tmp_path / "vocab.bpe").write_bytes(b"".join(lines[:n_lines]))
    with pytest.raises(OSError, match=r"encoder\.json: no merge leads to .*cut short"):
        encoder.get_encoder(tmp_path.name, tmp_path.parent)


def test_ids_with_gaps_and_special_tokens_in_brackets(tmp_path):
    found = json.loads((GOLDEN / "encoder.json").read_text(encoding="utf-8")) | {"[PAD]": 600, "<|im_end|>": 700}
    (tmp_path / "encoder.json").write_text(json.dumps(found))
    (tmp_path / "vocab.bpe").write_bytes((GOLDEN / "vocab.bpe").read_bytes())
    ours = encoder.get_encoder(tmp_path.name, tmp_path.parent)
    assert (ours.decode([600, 700]), ours.n_vocab) == ("[PAD]<|im_end|>", 701)
    with pytest.raises(ValueError, match="token id 601 is not in the vocabulary of 514 tokens"):
        ours.decode([601])


def test_files_that_do_not_match_say_so():
    with pytest.raises(OSError, match=r"'he', which has no id"):
        encoder.Encoder({"h": 0, "e": 1}, [("h", "e")]).encode("he")
    with pytest.raises(OSError, match="spells no byte"):
        encoder.Encoder({"日": 0}, []).decode([0])


@pytest.mark.parametrize("kind", ["list", "numpy", "jax"])
def test_ids_may_be_an_array_of_either_backend(ours, kind):
    ids = ours.encode("Once upon a time")
    array = {"list": list, "numpy": np.array, "jax": lambda ids: oracle("jax").numpy.array(ids)}[kind](ids)
    assert ours.decode(array) == "Once upon a time"
    with pytest.raises(TypeError):
        ours.decode([1.5])
