"""A step of training, against one written from the papers with gradients by differences, and NumPy against JAX."""

import functools
import math
import time

import numpy as np
import pytest
from conftest import cast, oracle, random_params

import backends
import gpt2
from backends import numpy_threads
from training import loss, model, optimizer
from training import step as library
from training.model import forward_of
from weights.params import flatten, tree_map

BACKENDS = ["numpy", "jax"]
TINY = {"n_vocab": 5, "n_ctx": 4, "n_embd": 4, "n_head": 2, "n_layer": 1}
SMALL = {"n_vocab": 17, "n_ctx": 8, "n_embd": 16, "n_head": 2, "n_layer": 2}


@pytest.fixture(params=BACKENDS)
def x64(request):
    """Each backend in turn, ready for float64."""
    if request.param == "numpy":
        yield "numpy"
    else:
        with oracle("jax").enable_x64(True):
            yield "jax"


def leaves(params):
    return {path: np.asarray(array) for path, array in flatten(params).items()}


@functools.cache
def step_on(backend, n_head, micro_batch_size, dropout_rate, dtype, **settings):
    """The step; runs with the same settings share it, so that JAX compiles it once."""
    computing = backends.get(backend)
    loss_of = library.make_loss(computing, forward_of({"n_head": n_head}), dropout_rate, dtype)
    return library.make_step(computing, loss_of, micro_batch_size, **settings)


def train(
    params, batches, backend, n_head, schedule, micro_batch_size=2, dropout_rate=0.0, dtype="float32", **settings
):
    """The params and losses after a step with each batch."""
    computing, step = backends.get(backend), step_on(backend, n_head, micro_batch_size, dropout_rate, dtype, **settings)
    state, losses = optimizer.init_state(tree_map(backends.np.array, computing.asarray(params))), []
    for i, batch in enumerate(batches):
        state, loss = step(state, batch, i, schedule(i))
        losses.append(float(loss))
    return computing.to_numpy(state["params"]), losses


@pytest.mark.parametrize("n_seq", [1, 2, 3, 4, 5, 7, 8])
def test_without_dropout_it_is_gpt2(n_seq):
    params = cast(random_params(), "float64")
    ids = np.arange(n_seq)
    found = model.forward(params, ids, 2, model.dropout(0.0, None))
    assert np.abs(found - gpt2.gpt2(ids, **params, n_head=2)).max() < 1e-12


# ---- Dropout ----


def calls(key, ones, rate, n_calls):
    drop = model.dropout(rate, key)
    return [drop(ones) for _ in range(n_calls)]


@functools.cache
def calls_on_jax(rate, n_calls):
    jax = oracle("jax")
    return jax.jit(jax.vmap(functools.partial(calls, rate=rate, n_calls=n_calls), in_axes=(0, None)))


def masks(rate=0.25, seed=0, n_done=0, n_batch=4, n_calls=3, shape=(40, 50), backend="numpy"):
    """[n_batch, n_calls, *shape]: which numbers are kept. On JAX under jit and vmap, on NumPy row by row."""
    keys, ones = model.dropout_keys(seed, n_done, n_batch), np.ones(shape, np.float32)
    if backend == "jax":
        dropped = np.stack(calls_on_jax(rate, n_calls)(keys, ones), axis=1)
    else:
        dropped = np.stack([np.stack(calls(key, ones, rate, n_calls)) for key in keys])
    assert set(np.unique(dropped)) <= {0, np.float32(1 / (1 - rate))}
    return dropped > 0


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_both_backends_draw_the_same_masks_without_a_warning(rate):
    for seed, n_done in [(0, 0), (1, 7), (2**32 - 1, 10**6)]:  # one program on JAX
        with np.errstate(all="raise"):
            found = masks(rate, seed, n_done)
        assert np.array_equal(found, masks(rate, seed, n_done, backend="jax")), (seed, n_done)


def test_the_hash_is_murmurs():
    """Published hashes of the empty text, of which murmur3 computes only this last step (seeds 0, 1, 0xffffffff)."""
    found = model.murmur3(np.array([0, 1, 0xFFFFFFFF], np.uint32))
    assert found.tolist() == [0, 0x514E28B7, 0x81F16F39]
    assert found.dtype == np.uint32


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.25, 0.5, 0.98])
@pytest.mark.parametrize("seed", range(5))
def test_the_share_that_is_kept(rate, seed):
    """In all, for each call, row, position and column: within 4 standard errors (of 5 for the largest of many)."""
    kept = masks(rate, seed, n_done=seed, n_batch=8, n_calls=5, shape=(64, 96))
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(kept.mean() - (1 - rate)) < 4 * deviation / math.sqrt(kept.size)
    for axis in range(4):
        shares = kept.mean(axis=tuple({0, 1, 2, 3} - {axis}))
        assert np.abs(shares - (1 - rate)).max() < 5 * deviation / math.sqrt(kept.size / len(shares))


