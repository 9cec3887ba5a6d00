"""Processors and warpers against plain loops over a list of numbers, analytic vectors, and the law of large numbers."""

import math
import random

import numpy as np
import pytest
from conftest import oracle

import backends
from inference import sampling
from inference.sampling import SamplingParams

INF = math.inf


# ---- An independent implementation: lists and loops ----


def plain_softmax(row):
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / math.fsum(weights) for w in weights]


def plain_repetition_penalty(row, ids, penalty):
    return [(x * penalty if x < 0 else x / penalty) if i in ids else x for i, x in enumerate(row)]


def plain_min_new_tokens(row, n_new, minimum, end_ids):
    return [-INF if n_new < minimum and i in end_ids else x for i, x in enumerate(row)]


def plain_bad_words(row, ids, sequences):
    row = list(row)
    for sequence in sequences:
        n = len(sequence) - 1
        if n <= len(ids) and tuple(ids[len(ids) - n :]) == tuple(sequence[:-1]):
            row[sequence[-1]] = -INF
    return row


def plain_top_k(row, k):
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return [x if i in ranked[: k or len(row)] else -INF for i, x in enumerate(row)]


def plain_top_p(row, p):
    probabilities, kept, mass = plain_softmax(row), set(), 0.0
    for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
        if mass >= p:
            break
        kept.add(i)
        mass += probabilities[i]
    return [x if i in kept else -INF for i, x in enumerate(row)]


def plain_min_p(row, p):
    probabilities = plain_softmax(row)
    return [
        x if probability >= p * max(probabilities) else -INF for x, probability in zip(row, probabilities, strict=True)
    ]


def plain_no_repeat_ngram(row, ids, size):
    """Each token is tried: does the sequence that it would end stand in ids already?"""
    known = [ids[i : i + size] for i in range(len(ids) - size + 1)] if size else []
    return [-INF if [*ids, i][len(ids) + 1 - size :] in known else x for i, x in enumerate(row)]


def cases(n=1000, n_vocab=None):
    for seed in range(n):
        rng = random.Random(seed)
        row = [rng.gauss(0, 3) for _ in range(n_vocab or rng.randrange(2, 40))]
        ids = rng.choices(range(len(row)), k=rng.randrange(12))
        yield rng, row, ids


PROCESSORS = {
    "repetition_penalty": lambda rng, row, ids: (ids, rng.choice([0.5, 1.0, 1.2, 2.0])),
    "min_new_tokens": lambda rng, row, ids: (rng.randrange(4), rng.randrange(4), [rng.randrange(len(row))]),
    "bad_words": lambda rng, row, ids: (ids, random_words(rng, row, ids)),
    "no_repeat_ngram": lambda rng, row, ids: (random_repeats(rng, row), rng.randrange(5)),
    "top_k": lambda rng, row, ids: (rng.randrange(len(row) + 3),),
    "top_p": lambda rng, row, ids: (rng.choice([1e-9, rng.random() or 0.5, 1 - 1e-9]),),
    "min_p": lambda rng, row, ids: (rng.choice([0.0, rng.random(), 1e-9, 1.0]),),
}


def random_words(rng, row, ids):
    """Some that match the end of ids, some that do not."""
    tails = [ids[len(ids) - n :] for n in range(min(3, len(ids)) + 1)]
    return [tuple(rng.choice([*tails, [0, 0]])) + (rng.randrange(len(row)),) for _ in range(3)]


def random_repeats(rng, row):
    """Ids in which sequences come again."""
    return rng.choices(range(min(len(row), rng.randrange(1, 5))), k=rng.randrange(15))


@pytest.mark.parametrize("name", PROCESSORS)
def test_equals_the_independent_implementation(name):
    ours, plain = getattr(sampling, name), globals()[f"plain_{name}"]
    for rng, row, ids in cases():
        arguments = PROCESSORS[name](rng, row, ids)
        assert ours(np.array(row), *arguments).tolist() == pytest.approx(plain(row, *arguments), rel=1e-14), arguments


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_same_code_on_jax(name):
    jax = oracle("jax")
    ours = getattr(sampling, name)
    for rng, row, ids in cases(20, n_vocab=12):
        arguments = PROCESSORS[name](rng, row, ids) if name != "top_p" else (rng.uniform(0.1, 0.9),)
        row = np.float32(row)
        there = ours(jax.numpy.asarray(row), *arguments)
        assert isinstance(there, jax.Array)
        here = ours(row, *arguments)
        assert np.array_equal(np.isfinite(here), np.isfinite(np.asarray(there))), (name, arguments)
        assert np.allclose(here, np.asarray(there), rtol=1e-6)


