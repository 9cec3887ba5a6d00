"""The cache changes nothing but the time: every way of splitting a text gives the logits of the whole."""

import numpy as np
import pytest
from conftest import Subject, oracle, random_params

import backends
import gpt2
from inference import kv_cache
from inference.model import greedy, init_cache, step
from weights import params as params_module
from weights.params import flatten

jax = oracle("jax")


def splits(n):
    """All of n tokens in one piece; one by one; a prompt and then one by one; in pieces of many sizes."""
    yield [n]
    yield [1] * n
    for size in {2, 3, 7, 16} & set(range(n)):
        yield [size] * (n // size) + [n % size] * (n % size > 0)
        yield [size] + [1] * (n - size)
        yield [n - size, size]


def test_every_split_gives_the_uncached_logits(subject):
    for case, ids in enumerate(case["ids"] for case in subject.cases):
        expected = subject.logits(ids)
        assert np.abs(expected - subject.arrays[f"logits_{case}"]).max() <= 2e-5
        for split in splits(len(ids)):
            cache, position, rows = subject.init_cache(len(ids) + 3), 0, []
            for n in split:
                logits, cache = subject.forward(ids[position : position + n], cache, position)
                rows, position = [*rows, logits], position + n
            assert np.abs(np.concatenate(rows) - expected).max() <= 2e-5, split


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("case", [1, 2])
def test_a_step_gives_the_last_row_however_the_prompt_is_split(subject, backend, case):
    ids, model = subject.cases[case]["ids"], subject.model(backend)
    expected = subject.logits(ids)
    for split in splits(len(ids)):
        cache, position = init_cache(model, len(ids)), 0
        for n in split:
            logits, cache = step(model, ids[position : position + n], cache, position)
            position += n
            assert np.abs(model.backend.to_numpy(logits) - expected[position - 1]).max() <= 2e-5, (split, position)


@pytest.mark.parametrize("backend", backends.NAMES)
def test_greedy_ids_are_those_of_the_plain_loop(subject, backend):
    model = subject.model(backend)
    for case in subject.cases:
        ids, n_new = list(case["ids"]), len(case["greedy"])
        for _ in range(2):  # the second call finds nothing of the first
            assert list(greedy(model, ids, n_new)) == case["greedy"]
        assert ids == case["ids"]


@pytest.mark.parametrize("backend", backends.NAMES)
def test_generate_is_greedy_of_a_gpt2(golden, backend):
    case, params = golden["cases"][1], golden["params"]
    assert kv_cache.generate(case["ids"], params, golden["hparams"]["n_head"], 24, backend) == case["greedy_24"]


@pytest.mark.parametrize("backend", backends.NAMES)
def test_the_window_may_be_filled_and_no_more(subject, backend):
    model, n_ctx = subject.model(backend), subject.hparams["n_ctx"]
    ids = [i % subject.hparams["n_vocab"] for i in range(7, 7 + n_ctx)]
    for n_prompt in (n_ctx - 1, n_ctx - 10, 65):
        expected = subject.greedy(ids[:n_prompt], n_ctx - n_prompt)
        assert list(greedy(model, ids[:n_prompt], n_ctx - n_prompt)) == expected
    assert list(greedy(model, ids, 0)) == []


@pytest.mark.parametrize("backend", backends.NAMES)
def test_a_long_prompt_passes_in_chunks(subject, backend, monkeypatch):
    ids, model = max((case["ids"] for case in subject.cases), key=len), subject.model(backend)
    monkeypatch.setattr("inference.model.N_PREFILL", 16)
    lengths, forward = [], model.forward
    model = model._replace(forward=lambda *args: lengths.append(len(args[1])) or forward(*args))
    for n in (16, 17, len(ids)):
        logits, cache = step(model, ids[:n], init_cache(model, len(ids) + 1), 0)
        logits = model.backend.to_numpy(logits)
        assert np.abs(logits - subject.logits(ids[:n])[-1]).max() <= 2e-5
    assert max(lengths) == 16
    logits, _ = step(model, [5], cache, len(ids))
    assert np.abs(model.backend.to_numpy(logits) - subject.logits([*ids, 5])[-1]).max() <= 2e-5


@pytest.mark.parametrize(("n_prompt", "n_new"), [(97, 0), (96, 1), (1, 96)])
def test_too_much_raises_before_any_compute(golden, n_prompt, n_new, monkeypatch):
    monkeypatch.setattr(kv_cache, "make_model", None)
    with pytest.raises(ValueError, match="n_ctx 96"):
        kv_cache.generate([1] * n_prompt, golden["params"], golden["hparams"]["n_head"], n_new)


def test_a_position_in_an_array_is_not_taken_for_a_known_one(subject):
    """Neither a number nor traced: then the whole cache is looked at, and the mask hides what is not filled."""
    ids = max((case["ids"] for case in subject.cases), key=len)[:9]
    expected = subject.logits(ids)[-1]
    cache = subject.forward(ids[:-1], subject.init_cache(12), 0)[1]
    for position in (len(ids) - 1, np.array(len(ids) - 1)):
        logits = subject.forward(ids[-1:], cache, position, 0)[0]
        assert np.abs(logits - expected).max() < 2e-5


def test_a_chunk_at_the_end_of_the_cache_is_not_moved_back(subject):
    """JAX would shift a padded chunk that does not fit to the left, over what stands there."""
    n_ctx = subject.hparams["n_ctx"]
    ids, model = (subject.cases[2]["ids"] * 3)[:n_ctx], subject.model("jax")
    cache = init_cache(model, n_ctx)
    assert {keys.shape[-1] for keys, _ in cache} == {n_ctx}
    _, cache = step(model, ids[:-5], cache, 0)
    logits, _ = step(model, ids[-5:], cache, n_ctx - 5)
    assert np.abs(np.asarray(logits) - subject.logits(ids)[-1]).max() <= 2e-5


@pytest.mark.parametrize("backend", backends.NAMES)
def test_a_model_leaves_params_as_they_are(subject, backend):
    before = flatten(subject.params)
    subject.model(backend)
    assert all(array is before[path] for path, array in flatten(subject.params).items())


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("n_seq", [1, 3])
def test_logits_and_cache_have_the_params_dtype(backend, n_seq, monkeypatch):
    """And so has what goes from block to block."""
    params = backends.get(backend).asarray(params_module.cast(random_params(), "bfloat16"))
    between, block = [], kv_cache.transformer_block
    monkeypatch.setattr(kv_cache, "transformer_block", lambda x, **b: between.append(x) or block(x, **b))
    logits, cache = kv_cache.forward(params, [1, 2, 3][:n_seq], kv_cache.init_cache(params, 8, n_head=2), 0, n_head=2)
    assert len(between) == len(cache) > 1
    assert {array.dtype.name for array in (logits, *between, *cache[0], *cache[1])} == {"bfloat16"}


def test_a_position_that_is_traced_gives_what_a_known_one_gives(subject):
    subject = Subject(subject.hparams, backends.get("jax").asarray(subject.params))
    traced, tokens, cache = jax.jit(subject.forward), np.array([1, 2, 3, 4, 5]), subject.init_cache(32)
    known, _ = subject.forward(tokens, cache, 5)
    assert np.abs(known - traced(tokens, cache, 5)[0]).max() <= 2e-5


@pytest.mark.parametrize(("n_seq", "n_key"), [(64, 64), (65, 65), (65, 90), (100, 300), (256, 256), (301, 301)])
def test_attention_in_parts_is_attention(n_seq, n_key):
    """With and without keys from before, and where the mask hides some more, as with a cache that is not full."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, n_seq, 4)), rng.normal(size=(2, n_key, 4)), rng.normal(size=(2, n_key, 4))
    mask = np.arange(n_key) <= np.arange(n_key - n_seq, n_key)[:, None]
    expected = gpt2.attention(q, k, v, mask)
    assert np.abs(kv_cache.causal_attention(q, k, v, mask) - expected).max() < 1e-14
    further_back = np.arange(n_key) <= np.arange(n_key - n_seq, n_key)[:, None] - 3 if n_key > n_seq + 3 else mask
    expected = gpt2.attention(q, k, v, further_back)
    assert np.abs(kv_cache.causal_attention(q, k, v, further_back) - expected).max() < 1e-14
