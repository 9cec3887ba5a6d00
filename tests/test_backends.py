"""`np` that follows its arguments, and the contract that every backend keeps."""

import numpy
import pytest

import backends
from backends import np
from weights.params import find_dtype

BACKENDS = [pytest.param(backends.get(name), id=name) for name in backends.NAMES]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def test_np_is_numpy_for_numpy_and_for_no_array_at_all():
    assert type(np.exp(numpy.zeros(3))) is numpy.ndarray
    assert type(np.tri(3, dtype=bool)) is numpy.ndarray
    assert np.float32 is numpy.float32
    assert np.pi is numpy.pi
    assert np.concatenate([numpy.zeros(2), numpy.ones(1)]).tolist() == [0, 0, 1]
    with pytest.raises(AttributeError):
        np.no_such_function  # noqa: B018


def test_np_looks_names_up_once():
    np.exp(numpy.zeros(1))
    assert np.exp is np.exp


def nest(backend):
    return backend.asarray({"a": numpy.arange(3, dtype=numpy.float32), "b": [(numpy.zeros((2, 2), numpy.int32),)]})


def test_asarray_and_to_numpy_keep_nest_and_dtype(backend):
    there = nest(backend)
    assert there["a"].dtype == numpy.float32
    back = backend.to_numpy(there)
    assert isinstance(back["b"], list)
    assert isinstance(back["b"][0], tuple)
    assert type(back["a"]) is type(back["b"][0][0]) is numpy.ndarray
    assert back["b"][0][0].dtype == numpy.int32
    assert back["a"].tolist() == [0, 1, 2]


def test_jit_changes_no_result(backend):
    x = backend.asarray(numpy.arange(4.0, dtype=numpy.float32))
    assert backend.to_numpy(backend.jit(lambda tree: tree["x"] * 2)({"x": x})).tolist() == [0, 2, 4, 6]


def test_vmap_maps_axis_0_and_shares_none(backend):
    w, x = backend.asarray((numpy.float32([[1, 2], [3, 4]]), numpy.float32([[1, 0], [0, 1], [1, 1]])))
    batched = backend.vmap(lambda tree, row: (tree["w"] @ row, row.sum()), in_axes=(None, 0))
    y, total = backend.to_numpy(batched({"w": w}, x))
    assert y.tolist() == [[1, 3], [2, 4], [3, 7]]
    assert total.tolist() == [1, 1, 2]
    assert backend.to_numpy(backend.vmap(lambda row: row * 2)(x)).shape == (3, 2)


def test_update_returns_the_buffer_with_the_new_part(backend):
    buffer, new = backend.asarray((numpy.zeros((3, 4), numpy.float32), numpy.ones((1, 2), numpy.float32)))
    for start in [(1, 2), (numpy.int32(1), numpy.int32(2))]:
        after = backend.to_numpy(backend.update(buffer, new, start))
        assert after.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrix_and_table_are_the_arrays_in_what_they_are_for(backend, dtype):
    rng, dtype = numpy.random.default_rng(0), find_dtype(dtype)
    w, rows, xs = (rng.integers(-3, 4, shape).astype(dtype) for shape in [(4, 6), (7, 4), (130, 4)])  # sums are exact
    plain_w, plain_rows = backend.asarray((w, rows))
    matrix, table = backend.prepare({"w": w, "wte": rows}).values()
    for x in backend.asarray([xs[0], xs[:1], xs[:3], xs]):
        for product, expected in [(x @ matrix, x @ plain_w), (x @ table.T, x @ plain_rows.T)]:
            assert product.dtype == expected.dtype
            assert numpy.array_equal(backend.to_numpy(product), backend.to_numpy(expected))
    batched = backend.jit(backend.vmap(lambda w, t, x: (x[None] @ w, x @ t.T), in_axes=(None, None, 0)))
    wide, narrow = backend.to_numpy(batched(matrix, table, backend.asarray(xs)))
    assert numpy.array_equal(wide, (xs @ w)[:, None])
    assert numpy.array_equal(narrow, xs @ rows.T)
    assert numpy.array_equal(backend.to_numpy(table[numpy.array([2, 0])]), rows[[2, 0]])


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="unknown backend 'torch'"):
        backends.get("torch")


def test_value_and_grad_is_that_of_the_first_argument(backend):
    params, x = backend.asarray(({"w": numpy.float32([1, 2]), "b": [numpy.float32([3])]}, numpy.float32([5, 7])))
    value, gradient = backend.value_and_grad(lambda p, x: ((p["w"] * x).sum() + p["b"][0][0]) ** 2)(params, x)
    assert float(value) == 22**2
    gradient = backend.to_numpy(gradient)
    assert gradient["w"].tolist() == [220, 308]
    assert gradient["b"][0].tolist() == [44]
    assert gradient["w"].dtype == numpy.float32
    with pytest.raises(TypeError, match="int32"):
        backend.value_and_grad(lambda x: x.sum())(backend.asarray(numpy.int32([1])))
    with pytest.raises(TypeError, match="shape"):
        backend.value_and_grad(lambda x: x)(x)


@pytest.mark.parametrize(("n", "start"), [(2, 2), (1, 3), (1, 5), (1, -1), (1, -2)])
def test_numpy_refuses_what_does_not_fit(n, start):
    with pytest.raises(ValueError, match="do not fit"):
        backends.get("numpy").update(numpy.zeros(3), numpy.ones(n), (start,))


def test_numpy_refuses_batches_that_are_none():
    with pytest.raises(ValueError, match=r"lengths \[2, 3\]"):
        backends.get("numpy").vmap(lambda a, b: a)(numpy.zeros(2), numpy.zeros(3))
    with pytest.raises(ValueError, match="one axis 0 at least"):
        backends.get("numpy").vmap(lambda a: a, in_axes=(None,))(numpy.zeros(2))


def test_parts_of_numpy_that_do_not_follow_are_not_offered():
    with pytest.raises(AttributeError, match="does not follow"):
        np.linalg  # noqa: B018