def test_transformers_agrees():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for rng, row, ids in cases():
        ids, repeats, logits = ids or [0], random_repeats(rng, row) or [0], np.array(row)
        k, p, penalty = rng.randrange(1, len(row)), rng.uniform(0.05, 0.95), rng.choice([0.8, 1.3])
        size, words = rng.randrange(1, 5), [list(word) for word in random_words(rng, row, ids)]
        for theirs, given, ours in [
            (transformers.TopKLogitsWarper(k), ids, sampling.top_k(logits, k)),
            (transformers.TopPLogitsWarper(p), ids, sampling.top_p(logits, p)),
            (transformers.MinPLogitsWarper(p), ids, sampling.min_p(logits, p)),
            (transformers.TemperatureLogitsWarper(0.7), ids, sampling.temperature(logits, 0.7)),
            (
                transformers.RepetitionPenaltyLogitsProcessor(penalty),
                ids,
                sampling.repetition_penalty(logits, ids, penalty),
            ),
            (transformers.NoRepeatNGramLogitsProcessor(size), repeats, sampling.no_repeat_ngram(logits, repeats, size)),
            (transformers.NoBadWordsLogitsProcessor(words), ids, sampling.bad_words(logits, ids, words)),
        ]:
            found = theirs(torch.tensor([given]), torch.tensor([row], dtype=torch.float64))[0].tolist()
            assert found == pytest.approx(ours.tolist(), rel=1e-12), (type(theirs), given)


def kept(logits):
    return {i for i, x in enumerate(np.asarray(logits)) if x > -INF}


def test_published_vectors():
    assert kept(sampling.top_p(np.log([0.4, 0.3, 0.2, 0.1]), 0.8)) == {0, 1, 2}
    assert kept(sampling.top_k(np.array([1.0, 2, 2, 2, 3]), 3)) == {4, 1, 2}
    with np.errstate(divide="ignore"):
        assert kept(sampling.top_k(np.log([0.4, 0.3, 0.3, 0]), 2)) == {0, 1}
    assert sampling.repetition_penalty(np.array([4.0, -4.0]), [0, 1], 2).tolist() == [2, -8]
    for logits in (np.array([0.1, 5.0, 5.0, -2.0]), np.array([-3.0, -1.0])):
        best = int(np.argmax(logits))
        for settings in (
            SamplingParams(0),
            SamplingParams(1, top_k=1),
            SamplingParams(1, top_p=1e-9),
            SamplingParams(1e-5),
        ):
            assert sampling.choose(logits, [], 0, settings, 0.0) == best
        assert sampling.choose(logits, [], 0, SamplingParams(1, top_k=1), 0.999) == best


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neutral_values_change_nothing_at_all(dtype):
    row = np.random.default_rng(0).normal(size=50).astype(dtype)
    for same in [
        sampling.repetition_penalty(row, [1, 2], 1.0),
        sampling.min_new_tokens(row, 0, 0, [3]),
        sampling.bad_words(row, [1], ()),
        sampling.temperature(row, 1.0),
        sampling.top_k(row, 0),
        sampling.top_k(row, 50),
        sampling.top_k(row, 99),
        sampling.top_p(row, 1.0),
        sampling.min_p(row, 0.0),
        sampling.no_repeat_ngram(row, [1, 2, 1, 2], 0),
    ]:
        assert same is row


def test_among_equals_the_lower_ids_stay():
    rng = random.Random(0)
    for _ in range(300):
        row = [rng.randrange(4) for _ in range(rng.randrange(2, 12))]
        k = rng.randrange(1, len(row) + 1)
        assert sampling.top_k(np.array(row, float), k).tolist() == plain_top_k(row, k)


def test_top_p_keeps_at_least_the_best_and_the_one_that_crosses():
    assert kept(sampling.top_p(np.log([0.5, 0.25, 0.125, 0.125]), 0.5)) == {0}
    assert kept(sampling.top_p(np.log([0.5, 0.25, 0.125, 0.125]), 0.500001)) == {0, 1}
    assert kept(sampling.top_p(np.zeros(50257), 1e-9)) == {0}


