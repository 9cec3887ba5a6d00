"""Speculative decoding: the same greedy ids, the same distribution of sampled texts, in fewer passes."""

import itertools
import json
import random

import numpy as np
import pytest
from conftest import GOLDEN, cast, model_of, oracle, random_subject

import backends
import utils
from gpt2 import softmax
from inference import generate as plain
from inference import kv_cache, sampling, speculative
from inference.generate import Sequence
from inference.model import Model
from inference.sampling import SamplingParams
from inference.speculative import DraftModel, Lookup

oracle("jax")
SIZES = {"n_vocab": 7, "n_embd": 4, "n_layer": 1}
SETTINGS = [
    SamplingParams(banned=(6,)),
    SamplingParams(repetition_penalty=1.3, min_new_tokens=5, end_ids=(3,), banned=(6,)),
    SamplingParams(no_repeat_ngram_size=3, bad_words=((1, 2), (5,)), banned=(6,)),
    SamplingParams(0.8, top_k=5, min_p=0.02, repetition_penalty=1.2, banned=(6,)),
    SamplingParams(1.5, top_p=0.95, no_repeat_ngram_size=3, bad_words=((1, 2),), banned=(6,)),
]


class Tokenizer:
    def token_bytes(self, i):
        return b"%d " % i


@pytest.fixture(scope="module", params=itertools.product(("gpt2", "llama"), backends.NAMES), ids="-".join)
def models(request):
    """(a large model with 6 tokens and one row of padding, a small one with a shorter context and another padding)"""
    architecture, backend = request.param
    large = random_subject(architecture, **SIZES, n_ctx=24)
    n_vocab = 6 if backend == "numpy" else 9
    return large.model(backend), random_subject("gpt2", seed=1, **SIZES | {"n_vocab": n_vocab}, n_ctx=16).model(backend)


def drafters(models, seed, lengths):
    """One of each kind. lengths: draws the number of rows of each pass, whatever pays."""
    made = [Lookup(), DraftModel(models[1], models[0], seed), DraftModel(models[0], models[0], seed)]
    for drafter in made:
        drafter.best_rows = lambda costs: lengths.choice(list(costs))
    return made


def random_case(rng):
    """(the arguments of a Sequence, the function overflow)"""
    inputs = [rng.randrange(6) for _ in range(rng.randrange(1, 20))]
    options = {"end_ids": rng.choice([(), (3,)]), "stop": rng.choice([(), ("5 2", "4 4 1")]), "seed": rng.randrange(99)}
    arguments = (Tokenizer(), inputs, rng.randrange(1, 40), rng.choice(SETTINGS))
    return arguments, options | {"keep_log_probabilities": True}, rng.choice([None, lambda: None])


def what_came(pieces, sequence):
    """(text, ids, why it ended). On 7 tokens it happens that every one is banned."""
    try:
        text = "".join(pieces)
    except ValueError as error:
        assert "every token is banned" in str(error)
        return sequence.text, sequence.ids, str(error)
    assert text == sequence.text
    return text, sequence.ids, sequence.finish_reason


def check_random_texts(models, n_cases, seed):
    rng = random.Random(seed)
    for _ in range(n_cases):
        arguments, options, overflow = random_case(rng)
        alone = Sequence(*arguments, **options)
        expected = what_came(plain.generate(models[0], alone, overflow), alone)
        sampled = set()
        for drafter in drafters(models, options["seed"], rng) + drafters(models, options["seed"], rng):
            sequence = Sequence(*arguments, **options)
            found = what_came(speculative.generate(models[0], sequence, drafter, overflow), sequence)
            if isinstance(drafter, Lookup) or sequence.sampling_params.temperature == 0:
                assert found == expected, (arguments, options)
                assert np.allclose(sequence.log_probabilities, alone.log_probabilities, atol=1e-4)
            else:
                sampled.add((drafter.model is models[0], *map(str, found)))
            n_chosen = len(sequence.new_ids) + (sequence.finish_reason == "end_of_text")
            if sequence.finish_reason:
                assert sum(drafter.accepted_per_step) + len(drafter.accepted_per_step) == n_chosen
        assert len({first for first, *_ in sampled}) == len(sampled), "the length of drafts has changed a text"


def test_texts_do_not_depend_on_the_length_of_drafts(models):
    """Greedy texts, and sampled ones with drafts from the text, are those of plain decoding; for every setting of
    sampling, with stop texts and end ids, at the end of n_ctx and beyond."""
    check_random_texts(models, 5, seed=0)


@pytest.mark.trial
def test_texts_do_not_depend_on_the_length_of_drafts_in_200_cases(models):
    check_random_texts(models, 200, seed=1)