@pytest.mark.parametrize("axis", ["row", "call", "position", "column", "step", "seed"])
def test_neighbouring_masks_are_uncorrelated(axis):
    draw = functools.partial(masks, rate=0.5, n_batch=8, n_calls=6, shape=(50, 60))
    one = draw(seed=3, n_done=4)
    if axis in ("step", "seed"):
        other = draw(seed=3 + (axis == "seed"), n_done=4 + (axis == "step"))
    else:
        other = np.roll(one, 1, axis=["row", "call", "position", "column"].index(axis))
    product = (one * 2.0 - 1) * (other * 2 - 1)
    assert abs(product.mean()) < 4 / math.sqrt(product.size)


def test_a_mask_depends_on_the_row_of_the_batch_not_on_the_batch():
    assert np.array_equal(masks(n_batch=2), masks(n_batch=4)[:2])


def test_dropout_keeps_the_mean():
    drop = model.dropout(0.25, model.dropout_keys(0, 0, 1)[0])
    ones = np.ones((400, 500), np.float32)
    first, second = drop(ones), drop(ones)
    assert abs(first.mean() - 1) < 0.01
    assert abs(((first == 0) & (second == 0)).mean() - 0.0625) < 0.005, "each call has coins of its own"
    assert np.array_equal(first, model.dropout(0.25, model.dropout_keys(0, 0, 1)[0])(ones))
    assert first.dtype == np.float32


def test_dropout_is_where_it_belongs():
    """On the embeddings, and on what attention and mlp add in each block: 1 + 2 n_layer times, [n_seq, n_embd]."""
    seen = []
    model.forward(random_params(), np.arange(3), 2, lambda x: (seen.append(x.shape), x)[1])
    assert seen == [(3, 6)] * 5


# ---- Steps ----


def test_fresh_params():
    hparams = {"n_vocab": 2048, "n_ctx": 64, "n_embd": 64, "n_head": 2, "n_layer": 8}
    params = leaves(library.init_params(hparams, seed=0))
    for path, array in params.items():
        assert array.dtype == np.float32
        if array.ndim == 1:
            assert (array == (path[-1] == "g")).all()
        else:
            expected = 0.02 / 4 if "c_proj" in path else 0.02  # sqrt(2 * 8) is 4
            assert array.std() == pytest.approx(expected, rel=0.05), path
    tokens = np.random.default_rng(0).integers(0, 2048, 64)
    found = loss.lm_loss(library.init_params(hparams, seed=1), tokens, 2)
    assert abs(found / math.log(2048) - 1) < 0.02


def reference_rate(i, peak, n_warmup, n_steps):
    if i < n_warmup:
        return peak * (i + 1) / (n_warmup + 1)
    return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * (i - n_warmup) / (n_steps - n_warmup))) / 2)


