"""How matrices lie in memory: which form each backend chooses, and that numbers stay the same."""

import re
import weakref

import numpy as np
import pytest
from conftest import model_of, oracle, random_params

import backends
import gpt2
from inference.model import greedy
from weights import params as params_module
from weights.params import find_dtype

jax = oracle("jax")


@pytest.fixture(scope="module")
def library():
    return backends.get("jax")


def test_numpy_lays_out_by_columns_what_is_tall_and_often_read():
    numpy_backend, rng = backends.get("numpy"), np.random.default_rng(0)
    w, xs = (rng.integers(-3, 4, shape).astype(np.float32) for shape in [(2048, 513), (40, 2048)])  # sums are exact
    expected, kept, released = xs @ w, w, weakref.ref(w)
    matrix = numpy_backend.prepare({"w": w})["w"]
    for i in range(63):
        assert np.array_equal(xs @ matrix, expected), "more than 32 rows do not count: they cost more than reading w"
        x, y = (xs[i % 5], expected[i % 5]) if i % 2 else (xs[:1], expected[:1])
        assert np.array_equal(x @ matrix, y)
        assert matrix.w is w
    assert np.array_equal(xs[0] @ matrix, expected[0])
    assert matrix.w.flags.f_contiguous
    assert kept.flags.c_contiguous, "the caller's own stays as it is"
    turned = matrix.w
    for x, y in [(xs[1], expected[1]), (xs[:1], expected[:1]), (xs, expected)] * 40:
        product = x @ matrix
        assert (product.dtype, np.array_equal(product, y)) == (np.float32, True)
    assert matrix.w is turned
    del w, kept
    assert released() is None, "in memory once, unless the caller keeps it"


@pytest.mark.parametrize(("shape", "n_rows", "switches"), [((513, 2048), 1, False), ((513, 2048), 4, True)])
def test_a_wide_matrix_is_laid_out_by_columns_for_a_batch_alone(shape, n_rows, switches):
    w, x = np.ones(shape, np.float32), np.ones((n_rows, shape[0]), np.float32)
    matrix = backends.get("numpy").prepare({"w": w})["w"]
    for _ in range(70):
        assert np.array_equal(x @ matrix, x @ w)
    assert matrix.w.flags.f_contiguous is switches


def test_numpy_takes_other_matrices_as_they_are():
    """Small ones come from the cache, and BLAS has no bfloat16."""
    bfloat16 = find_dtype("bfloat16")
    for shape, dtype in [((511, 512), "f4"), ((512, 511), "f4"), ((2048, 1025), bfloat16)]:
        w = np.zeros(shape, dtype)
        assert backends.get("numpy").prepare({"w": w})["w"] is w


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_long_text_goes_on_as_it_was_while_matrices_are_laid_out_anew(dtype):
    params = params_module.cast(random_params(n_vocab=200, n_ctx=80, n_embd=520, n_layer=2), dtype)
    model = model_of(params, 2)
    ids = list(greedy(model, [5, 6, 7], 77))
    assert ids == gpt2.generate([5, 6, 7], params, 2, 77)
    assert all(block["mlp"]["c_proj"]["w"].w.flags.f_contiguous for block in model.params["blocks"])
    again = model_of(model.params, 2)  # what a Model holds can be loaded again
    assert list(greedy(again, [5, 6, 7], 9)) == ids[:9]


def test_what_is_read_for_each_token_stands_on_the_left(library):
    """On the right a batch would take a third longer; many tokens of one text, and bfloat16, are faster that way."""
    if jax.default_backend() != "cpu":
        pytest.skip("the form is for a CPU")
    prepared = library.prepare({"w": np.ones((48, 80), np.float32), "wte": np.ones((112, 48), np.float32)})
    matrix, table = prepared["w"], prepared["wte"]

    def products(f, x):
        program = library.jit(f).lower(matrix, table, x).compile().as_text()
        return sorted(re.findall(r"f32\[([\d,]+)\]\S* dot\(", program))

    each = library.vmap(lambda m, t, row: (row[None] @ m, row @ t.T), in_axes=(None, None, 0))
    assert products(each, np.ones((16, 48), np.float32)) == ["112,16", "80,16"]
    assert products(lambda m, t, x: (x @ m, x @ t.T), jax.numpy.ones((129, 48))) == ["129,112", "129,80"]
    narrow = np.ones((2, 2), find_dtype("bfloat16"))
    assert all(isinstance(array, jax.Array) for array in library.prepare({"w": narrow, "wte": narrow}).values())