def test_both_backends_draw_the_same_text():
    texts = []
    for name in backends.NAMES:
        large, small = (random_subject("gpt2", seed=i, **SIZES, n_ctx=24).model(name) for i in range(2))
        for seed in range(5):
            sequence = Sequence(Tokenizer(), [1, 2], 20, SamplingParams(1.5), seed=seed)
            texts.append("".join(speculative.generate(large, sequence, DraftModel(small, large, seed))))
    assert texts[:5] == texts[5:]
    assert len(set(texts)) == 5


def test_a_draft_model_of_float64_does_not_change_a_greedy_text(golden):
    """A model whose logits come in another dtype, and whose drafts are nearly always right."""
    params, n_head = golden["params"], golden["hparams"]["n_head"]
    model, double = model_of(params, n_head), model_of(cast(params, "float64"), n_head)
    drafter = DraftModel(double, model)
    drafter.best_rows = max
    sequence = Sequence(golden["encoder"], golden["cases"][1]["ids"], 24)
    list(speculative.generate(model, sequence, drafter))
    assert sequence.new_ids == golden["cases"][1]["greedy_24"]
    assert drafter.accepted_per_step[1:] == [7, 7, 6], "8 tokens in each pass after the prompt, 23 in all"


# ---- The acceptance rule ----


def test_the_rule_gives_the_distribution_of_the_model():
    """All guesses with their probabilities, and all coins of a fine grid: the share of each token is p."""
    rng, coins = np.random.default_rng(0), (np.arange(800) + 0.5) / 800
    params = SamplingParams(temperature=1.3, top_k=4)
    for case in range(3):
        logits, q = 2 * rng.normal(size=5), softmax(4 * rng.normal(size=5))
        q = np.eye(5)[2] if case == 0 else q
        p, found = softmax(sampling.warp(logits, params)), np.zeros(5)
        for guess in np.flatnonzero(q):
            chosen = [speculative.choose(logits, [0], 0, params, coin, guess=guess, q=q) for coin in coins]
            found += q[guess] * np.bincount(chosen, minlength=5) / len(coins)
            accepted = sum(token == guess for token in chosen) / len(coins)
            assert abs(accepted - min(1, p[guess] / q[guess])) < 2 / len(coins)
        assert np.abs(found - p).max() < 2 / len(coins)


def test_a_guess_that_is_as_likely_for_both_is_accepted_with_every_coin():
    logits = np.log(np.array([0.1, 0.2, 0.7]))
    q = softmax(logits)
    q[0] = np.nextafter(q[0], 1)  # then p(0) / q(0) is below 1, and nothing is left to draw from
    params = SamplingParams(temperature=1)
    assert speculative.choose(logits, [0], 0, params, 1 - 2**-53, guess=0, q=q) == 0


def table_model(logits):
    """A model whose logits depend on the last token alone: row i of logits follows token i."""

    def forward(params, tokens, cache, position, last):
        assert position + len(tokens) <= cache[0][0].shape[-1]
        return (logits[tokens] if last is None else logits[tokens[last]]), cache

    def init_cache(params, n_cache):
        return [(np.zeros((1, 1, n_cache)), np.zeros((1, n_cache, 1)))]

    return Model(None, forward, init_cache, logits.shape[1], 100, (), False, backends.get("numpy"))


def tables():
    """{kind: (logits of the model, of its draft model)}"""
    rng = np.random.default_rng(3)
    logits, others = 1.5 * rng.normal(size=(2, 4, 4))
    impossible, certain = logits.copy(), np.zeros((4, 4))
    impossible[:, 3], certain[:, 3] = -50, 50
    return {
        "good": (logits, logits + 0.3 * others),
        "bad": (logits, others),
        "always wrong": (impossible, certain),
        "the model itself": (logits, logits),
    }


def chi_squared(counts, expected):
    """By how many standard deviations of the chi-squared distribution its value is too large. Cells of which fewer
    than 5 are expected count as one."""
    rare = expected < 5
    counts, expected = (np.append(a[~rare], a[rare].sum()) for a in (counts, expected))
    terms = (counts - expected) ** 2 / np.maximum(expected, 1e-9)
    assert counts[-1] < 15 or expected[-1] > 5, "what is impossible does not happen"
    n_free = np.count_nonzero(expected > 5) - 1
    return (terms[expected > 5].sum() - n_free) / (2 * n_free) ** 0.5


