"""A step of training, against one written from the papers with no gradient but differences."""

import functools
import math

import numpy as np
import pytest
from conftest import cast, oracle, random_params

import gpt2
from training import loss, model
from weights.params import flatten

jax = oracle("jax")
oracle("optax")
from training import step as library  # noqa: E402, it needs both

TINY = {"n_vocab": 5, "n_ctx": 4, "n_embd": 4, "n_head": 2, "n_layer": 1}
SMALL = {"n_vocab": 17, "n_ctx": 8, "n_embd": 16, "n_head": 2, "n_layer": 2}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def leaves(params):
    return {path: np.asarray(array) for path, array in flatten(params).items()}


def train(params, batches, optimizer, n_head, n_rows=2, key=0, **settings):
    """The params and losses after a step with each batch."""
    step = library.make_step(optimizer, n_head, n_rows, **settings)
    state, losses = jax.tree.map(jax.numpy.array, (params, optimizer.init(params))), []
    for i, batch in enumerate(batches):
        state, loss = step(state, batch, jax.random.fold_in(jax.random.key(key), i))
        losses.append(float(loss))
    return state[0], losses


@pytest.mark.parametrize("n_seq", [1, 2, 3, 4, 5, 7, 8])
def test_without_dropout_it_is_gpt2(n_seq):
    params = cast(random_params(), "float64")
    ids = np.arange(n_seq)
    found = model.forward(params, ids, 2, model.dropout(0, None))
    assert np.abs(found - gpt2.gpt2(ids, **params, n_head=2)).max() < 1e-12


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    drop = model.dropout(0.25, jax.random.key(0))
    ones = jax.numpy.ones((400, 500))
    first, second = np.asarray(drop(ones)), np.asarray(drop(ones))
    assert set(np.unique(first)) == {0, np.float32(1 / 0.75)}
    assert abs((first == 0).mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / first.size)
    assert abs(((first == 0) & (second == 0)).mean() - 0.0625) < 0.005, "each call has coins of its own"
    assert np.array_equal(first, model.dropout(0.25, jax.random.key(0))(ones))


def test_dropout_is_where_it_belongs():
    """On the embeddings, and on what attention and mlp add in each block: 1 + 2 n_layer times, [n_seq, n_embd]."""
    seen = []
    model.forward(random_params(), np.arange(3), 2, lambda x: (seen.append(x.shape), x)[1])
    assert seen == [(3, 6)] * 5


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


def test_the_schedule():
    peak, n_warmup, n_steps = 3e-3, 4, 20
    rate = library.learning_rate(peak, n_warmup, n_steps)
    assert [float(rate(i)) for i in range(n_steps)] == pytest.approx(
        [reference_rate(i, peak, n_warmup, n_steps) for i in range(n_steps)]
    )
    assert float(rate(n_warmup)) == pytest.approx(peak)
    assert float(rate(n_steps)) == pytest.approx(peak / 20)
    assert float(library.learning_rate(peak, 100, 5)(4)) < peak, "a run may be shorter than its warm-up"


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


def test_ten_steps_equal_the_papers(x64):
    """Some of them clipped."""
    params = cast(random_params(**TINY), "float64")
    batches = np.random.default_rng(1).integers(0, 5, (10, 2, 5))
    peak, n_warmup, decay, beta2, clip = 0.02, 3, 0.1, 0.99, 5.0
    optimizer = library.make_optimizer(library.learning_rate(peak, n_warmup, 10), decay, beta2, clip)
    found, losses = train(params, batches, optimizer, TINY["n_head"], dtype="float64")
    expected, expected_losses = reference_training(params, batches, peak, n_warmup, decay, beta2, clip, TINY["n_head"])
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    for path, array in leaves(found).items():
        assert np.abs(array - expected[path]).max() < 1e-5, path


def test_rows_at_once_change_no_result(x64):
    """With dropout too: a row's coins are its own."""
    params = cast(random_params(**TINY), "float64")
    batches = np.random.default_rng(2).integers(0, 5, (2, 8, 5))
    run = functools.partial(train, params, batches, library.make_optimizer(0.01, 0.1, 0.99, 1.0), 2, dtype="float64")
    found, losses = run(n_rows=2, dropout_rate=0.3)
    expected, expected_losses = run(n_rows=8, dropout_rate=0.3)
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    for path, array in leaves(found).items():
        assert np.abs(array - leaves(expected)[path]).max() < 1e-9


def test_one_batch_is_learned_by_heart():
    batch = np.random.default_rng(0).integers(0, 17, (4, 9))
    batch[:, 0] = [0, 1, 2, 3]  # rows that begin alike could not be told apart
    optimizer = library.make_optimizer(library.learning_rate(1e-2, 10, 200), 0.0, 0.99, 1.0)
    _, losses = train(library.init_params(SMALL, 0), [batch] * 200, optimizer, 2)
    assert losses[0] == pytest.approx(math.log(17), rel=0.02)
    assert losses[-1] < 0.05


def test_bfloat16_has_float32_masters():
    batch = np.random.default_rng(0).integers(0, 5, (2, 5))
    params = random_params(**TINY)
    found, losses = train(params, [batch], library.make_optimizer(1e-3, 0.1, 0.99, 1.0), 2, dtype="bfloat16")
    exact = np.mean([loss.lm_loss(params, row, 2) for row in batch])
    assert {array.dtype.name for array in leaves(found).values()} == {"float32"}
    assert losses != [pytest.approx(exact, rel=1e-5)]
    assert losses == [pytest.approx(exact, rel=0.02)]


@pytest.mark.parametrize("n_windows", [1, 3, 4, 6])
def test_mean_loss_of_windows_that_fill_no_batch(n_windows):
    windows = np.random.default_rng(0).integers(0, 17, (n_windows, 9))
    params = library.init_params(SMALL, 0)
    expected = np.mean([loss.lm_loss(params, row, 2) for row in windows])
    assert library.mean_loss(params, windows, 2, 4) == pytest.approx(expected, rel=1e-6)
