"""vmap on NumPy: equal to a loop over the rows and to jax.vmap, and in one product where the matrix is the same."""

import functools

import jax
import numpy
import pytest
from conftest import cast, model_of, random_params
from random_functions import random_batch, random_function

import backends
import gpt2
from backends import np, update
from inference import batching, sampling, slot_caches
from inference.model import init_cache
from weights.params import tree_map

NUMPY = backends.get("numpy")
vmap = NUMPY.vmap
rng = numpy.random.default_rng(0)


def loop(f, in_axes, *args):
    """vmap as it would be without vmap."""
    n_batch = next(len(arg) for arg, axis in zip(args, in_axes, strict=True) if axis == 0)
    rows = [f(*(x if axis is None else x[i] for x, axis in zip(args, in_axes, strict=True))) for i in range(n_batch)]
    return tree_map(lambda *leaves: numpy.stack(leaves), *rows)


def assert_equal(found, expected, tolerance):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is numpy.ndarray
        assert ours.shape == theirs.shape
        assert ours.dtype != object
        numpy.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_compositions_equal_a_loop(first):
    for seed in range(first, first + 20):
        f, inputs = random_function(seed)
        in_axes, batch = random_batch(inputs, seed)
        assert_equal(vmap(f, in_axes)(*batch), loop(f, in_axes, *batch), 1e-12)


def check_against_jax(seed):
    f, inputs = random_function(seed)
    in_axes, batch = random_batch(inputs, seed)
    with jax.enable_x64(True):
        expected = jax.jit(jax.vmap(f, in_axes))(*map(jax.numpy.asarray, batch))
        assert_equal(vmap(f, in_axes)(*batch), expected, 1e-10)


@pytest.mark.parametrize("seed", range(1000, 1006))
def test_random_compositions_equal_jax(seed):
    check_against_jax(seed)


@pytest.mark.trial
@pytest.mark.parametrize("seed", range(300))
def test_300_random_compositions_equal_jax(seed):
    check_against_jax(seed)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-12)])
def test_the_model_gives_each_row_what_it_gives_alone(dtype, tolerance):
    params, rows = cast(random_params(n_ctx=12), dtype), rng.integers(0, 11, (5, 12))
    model = functools.partial(lambda params, ids: [gpt2.gpt2(ids, **params, n_head=2)])
    found = vmap(model, (None, 0))(params, rows)
    assert found[0].dtype == dtype
    scale = abs(found[0]).max()
    assert_equal([found[0] / scale], [loop(model, (None, 0), params, rows)[0] / scale], tolerance)
    if dtype == "float32":
        assert_equal(
            [found[0] / scale],
            [jax.jit(jax.vmap(model, (None, 0)))(*jax.tree.map(jax.numpy.asarray, (params, rows)))[0] / scale],
            2e-5,
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-12)])
def test_cached_rows_at_their_own_positions(dtype, tolerance):
    """Prompts of 2, 5 and 3 ids, then one id at a time: each row as if it were alone."""
    params = cast(random_params(n_ctx=10), dtype)
    model = model_of(params, 2)
    texts = [rng.integers(0, 11, n).tolist() for n in (2, 5, 3)]
    tokens, position, cache = [text[:] for text in texts], [0, 0, 0], slot_caches.repeat(init_cache(model, 10), 3)
    for _ in range(3):
        logits, cache = batching.step_batch(model, tokens, cache, position)
        for i, text in enumerate(texts):
            expected = gpt2.gpt2(text, **params, n_head=2)[-1]
            assert_equal([logits[i] / abs(expected).max()], [expected / abs(expected).max()], tolerance)
        position = [len(text) for text in texts]
        tokens = [[int(numpy.argmax(row))] for row in logits]
        texts = [text + new for text, new in zip(texts, tokens, strict=True)]