def check_distribution(kind, params, n_draws):
    """The first token, the first two and the second two, against the probabilities of plain decoding."""
    logits, drafts = tables()[kind]
    model, draft_model = table_model(logits), table_model(drafts)
    p = softmax(np.array([sampling.warp(row, params) for row in logits]))
    counts, middle, n_accepted = np.zeros((4, 4)), np.zeros((4, 4)), 0
    for seed in range(n_draws):
        sequence, drafter = Sequence(Tokenizer(), [1], 3, params, seed=seed), DraftModel(draft_model, model, seed)
        drafter.best_rows = max
        list(speculative.generate(model, sequence, drafter))
        first, second, third = sequence.new_ids
        counts[first, second] += 1
        middle[second, third] += 1
        n_accepted += sum(drafter.accepted_per_step)
    pairs = p[1][:, None] * p
    assert chi_squared(counts.sum(axis=1), n_draws * p[1]) < 4
    assert chi_squared(counts.ravel(), n_draws * pairs.ravel()) < 4
    assert chi_squared(middle.ravel(), n_draws * (pairs.sum(axis=0)[:, None] * p).ravel()) < 4
    return n_accepted / n_draws


KINDS = [*tables()]


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_texts_have_the_distribution_of_plain_decoding(kind):
    n_accepted = check_distribution(kind, SamplingParams(temperature=1), 1000)
    assert {"always wrong": n_accepted == 0, "the model itself": n_accepted == 2}.get(kind, 0 < n_accepted < 2)


@pytest.mark.trial
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("params", [SamplingParams(1.0), SamplingParams(0.7, top_k=3, min_p=0.05)])
def test_100_000_sampled_texts_have_the_distribution_of_plain_decoding(kind, params):
    check_distribution(kind, params, 100_000)


def test_the_coins_of_guesses_are_not_those_of_the_choices():
    """A generator with the seed [s, 0] gives the numbers of the seed s."""
    for seed in (0, 5):
        drafter = DraftModel(table_model(np.zeros((4, 1000))), table_model(np.zeros((4, 1000))), seed)
        guesses = [drafter._guess(np.zeros(1000), i, SamplingParams(1.0))[0] for i in range(50)]
        own = [int(1000 * coin) for coin in np.random.default_rng(seed).random(50)]
        assert len(set(guesses)) > 40
        assert sum(a == b for a, b in zip(guesses, own, strict=True)) < 3
        assert guesses[7] == drafter._guess(np.zeros(1000), 7, SamplingParams(1.0))[0], "the same coin again"


# ---- Drafts ----


def test_a_guess_that_leaves_no_token_ends_the_draft():
    """It is an error only if the text comes to this."""
    model = table_model(np.eye(3))
    sequence = Sequence(Tokenizer(), [0], 9, SamplingParams(no_repeat_ngram_size=1))
    assert [guess for guess, _ in DraftModel(model, model).propose(sequence, 8)] == [1, 2]


def longest_match(ids):
    """By its definition: the latest earlier end of the longest n-gram, of 4 to 2 ids, that ends the text."""
    for size in (4, 3, 2):
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == ids[len(ids) - size :]:
                return end
    return None


def test_lookup_finds_the_longest_match():
    rng = random.Random(0)
    for _ in range(50):
        sequence, drafter = Sequence(Tokenizer(), [rng.randrange(3)], 100), Lookup()
        for _ in range(40):
            end = longest_match(sequence.ids)
            guesses = [guess for guess, _ in drafter.propose(sequence, 5)]
            text = sequence.ids + guesses
            assert len(guesses) == (0 if end is None else 5)
            assert all(text[len(sequence.ids) + i] == text[end + i] for i in range(len(guesses)))
            sequence.ids += [rng.randrange(3) for _ in range(rng.randrange(1, 4))]


def test_where_the_text_repeats_itself_the_guess_does_too():
    sequence = Sequence(Tokenizer(), [9, 1, 2, 3, 1, 2, 3], 100)
    assert [guess for guess, _ in Lookup().propose(sequence, 7)] == [1, 2, 3, 1, 2, 3, 1]


def test_the_best_number_of_rows():
    """By hand, for passes of 1, 2 and 4 rows that take 1, 1.5 and 2: at rate 0.5 they give 1, 1.5 and 1.875 tokens, at
    0.6 1, 1.6 and 2.176."""
    drafter, costs = Lookup(), {1: 1.0, 2: 1.5, 4: 2.0}
    for rate, cost, expected in [(0, 0, 1), (0.45, 0, 1), (0.6, 0, 4), (1, 0, 4), (0.6, 0.3, 1), (0.55, 0, 2)]:
        drafter.rate, drafter.cost = rate, cost
        assert drafter.best_rows(costs) == expected, (rate, cost)