def reference_training(params, batches, peak, n_warmup, decay, beta2, clip, n_head):
    """AdamW, clipping and schedule as the papers have them, on gradients by central differences, in NumPy float64."""

    def mean_loss(batch):
        return np.mean([loss.lm_loss(params, row, n_head) for row in batch])

    def gradient(array, batch, h=1e-5):
        result = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            array[i] += h
            above = mean_loss(batch)
            array[i] -= 2 * h
            result[i] = (above - mean_loss(batch)) / (2 * h)
            array[i] += h
        # A key's bias adds the same to all scores of a query, so its gradient is 0. AdamW would make much of 1e-12.
        return np.where(np.abs(result) < 1e-9, 0, result)

    arrays, losses, norms = leaves(params), [], []
    m, v = ({path: np.zeros_like(a) for path, a in arrays.items()} for _ in range(2))
    for i, batch in enumerate(batches):
        losses.append(mean_loss(batch))
        gradients = {path: gradient(array, batch) for path, array in arrays.items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        norms.append(norm)
        for path, array in arrays.items():
            g = gradients[path] * min(1, clip / norm)
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = beta2 * v[path] + (1 - beta2) * g**2
            direction = m[path] / (1 - 0.9 ** (i + 1)) / (np.sqrt(v[path] / (1 - beta2 ** (i + 1))) + 1e-8)
            rate = reference_rate(i, peak, n_warmup, len(batches))
            array -= rate * (direction + (decay * array if array.ndim > 1 else 0))
    assert min(norms) < clip < max(norms)
    return arrays, losses


TEN_BATCHES = np.random.default_rng(1).integers(0, 5, (10, 2, 5))


@pytest.fixture(scope="module")
def papers():
    """(the params, the losses) after ten steps by the papers."""
    params = cast(random_params(**TINY), "float64")
    return reference_training(params, TEN_BATCHES, 0.02, 3, decay=0.1, beta2=0.99, clip=5.0, n_head=TINY["n_head"])


def test_ten_steps_equal_the_papers(x64, papers):
    """Some of them clipped."""
    schedule = functools.partial(optimizer.learning_rate, peak=0.02, n_warmup=3, n_steps=10)
    settings = {"weight_decay": 0.1, "beta2": 0.99, "clip": 5.0, "dtype": "float64"}
    params = cast(random_params(**TINY), "float64")
    found, losses = train(params, TEN_BATCHES, x64, TINY["n_head"], schedule, **settings)
    expected, expected_losses = papers
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    for path, array in leaves(found).items():
        assert np.abs(array - expected[path]).max() < 1e-5, path


def test_micro_batches_change_no_result(x64):
    """With dropout too: a row's mask is its own."""
    params = cast(random_params(**TINY), "float64")
    batches = np.random.default_rng(2).integers(0, 5, (2, 8, 5))
    run = functools.partial(train, params, batches, x64, 2, lambda i: 0.01, dtype="float64", dropout_rate=0.3)
    found, losses = run(micro_batch_size=2)
    expected, expected_losses = run(micro_batch_size=8)
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    for path, array in leaves(found).items():
        assert np.abs(array - leaves(expected)[path]).max() < 1e-9


@pytest.mark.parametrize("dropout_rate", [0.0, 0.2])
def test_numpy_trains_as_jax_does(dropout_rate):
    """Ten steps, the same dropout: the same losses within 1e-5."""
    oracle("jax")
    starts = np.random.default_rng(3).integers(0, 17, (10, 4, 1))
    params, batches = library.init_params(SMALL, 0), (starts + np.arange(9)) % 17  # each id is followed by the next
    schedule = functools.partial(optimizer.learning_rate, peak=1e-2, n_warmup=3, n_steps=10)
    run = functools.partial(train, params, batches, n_head=2, schedule=schedule, dropout_rate=dropout_rate, seed=5)
    found, expected = run(backend="numpy")[1], run(backend="jax")[1]
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[9] < found[0] - 0.3, "it learns"


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_batch_is_learned_by_heart(backend):
    batch = np.random.default_rng(0).integers(0, 17, (4, 9))
    batch[:, 0] = [0, 1, 2, 3]  # rows that begin alike could not be told apart
    schedule = functools.partial(optimizer.learning_rate, peak=1e-2, n_warmup=10, n_steps=200)
    params = library.init_params(SMALL, 0)
    _, losses = train(params, [batch] * 200, backend, 2, schedule, seed=5)  # settings of the test above
    assert losses[0] == pytest.approx(math.log(17), rel=0.02)
    assert losses[-1] < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_has_float32_masters(backend):
    oracle("ml_dtypes")
    batch = np.random.default_rng(0).integers(0, 5, (2, 5))
    params = random_params(**TINY)
    found, losses = train(params, [batch], backend, 2, lambda i: 1e-3, dtype="bfloat16")
    exact = np.mean([loss.lm_loss(params, row, 2) for row in batch])
    assert {array.dtype.name for array in leaves(found).values()} == {"float32"}
    assert losses != [pytest.approx(exact, rel=1e-5)]
    assert losses == [pytest.approx(exact, rel=0.02)]


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_over_adds_trees_in_the_order_of_the_rows(backend, n_threads, monkeypatch):
    """To the bit, though here the first rows are ready last."""
    numbers = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32) ** 9
    rows, told = {"a": numbers, "b": [np.arange(7, dtype=np.int32)]}, []
    monkeypatch.setattr(numpy_threads, "max_threads", lambda: n_threads)
    monkeypatch.setattr(numpy_threads, "set_threads", told.append)

    def f(row):
        if backend == "numpy":
            time.sleep(0.002 * (6 - int(row["b"][0])))
        return row["a"].sum(), {"b": row["b"][0] * 2}

    computing = backends.get(backend)
    total, found = computing.to_numpy(computing.jit(functools.partial(computing.sum_over, f))(rows))
    assert total == functools.reduce(np.add, numbers.sum(axis=1))
    assert found["b"] == 42
    assert told == ([1, 3] if backend == "numpy" and n_threads == 3 else []), "one BLAS thread each, then as before"


@pytest.mark.parametrize("n_windows", [1, 3, 4, 6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_loss_of_windows_that_fill_no_batch(n_windows, backend):
    windows = np.random.default_rng(0).integers(0, 17, (n_windows, 9))
    params = library.init_params(SMALL, 0)
    expected = np.mean([loss.lm_loss(params, row, 2) for row in windows])
    mean_loss = library.make_mean_loss(backends.get(backend), forward_of({"n_head": 2}), micro_batch_size=4)
    assert mean_loss(params, windows) == pytest.approx(expected, rel=1e-6)
