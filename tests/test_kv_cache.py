"""The cache changes nothing but the time: every way of splitting a text gives the logits of the whole."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, model_of, oracle, random_params

import backends
import gpt2
import utils
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


def test_numpy_writes_into_the_one_cache_and_copies_none(golden):
    params, n_head = golden["params"], golden["hparams"]["n_head"]
    cache = kv_cache.init_cache(params, 8, n_head=n_head)
    filled = kv_cache.forward(params, [1, 2], cache, 0, n_head=n_head)[1]
    for (keys, values), same in zip(cache, filled, strict=True):
        assert same[0] is keys
        assert same[1] is values
        assert (keys.shape, values.shape) == ((4, 12, 8), (4, 8, 12))
        for array in (keys.mT, values):
            assert np.abs(array[:, :2]).min() > 0
            assert np.abs(array[:, 2:]).max() == 0
    assert len(cache) == 3


def test_a_position_in_an_array_is_not_taken_for_a_known_one(golden):
    """Neither a number nor traced: then the whole cache is looked at, and the mask hides what is not filled."""
    params, n_head, ids = golden["params"], golden["hparams"]["n_head"], golden["cases"][0]["ids"][:9]
    expected = gpt2.gpt2(ids, **params, n_head=n_head)[-1]
    cache = kv_cache.init_cache(params, 12, n_head=n_head)
    cache = kv_cache.forward(params, ids[:-1], cache, 0, n_head=n_head)[1]
    for position in (len(ids) - 1, np.array(len(ids) - 1)):
        logits = kv_cache.forward(params, ids[-1:], cache, position, 0, n_head=n_head)[0]
        assert np.abs(logits - expected).max() < 2e-5


def test_jax_compiles_one_program_per_bucket_and_one_for_decoding(golden, monkeypatch):
    traced = []
    forward = kv_cache.forward
    monkeypatch.setattr(kv_cache, "forward", lambda *a, **k: traced.append(a[1].shape) or forward(*a, **k))
    kv_cache.compiled.cache_clear()
    params = backends.get("jax").asarray(golden["params"])
    for n_prompt in range(1, 45, 2):  # with 20 more, all fit into a cache of 64
        kv_cache.generate([5] * n_prompt, params, golden["hparams"]["n_head"], 20, "jax")
    kv_cache.compiled.cache_clear()
    assert sorted(traced) == [(1,), (16,), (32,), (64,)], "the first serves both a prompt of one token and decoding"


def test_jax_traces_one_block_for_all(golden, monkeypatch):
    """Tracing is Python, and costs a start 0.1 s where each of twelve blocks is traced."""
    traced, block = [], kv_cache.transformer_block
    monkeypatch.setattr(kv_cache, "transformer_block", lambda *a, **k: traced.append(a[0].shape) or block(*a, **k))
    kv_cache.compiled.cache_clear()
    kv_cache.generate([5] * 9, golden["params"], golden["hparams"]["n_head"], 3, "jax")
    kv_cache.compiled.cache_clear()
    assert golden["hparams"]["n_layer"] > 1
    assert [n_seq for n_seq, _ in traced] == [16, 1], "one for the prompt, one for each token after it"


def test_larger_models_have_a_set_of_programs_for_each_cache_size(monkeypatch):
    """Caches have 64, 128, 256, 512, 768 or 1024 positions: to read 1024 for each token of a short text costs more."""
    traced, forward = [], kv_cache.forward
    monkeypatch.setattr(
        kv_cache, "forward", lambda *a, **k: traced.append((len(a[1]), a[2][0][0].shape[-1])) or forward(*a, **k)
    )
    kv_cache.compiled.cache_clear()
    params = backends.get("jax").asarray(random_params(n_ctx=1024, n_layer=1))
    for n_prompt in range(5, 1000, 34):
        kv_cache.generate([5] * n_prompt, params, 2, 4, "jax")
    kv_cache.compiled.cache_clear()
    assert len(traced) == len(set(traced))
    assert {n_cache for _, n_cache in traced} == {64, 128, 256, 512, 768, 1024}
    assert {n for n, _ in traced} == {1, 16, 64, 128, 256, 512, 768, 1024}


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


def test_prepare_gives_the_memory_of_what_it_copies_back(tmp_path):
    """A model of 6 GB would need 10 otherwise."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or jax.default_backend() != "cpu":
        pytest.skip("looks at /proc, and for copies that are made on a CPU")
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)

    def n_mapped():
        return sum(line.endswith(str(tmp_path / utils.DATA)) for line in maps.read_text(encoding="utf-8").splitlines())

    _, hparams, params = utils.load_folder(tmp_path)
    n_tensors, n_matrices = n_mapped(), 4 * hparams["n_layer"]
    assert n_tensors > n_matrices
    held = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert held.count(str(tmp_path / utils.DATA)) <= n_matrices + 3, "a process may have 256 files open, or 1024"
    library = backends.get("jax")
    model = kv_cache.make_model(library.prepare(params), hparams["n_head"], library)
    jax.block_until_ready(model.params)
    assert n_mapped() <= n_tensors - n_matrices


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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_long_text_goes_on_as_it_was_while_matrices_are_laid_out_anew(dtype):
    params = params_module.cast(random_params(n_vocab=200, n_ctx=80, n_embd=520, n_layer=2), dtype)
    model = model_of(params, 2)
    ids = list(kv_cache.greedy(model, [5, 6, 7], 77))
    assert ids == gpt2.generate([5, 6, 7], params, 2, 77)
    assert all(block["mlp"]["c_proj"]["w"].w.flags.f_contiguous for block in model.params["blocks"])
    again = model_of(model.params, 2)  # what a Model holds can be loaded again
    assert list(kv_cache.greedy(again, [5, 6, 7], 9)) == ids[:9]


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
