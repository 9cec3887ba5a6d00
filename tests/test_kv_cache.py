"""The cache changes nothing but the time: every way of splitting a text gives the logits of the whole."""

import numpy as np
import pytest
from conftest import model_of, oracle, random_params

import backends
import gpt2
from inference import kv_cache
from inference.model import init_cache, step
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


@pytest.mark.parametrize("case", range(5))
def test_every_split_gives_the_uncached_logits(golden, case):
    ids, params, n_head = golden["cases"][case]["ids"], golden["params"], golden["hparams"]["n_head"]
    expected = gpt2.gpt2(ids, **params, n_head=n_head)
    for split in splits(len(ids)):
        cache, position, rows = kv_cache.init_cache(params, len(ids) + 3, n_head=n_head), 0, []
        for n in split:
            tokens = ids[position : position + n]
            logits, cache = kv_cache.forward(params, tokens, cache, position, n_head=n_head)
            rows, position = [*rows, logits], position + n
        assert np.abs(np.concatenate(rows) - expected).max() <= 2e-5, split
        assert np.abs(expected - golden["arrays"][f"logits_{case}"]).max() <= 2e-5


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("case", [1, 2])
def test_read_gives_the_last_row_however_the_prompt_is_split(golden, backend, case):
    ids, params, n_head = golden["cases"][case]["ids"], golden["params"], golden["hparams"]["n_head"]
    model = model_of(params, n_head, backend)
    expected = gpt2.gpt2(ids, **params, n_head=n_head)
    for split in splits(len(ids)):
        cache, position = init_cache(model, len(ids)), 0
        for n in split:
            logits, cache = step(model, ids[position : position + n], cache, position)
            position += n
            assert np.abs(model.backend.to_numpy(logits) - expected[position - 1]).max() <= 2e-5, (split, position)


@pytest.mark.parametrize("backend", backends.NAMES)
def test_greedy_ids_are_those_of_the_plain_loop(golden, backend):
    params, n_head = golden["params"], golden["hparams"]["n_head"]
    for case in golden["cases"]:
        ids = list(case["ids"])
        for _ in range(2):  # the second call finds nothing of the first
            assert kv_cache.generate(ids, params, n_head, 24, backend) == case["greedy_24"]
        assert ids == case["ids"]


@pytest.mark.parametrize("backend", backends.NAMES)
def test_the_window_may_be_filled_and_no_more(golden, backend):
    params, n_head, n_ctx = golden["params"], golden["hparams"]["n_head"], golden["hparams"]["n_ctx"]
    ids = [i % 512 for i in range(7, 7 + n_ctx)]
    for n_prompt in (n_ctx - 1, n_ctx - 10, 65):
        expected = gpt2.generate(ids[:n_prompt], params, n_head, n_ctx - n_prompt)
        assert kv_cache.generate(ids[:n_prompt], params, n_head, n_ctx - n_prompt, backend) == expected
    assert kv_cache.generate(ids, params, n_head, 0, backend) == []


@pytest.mark.parametrize(("n_prompt", "n_new"), [(97, 0), (96, 1), (1, 96)])
def test_too_much_raises_before_any_compute(golden, n_prompt, n_new, monkeypatch):
    monkeypatch.setattr(kv_cache, "make_model", None)
    with pytest.raises(ValueError, match="n_ctx 96"):
        kv_cache.generate([1] * n_prompt, golden["params"], golden["hparams"]["n_head"], n_new)


def test_a_position_in_an_array_is_not_taken_for_a_known_one(golden):
    """Neither a number nor traced: then the whole cache is looked at, and the mask hides what is not filled."""
    params, n_head, ids = golden["params"], golden["hparams"]["n_head"], golden["cases"][0]["ids"][:9]
    expected = gpt2.gpt2(ids, **params, n_head=n_head)[-1]
    cache = kv_cache.init_cache(params, 12, n_head=n_head)
    cache = kv_cache.forward(params, ids[:-1], cache, 0, n_head=n_head)[1]
    for position in (len(ids) - 1, np.array(len(ids) - 1)):
        logits = kv_cache.forward(params, ids[-1:], cache, position, 0, n_head=n_head)[0]
        assert np.abs(logits - expected).max() < 2e-5


def test_a_chunk_at_the_end_of_the_cache_is_not_moved_back(golden):
    """JAX would shift a padded chunk that does not fit to the left, over what stands there."""
    ids, params, n_head = golden["cases"][2]["ids"], golden["params"], golden["hparams"]["n_head"]
    ids = (ids * 3)[:96]
    model = model_of(params, n_head, "jax")
    cache = init_cache(model, 96)
    assert {keys.shape[-1] for keys, _ in cache} == {96}
    _, cache = step(model, ids[:91], cache, 0)
    logits, _ = step(model, ids[91:], cache, 91)
    assert np.abs(np.asarray(logits) - gpt2.gpt2(ids, **params, n_head=n_head)[-1]).max() <= 2e-5


@pytest.mark.parametrize("backend", backends.NAMES)
def test_a_model_leaves_params_as_they_are(backend):
    params = random_params()
    before = flatten(params)
    model_of(params, 2, backend)
    assert all(array is before[path] for path, array in flatten(params).items())


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


def test_a_position_that_is_traced_gives_what_a_known_one_gives(golden):
    params = backends.get("jax").asarray(golden["params"])
    ids, n_head = golden["cases"][1]["ids"], golden["hparams"]["n_head"]
    traced = jax.jit(lambda tokens, cache, at: kv_cache.forward(params, tokens, cache, at, n_head=n_head))
    tokens, cache = np.array(ids), kv_cache.init_cache(params, 32, n_head=n_head)
    known, _ = kv_cache.forward(params, tokens, cache, 5, n_head=n_head)
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