def test_the_length_of_drafts_follows_what_is_accepted():
    """A text that repeats itself, then does not, then does again."""
    rng = random.Random(0)
    parts = [[1, 2, 3] * 20, [rng.randrange(4) for _ in range(60)], [3, 1] * 30]
    told = list(itertools.chain(*parts))
    logits = np.eye(4)[[*told, 0]] * 9
    cache = [(np.zeros((1, 1, 400)), np.zeros((1, 400, 1)))]
    rows = []

    def forward(params, tokens, cache, position, last):
        rows.append((position, len(tokens)))
        found = logits[[min(position + i, len(told)) for i in range(len(tokens))]]
        return (found if last is None else found[last]), cache

    model = Model(None, forward, lambda *_: cache, 4, 400, (), False, backends.get("numpy"))
    sequence, drafter = Sequence(Tokenizer(), [0], len(told)), Lookup()
    list(speculative.generate(model, sequence, drafter))
    assert sequence.new_ids == told
    n_passes = [sum(60 * i + 10 <= position < 60 * i + 60 for position, _ in rows) for i in range(3)]
    assert n_passes[0] < 10
    assert n_passes[1] > 25
    assert n_passes[2] < 15
    assert max(n for position, n in rows if 80 < position < 110) < 8


def test_jax_compiles_three_programs_before_the_third_token(golden, monkeypatch):
    """One for the prompt, one for a draft, and one for a single token, which comes when the first guess is wrong."""
    traced, forward = [], kv_cache.forward
    monkeypatch.setattr(kv_cache, "forward", lambda *a, **k: traced.append(len(a[1])) or forward(*a, **k))
    kv_cache.forward_on.cache_clear()
    model, seen = model_of(golden["params"], golden["hparams"]["n_head"], "jax"), []
    sequence = Sequence(golden["encoder"], [5, 6, 7] * 3, 60)
    for _ in speculative.generate(model, sequence, Lookup()):
        seen.append([*traced])
    kv_cache.forward_on.cache_clear()
    assert seen[1] == [16, 8]
    assert sorted(seen[-1]) == [1, 8, 16]


# ---- The front door ----

STORY = ["Once upon a time", "--model_size", "3M", "--n_tokens_to_generate", "40"]


@pytest.mark.parametrize("sampled", [[], ["--temperature", "0.9", "--seed", "3"]])
@pytest.mark.parametrize("backend", backends.NAMES)
def test_lookup_at_the_front_door(command, sampled, backend):
    flags = [*STORY, *sampled, "--backend", backend, "--json"]
    expected, found = (json.loads(command(*flags, *more)[1]) for more in ([], ["--draft", "lookup"]))
    accepted = found.pop("accepted_per_step")
    assert sum(accepted) + len(accepted) == 40
    assert {**found, "seconds": 0, "log_probabilities": 0} == {**expected, "seconds": 0, "log_probabilities": 0}


def test_a_draft_model_at_the_front_door(command):
    """The model itself as its own draft model: all that is guessed is accepted."""
    expected = command(*STORY)
    assert command(*STORY, "--draft_model", "3M") == expected
    warm = [*STORY, "--temperature", "0.9", "--seed", "3", "--draft_model", "3M"]
    status, out, err = command(*warm, "--trace", "2")
    assert (status, out) == command(*warm)[:2]
    assert len(err.splitlines()) == 1 + 40
    assert "accepted_per_step" in json.loads(command(*warm, "--json")[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--draft", "magic"], ["--draft 'magic'", "lookup", "--draft_model"]),
        (["--draft", "lookup", "--draft_model", "3M"], ["--draft and --draft_model", "choose one"]),
        (["--draft", "lookup", "--num_beams", "2"], ["--draft is for one text", "beams"]),
        (["--draft_model", "3M", "--num_samples", "2", "--temperature", "1"], ["--draft_model is for one text"]),
        (["--draft", "lookup", "--batch", "--prompt_file", "x"], ["--draft is for one text"]),
        (["--draft_model", str(GOLDEN)], [f"--draft_model {GOLDEN} has another tokenizer"]),
        (["--draft_model", "4M"], ["no model '4M'", "3M"]),
        (["--draft_model"], ["--draft_model needs a value"]),
    ],
)
def test_mistakes_are_one_line(arguments, words, command):
    prompt = [] if "--prompt_file" in arguments else STORY[:1]
    status, out, err = command(*prompt, *STORY[1:], *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words), err


def test_a_damaged_draft_model_is_named(command, tmp_path, storyteller):
    _, hparams, params = storyteller
    utils.save_tokenizer(utils.MODELS_DIR / "3M", tmp_path, ["tf"])
    utils.save_model(tmp_path, hparams, params | {"wpe": np.full_like(params["wpe"], np.nan)}, ["tf"])
    status, _, err = command(*STORY, "--draft_model", str(tmp_path))
    assert (status, err.count("\n")) == (1, 1)
    assert "draft_model.wpe" in err