@pytest.mark.parametrize("in_axes", [(0, None, None), (0, 0, None), (0, None, 0), (0, 0, 0), (None, 0, 0)])
def test_a_layer_whose_arguments_differ_from_row_to_row(in_axes):
    """All lengths are 5: numbers of a wrong row would broadcast without an error."""
    shapes = (5, 5), (5,), (5,)
    args = [rng.normal(size=(5, *shape) if axis == 0 else shape) for shape, axis in zip(shapes, in_axes, strict=True)]
    found = vmap(gpt2.layer_norm, in_axes)(*args)
    assert_equal([found], [loop(gpt2.layer_norm, in_axes, *args)], 1e-12)
    named = vmap(lambda x, g, b: gpt2.layer_norm(x, g=g, b=b), in_axes)(*args)
    assert numpy.array_equal(named, found)


SAMPLING = {
    "sample": lambda logits, coin, k, ids: sampling.sample(logits, coin),
    "top_k": lambda logits, coin, k, ids: sampling.top_k(logits, 5),
    "top_p": lambda logits, coin, k, ids: sampling.top_p(logits, 0.7),
    "top_p with another p for each row": lambda logits, coin, k, ids: sampling.keep_best(logits, k),
    "repetition_penalty": lambda logits, coin, k, ids: sampling.repetition_penalty(logits, ids, 1.3),
    "temperature": lambda logits, coin, k, ids: sampling.temperature(logits, 0),
    "min_new_tokens": lambda logits, coin, k, ids: sampling.min_new_tokens(logits, 1, 3, [2, 5]),
    "warp": lambda logits, coin, k, ids: sampling.warp(logits, sampling.SamplingParams(0.8, 9, 0.9)),
    "all": lambda logits, coin, k, ids: sampling.sample(sampling.top_p(sampling.top_k(logits / 2, 7), 0.9), coin),
    "beam scores": lambda logits, coin, k, ids: np.log(gpt2.softmax(logits)) + coin,
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_gives_each_row_what_it_gives_alone(name):
    logits = numpy.round(rng.normal(size=(7, 23)), 1).astype(numpy.float32)  # with equals among them
    args = logits, rng.random(7, numpy.float32), rng.integers(1, 23, 7), rng.integers(0, 23, (7, 4))
    f = SAMPLING[name]
    found = vmap(f)(*args)
    assert_equal([found], [loop(f, (0, 0, 0, 0), *args)], 2e-6)
    assert_equal([found], [jax.jit(jax.vmap(f))(*args)], 2e-5)


class SeenMatrix:
    """Stands for a matrix in x @ w, and tells which x came."""

    def __init__(self, w):
        self.w, self.shape, self.ndim, self.seen = w, w.shape, w.ndim, []

    def __rmatmul__(self, x):
        self.seen.append(x.shape)
        return x @ self.w

    __array_ufunc__ = None


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_one_matrix_for_all_rows_is_read_once(shape):
    w, x = SeenMatrix(rng.normal(size=(4, 6))), rng.normal(size=(5, *shape))
    found = vmap(lambda w, x: x @ w, (None, 0))(w, x)
    assert w.seen == [(x.size // 4, 4)]
    assert_equal([found], [x @ w.w], 1e-12)


def test_a_buffer_of_each_row_is_written_in_place():
    buffer, new = numpy.zeros((3, 2, 5)), rng.normal(size=(3, 2, 1))
    written = vmap(lambda buffer, new, at: update(buffer, new, (0, at)))(buffer, new, numpy.array([4, 0, 2]))
    assert written is buffer
    expected = numpy.zeros((3, 2, 5))
    for i, at in enumerate([4, 0, 2]):
        expected[i, :, at] = new[i, :, 0]
    assert numpy.array_equal(written, expected)


def test_a_buffer_for_all_rows_is_copied_for_each():
    buffer, new = numpy.zeros(4), numpy.ones((3, 2))
    f = lambda buffer, new, at: update(buffer, new, (at,))  # noqa: E731
    assert vmap(f, (None, 0, None))(buffer, new, 1).tolist() == [[0, 1, 1, 0]] * 3
    assert vmap(f, (None, None, 0))(buffer, new[0], numpy.array([0, 2])).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert not buffer.any()
    with pytest.raises(ValueError, match="do not fit"):
        vmap(f, (None, 0, None))(buffer, new, 3)


def test_vmap_inside_vmap():
    """Every pair of rows; and the matrices of the outer rows with those of the inner ones."""
    x, y, w = rng.normal(size=(3, 4)), rng.normal(size=(5, 4)), rng.normal(size=(2, 4, 4))

    def pairs(vmap, x, y, w):
        one = lambda a, b, w: np.tanh(a @ w) @ b + a[np.argmax(b)] * np.sort(a)[0] - w[1, np.argmin(a)]  # noqa: E731
        return vmap(vmap(vmap(one, (None, 0, None)), (0, None, None)), (None, None, 0))(x, y, w)

    found = pairs(vmap, x, y, w)
    assert found.shape == (2, 3, 5)
    with jax.enable_x64(True):
        assert_equal([found], [pairs(jax.vmap, *map(jax.numpy.asarray, (x, y, w)))], 1e-12)


def test_trees_go_in_and_come_out_and_what_does_not_depend_on_the_row_is_repeated():
    tree = {"a": [numpy.arange(3.0), (numpy.ones((3, 2)),)]}
    found = vmap(lambda tree, n: {"sum": tree["a"][0] + n, "same": (numpy.arange(2), n, None)}, (0, None))(tree, 2)
    assert found["sum"].tolist() == [2, 3, 4]
    assert found["same"][0].tolist() == [[0, 1]] * 3
    assert found["same"][1].tolist() == [2] * 3
    assert found["same"][2] is None
    found["same"][0][0] = 7  # the rows do not share memory
    assert found["same"][0].tolist() == [[7, 7], [0, 1], [0, 1]]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_dtypes_are_kept(dtype):
    x = rng.normal(size=(3, 2, 4)).astype(backends.get("jax").jax.numpy.dtype(dtype))
    for f in [gpt2.gelu, gpt2.softmax, lambda x: 2 * x, lambda x: x @ x.mT, lambda x: x.astype(x.dtype) + 1]:
        assert vmap(f)(x).dtype == f(x[0]).dtype


X = numpy.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda x: np.einsum("i->", x), NotImplementedError, "no rule for einsum"),
        (lambda x: np.median(x), NotImplementedError, "no rule for median"),
        (lambda x: x[x > 0], NotImplementedError, "another length in each row"),
        (lambda x: numpy.exp(x), TypeError, "BatchTracer"),
        (lambda x: numpy.asarray(x), TypeError, "no value that Python or NumPy itself could see"),
        (lambda x: numpy.stack([x, x]), TypeError, "no value"),
        (lambda x: numpy.ones(3)[x[0]], TypeError, "pass an array that it indexes as an argument"),
        (lambda x: np.add(x, [x[0], 1]), TypeError, "np.stack"),
        (lambda x: x if x[0] > 0 else -x, TypeError, "Use np.where"),
        (lambda x: int(x[0]), TypeError, "no value"),
        (lambda x: range(x[0]), TypeError, "no value"),
        (lambda x: x[: x[0]], TypeError, "no value"),
        (lambda x: x.__setitem__(0, 1), TypeError, "cannot be assigned to"),
        (lambda x: np.max(x, axis=-2), IndexError, "axis -2 is out of bounds for array of dimension 1"),
        (lambda x: len(x[0]), TypeError, "unsized"),
    ],
)
def test_what_cannot_be_done_is_refused(f, error, message):
    with pytest.raises(error, match=message):
        vmap(f)(X)


@pytest.mark.parametrize(
    ("in_axes", "args", "message"),
    [
        (1, (X,), r"in_axes \[1\] for 1 arguments: there must be a 0 or a None for each"),
        ((0,), (X, X), r"in_axes \[0\] for 2 arguments"),
        (({"a": 0},), (X,), "in_axes"),
        (None, (X,), r"lengths \[\]: one axis 0 at least"),
        (0, (X, X[:2]), r"lengths \[2, 3\].*one length for all"),
        (0, (X, 1.0), "holds a single number: its axis must be None"),
    ],
)
def test_bad_axes_are_refused(in_axes, args, message):
    with pytest.raises(ValueError, match=message):
        vmap(lambda *args: args[0], in_axes)(*args)