def test_200000_draws_have_the_distribution_they_should():
    jax = oracle("jax")
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(size=50) * 1.5)
    probabilities = np.array(plain_softmax(list(logits)))
    coins = np.float32(np.random.default_rng(1).random(200_000))
    drawn = np.asarray(jax.jit(jax.vmap(sampling.sample, in_axes=(None, 0)))(logits, coins))  # all at once
    assert [int(sampling.sample(logits, coin)) for coin in coins[:5000]] == drawn[:5000].tolist(), "and so does NumPy"
    counts = np.bincount(drawn, minlength=50)
    chi2 = ((counts - 200_000 * probabilities) ** 2 / (200_000 * probabilities)).sum()
    assert chi2 < 85.35, "the 99.9% quantile of chi-squared with 49 degrees of freedom"


@pytest.mark.parametrize("backend", backends.NAMES)
def test_sample_takes_no_banned_token_and_never_runs_off_the_end(backend):
    library = backends.get(backend)
    rng = np.random.default_rng(2)
    for n in (2, 17, 50257):
        logits = rng.normal(size=n).astype(np.float32)
        logits[rng.random(n) < 0.5] = -INF
        logits[rng.integers(n)] = 1.0
        row = library.asarray(logits)
        for coin in (0.0, 1e-12, 0.3, 0.99999, 1 - 2**-24, 1 - 2**-53):
            assert logits[int(sampling.sample(row, coin))] > -INF
        assert int(sampling.sample(row, 0.0)) == min(kept(logits))
    ends_in_nothing = library.asarray(np.float32([0, -200, -INF]))
    assert int(sampling.sample(ends_in_nothing, 1 - 2**-53)) in (0, 1)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (SamplingParams(-1.0), "temperature -1.0"),
        (SamplingParams(math.nan), "temperature nan"),
        (SamplingParams(1e-9), "temperature 1e-09"),
        (SamplingParams(INF), "temperature inf"),
        (SamplingParams(1.0, top_k=-1), "top_k -1"),
        (SamplingParams(1.0, top_p=0.0), "top_p 0.0"),
        (SamplingParams(1.0, top_p=1.1), "top_p 1.1"),
        (SamplingParams(1.0, top_p=math.nan), "top_p nan"),
        (SamplingParams(1.0, min_p=1.1), "min_p 1.1"),
        (SamplingParams(1.0, min_p=-0.1), "min_p -0.1"),
        (SamplingParams(1.0, min_p=math.nan), "min_p nan"),
        (SamplingParams(min_p=0.1), "min_p 0.1 has no effect at temperature 0"),
        (SamplingParams(repetition_penalty=0.0), "repetition_penalty 0.0"),
        (SamplingParams(repetition_penalty=-2.0), "repetition_penalty -2.0"),
        (SamplingParams(repetition_penalty=1e308), "repetition_penalty 1e"),
        (SamplingParams(repetition_penalty=math.nan), "repetition_penalty nan"),
        (SamplingParams(top_k=40), "no effect at temperature 0"),
        (SamplingParams(top_p=0.9), "no effect at temperature 0"),
        (SamplingParams(bad_words=((1, 2), ())), "empty bad word"),
    ],
)
def test_values_out_of_range_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        sampling.check(settings)


def test_with_every_token_banned_there_is_an_error_and_no_nan():
    settings = SamplingParams(1.0, bad_words=((0,), (1,), (2,)))
    with pytest.raises(ValueError, match="every token is banned"):
        sampling.choose(np.zeros(3), [0], 0, settings, 0.5)


def test_settings_reach_their_functions_in_the_order_that_is_documented():
    """Of four tokens each setting bans one; and min_p measures what top_k and the temperature have left."""
    logits = np.array([3.0, 2.0, 1.0, 0.5])
    params = SamplingParams(1.0, no_repeat_ngram_size=2, bad_words=((1,),))
    assert kept(sampling.process(logits, [0, 2, 0], 0, params)) == {0, 3}
    assert kept(sampling.process(logits, [], 0, SamplingParams(banned=(3,)))) == {0, 1, 2}
    assert kept(sampling.warp(logits, SamplingParams(1.0, min_p=0.3))) == {0, 1}, "e^-1 is 0.37, e^-2 is 0.14"
    assert kept(sampling.warp(logits, SamplingParams(0.5, min_p=0.3))) == {0}, "e^-2"
    assert kept(sampling.warp(logits, SamplingParams(2.0, min_p=0.3))) == {0, 1, 2}, "e^-0.5, e^-1, e^-1.25 is 0.287"


def test_a_tiny_temperature_overflows_nothing():
    logits = np.array([800.0, -800.0, 799.0])
    assert sampling.choose(logits, [], 0, SamplingParams(1e-5), 0.5) == 0
