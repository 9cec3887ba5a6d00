"""The loop: what it shows, when it stops, and that it computes nothing before its time."""

import random

import numpy as np
import pytest
from conftest import ROOT, openai_tokenizer

import encoder as encoder_module
import gpt2
from inference.generate import Sequence, generate
from inference.sampling import SamplingParams


class Script:
    """A model that says what it is told to: logits that favour the next id of a list."""

    def __init__(self, ids, n_vocab, n_ctx=10**6):
        import backends

        self.ids, self.n_vocab, self.n_ctx, self.backend = list(ids), n_vocab, n_ctx, backends.get("numpy")
        self.params, self.asked = None, []

    def init_cache(self, params, n_cache):
        return [(np.zeros((1, 1, n_cache)), np.zeros((1, n_cache, 1)))]

    def forward(self, params, tokens, cache, position, last):
        assert position + len(tokens) <= cache[0][0].shape[-1]
        self.asked.append((list(tokens), position))
        logits = np.zeros(self.n_vocab)
        logits[self.ids[len(self.asked) - 1]] = 1.0
        return logits, cache


@pytest.fixture(scope="module")
def words():
    return encoder_module.get_encoder("3M", ROOT / "models")


def told(words, ids, **options):
    row = Sequence(words, [words.end_of_text], len(ids), **options)
    model = Script(ids, len(words.ids))
    return row, model, list(generate(model, row))


def test_joined_pieces_are_the_decoded_ids(words):
    rng = random.Random(0)
    for _ in range(200):
        emoji = words.encode("".join(rng.choices("é日🙂👍🏽a ", k=10)))
        ids = [rng.choice([*emoji, *range(256)]) for _ in range(rng.randrange(1, 30))]
        row, _, pieces = told(words, ids)
        assert "".join(pieces) == row.text == words.decode(ids)
        assert row.new_ids == ids
        assert row.finish_reason == "length"


def test_no_step_is_computed_before_its_time(words):
    row = Sequence(words, [1], 3)
    model = Script(words.encode("a b c"), len(words.ids))
    pieces = generate(model, row)
    assert model.asked == []
    assert next(pieces) == "a"
    assert len(model.asked) == 1
    assert len(list(pieces)) == 2
    assert model.asked == [([1], 0), ([words.encode("a")[0]], 1), ([words.encode(" b")[0]], 2)]


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["o t"], "one tw"),
        ("one two three", [" three", "e t"], "on"),
        ("one two three", ["four"], "one two three"),
        ("one two thr", ["three"], "one two thr"),
        ("aab", ["aaab", "ab"], "a"),
        ("abababac", ["ababac"], "ab"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("x🙂y", ["🙂"], "x"),
        ("one", ["one"], ""),
    ],
)
def test_stop_texts_across_token_borders_are_not_shown(words, text, stop, shown):
    for ids in (words.encode(text), byte_ids(words, text)):
        row, _, pieces = told(words, ids, stop=stop)
        assert "".join(pieces) == row.text == shown
        assert row.finish_reason == ("stop" if shown != text else "length")


def byte_ids(words, text):
    return [words.ids[encoder_module.SPELL[byte]] for byte in text.encode()]


def test_random_stops_equal_a_search_in_the_whole_text(words):
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices("ab ", k=rng.randrange(1, 25)))
        stop = ["".join(rng.choices("ab ", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 3))]
        row, _, pieces = told(words, byte_ids(words, text), stop=stop)
        ends = [text.find(s) + len(s) for s in stop if s in text]
        known = text[: min(ends)] if ends else text  # the loop stops as soon as one is complete
        first = min((known.find(s) for s in stop if s in known), default=None)
        assert "".join(pieces) == row.text == (known if first is None else known[:first]), (text, stop)


def test_text_that_cannot_become_a_stop_is_shown_at_once(words):
    row = Sequence(words, [1], 3, stop=["xyz"])
    model = Script(byte_ids(words, "axb"), len(words.ids))
    assert list(generate(model, row)) == ["a", "", "xb"]


def test_end_of_text_stops_and_is_no_part_of_the_text(words):
    ids = [*words.encode("The end"), words.end_of_text, *words.encode("more")]
    row, model, pieces = told(words, ids, end_ids=[words.end_of_text])
    assert "".join(pieces) == row.text == "The end"
    assert row.finish_reason == "end_of_text"
    assert words.end_of_text not in row.new_ids
    assert len(model.asked) == len(words.encode("The end")) + 1
    assert "<|endoftext|>" in told(words, ids)[0].text, "unless it may go on"


def test_half_a_character_at_the_end_is_flushed(words):
    row, _, pieces = told(words, byte_ids(words, "a🙂")[:-1])
    assert "".join(pieces) == row.text == "a\ufffd"


def test_nothing_is_asked_for_no_tokens(words):
    row = Sequence(words, [1], 0)
    assert (list(generate(Script([], 5), row)), row.finish_reason) == ([], "length")


def test_at_n_ctx_the_text_ends(words):
    ids = words.encode("a b c d e f g")
    row, model = Sequence(words, [1, 2, 3], len(ids)), Script(ids, len(words.ids), n_ctx=6)
    assert "".join(generate(model, row)) == row.text == words.decode(ids[:4])
    assert row.finish_reason == "n_ctx"
    assert model.asked[-1] == ([ids[2]], 5)


def test_or_slides_over_the_last_half_of_it(words):
    ids = words.encode("a b c d e f g h i j k")
    row, model, told_so = Sequence(words, [1, 2, 3], len(ids)), Script(ids, len(words.ids), n_ctx=6), []
    assert "".join(generate(model, row, overflow=lambda: told_so.append(len(model.asked)))) == words.decode(ids)
    assert told_so == [4, 8]
    assert model.asked[4] == (ids[1:4], 0)
    assert model.asked[5] == ([ids[4]], 3)


def test_sliding_equals_a_fresh_start_on_the_last_half(golden, subject):
    n_ctx = subject.hparams["n_ctx"]
    ids = [5] * (n_ctx - 6)
    row = Sequence(golden["encoder"], ids, 10)
    list(generate(subject.model(), row, overflow=lambda: None))
    assert row.new_ids[:7] == subject.greedy(ids, 7)  # the 7th needs no room
    assert row.new_ids[7:] == subject.greedy((ids + row.new_ids[:7])[-n_ctx // 2 :], 3)


def test_a_consumer_may_leave(words):
    pieces = generate(Script(words.encode("a b c"), len(words.ids)), Sequence(words, [1], 3))
    next(pieces)
    pieces.close()
    assert list(pieces) == []


def test_log_probabilities_are_the_models(golden, subject):
    inputs = subject.cases[1]["ids"]
    row = Sequence(golden["encoder"], inputs, 8, SamplingParams(0.7, 20), seed=0, keep_log_probabilities=True)
    list(generate(subject.model(), row))
    logits = subject.logits(row.ids).astype(float)
    expected = np.log(gpt2.softmax(logits))[len(inputs) - 1 : -1][range(8), row.new_ids]
    assert np.allclose(row.log_probabilities, expected, atol=1e-4)


def test_with_openais_tokenizer_too():
    words = encoder_module.get_encoder("", openai_tokenizer())
    ids = words.encode("Zwölf Boxkämpfer 🥊 jagen 日本語")
    assert "".join(told(words, ids)[2]) == words.decode(ids)
