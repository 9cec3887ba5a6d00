"""value_and_grad on NumPy: equal to jax.grad and to central differences, alone and together with vmap."""

import functools
import gc
import tracemalloc
import warnings
import weakref

import jax
import numpy
import pytest
from conftest import cast, random_params
from random_functions import random_batch, random_function

import backends
import gpt2
from backends import np, update
from inference import kv_cache
from training.loss import lm_loss, token_losses
from weights.params import tree_map

NUMPY = backends.get("numpy")
vmap, value_and_grad = NUMPY.vmap, NUMPY.value_and_grad
rng = numpy.random.default_rng(0)


def grad(f, value_and_grad=value_and_grad):
    return lambda *args: value_and_grad(f)(*args)[1]


def assert_close(found, expected, tolerance):
    """By the norm, relative to that of `expected`; the same tree of arrays."""

    def check(ours, theirs):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert numpy.linalg.norm(ours - theirs) <= tolerance * max(numpy.linalg.norm(theirs), 1e-3)

    tree_map(check, found, expected)


def in_jax(f, *args):
    """f(jax's value_and_grad and vmap, args) with 64 bits."""
    with jax.enable_x64(True):
        return jax.device_get(f(jax.value_and_grad, jax.vmap, *jax.tree.map(jax.numpy.asarray, args)))


def random_loss(seed):
    f, inputs = random_function(seed)
    return lambda floats, *ids: sum(np.sum(np.tanh(x)) for x in f(*floats, *ids)), inputs[:3], inputs[3:]


def slope(f, x, direction):
    """The derivative of f at x in a direction, by central differences of several widths: h**4 and rounding / h limit
    how close they come."""

    def at(step):
        return f(tree_map(lambda leaf, d: leaf + step * d, x, direction))

    return [(at(-2 * h) - 8 * at(-h) + 8 * at(h) - at(2 * h)) / (12 * h) for h in (1e-2, 1e-3, 1e-4)]


def dot(x, y):
    total = []
    tree_map(lambda a, b: total.append(numpy.vdot(a, b)), x, y)
    return sum(total)


def check_slope(f, x, gradient, seed, tolerance=1e-6):
    """The gradient against central differences in a random direction."""
    direction = tree_map(numpy.random.default_rng(seed).normal, tree_map(numpy.zeros_like, x))
    found = dot(gradient, direction)
    assert min(abs(found - s) / (1 + abs(s)) for s in slope(f, x, direction)) < tolerance


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_random_compositions_equal_central_differences(first):
    for seed in range(first, first + 20):
        loss, floats, ids = random_loss(seed)
        value, gradient = value_and_grad(loss)(floats, *ids)
        assert value == loss(floats, *ids)
        check_slope(functools.partial(with_ids, loss, ids), floats, gradient, seed)


def with_ids(loss, ids, floats):
    return loss(floats, *ids)


def check_against_jax(seed):
    loss, floats, ids = random_loss(seed)
    expected = in_jax(lambda value_and_grad, _, *args: jax.jit(value_and_grad(loss))(*args), floats, *ids)
    assert_close(list(value_and_grad(loss)(floats, *ids)), list(expected), 1e-10)


@pytest.mark.parametrize("seed", [1001, 1002, 1003])
def test_random_compositions_equal_jax(seed):
    check_against_jax(seed)


@pytest.mark.trial
@pytest.mark.parametrize("seed", range(300))
def test_300_random_compositions_equal_jax(seed):
    check_against_jax(seed)


@pytest.mark.parametrize("seed", range(40))
def test_random_compositions_of_transforms(seed):
    """A gradient for each row, the gradient of a sum over rows, and the gradient of a gradient."""
    loss, floats, ids = random_loss(seed)
    in_axes, batch = random_batch([*floats, *ids], seed)

    def each(a, b, c, *ids):
        return grad(loss)([a, b, c], *ids)

    rows = [[x if axis is None else x[i] for x, axis in zip(batch, in_axes, strict=True)] for i in range(4)]
    alone = [numpy.stack(gradients) for gradients in zip(*(each(*row) for row in rows), strict=True)]
    assert_close(vmap(each, in_axes)(*batch), alone, 1e-12)

    def summed(floats):
        return np.sum(vmap(lambda a, b, c, *ids: loss([a, b, c], *ids), in_axes)(*floats, *batch[3:]))

    sums = [g if axis == 0 else g.sum(axis=0) for g, axis in zip(alone, in_axes[:3], strict=True)]
    assert_close(grad(summed)(batch[:3]), sums, 1e-12)

    def of_gradient(floats):
        return sum(np.sum(np.sin(g)) for g in grad(loss)(floats, *ids))

    check_slope(of_gradient, floats, grad(of_gradient)(floats), seed, 1e-5)


def check_model(params, n_head, ids):
    loss = functools.partial(lm_loss, n_head=n_head)
    value, gradient = value_and_grad(loss)(params, ids)
    expected = in_jax(lambda value_and_grad, _, *args: jax.jit(value_and_grad(loss))(*args), params, ids)
    assert_close([value, gradient], list(expected), 1e-10)
    return loss, gradient


def leaves(tree):
    found = []
    tree_map(found.append, tree)
    return found


def check_central_differences(loss, gradient, params, ids):
    """Along a random direction in each single parameter."""
    for i, (leaf, its_gradient) in enumerate(zip(leaves(params), leaves(gradient), strict=True)):
        direction = numpy.random.default_rng(i).normal(size=leaf.shape)

        def moved(x, leaf=leaf):
            return loss(tree_map(lambda other: x if other is leaf else other, params), ids)

        found, scale = numpy.vdot(its_gradient, direction), numpy.linalg.norm(its_gradient)
        assert min(abs(found - s) for s in slope(moved, leaf, direction)) < 1e-6 * scale


def test_every_parameter_of_the_golden_model(golden):
    params, ids = cast(golden["params"], "float64"), numpy.array([5, 2, 7, 2, 2, 9, 1])
    loss, gradient = check_model(params, golden["hparams"]["n_head"], ids)
    check_central_differences(loss, gradient, params, ids)


@pytest.mark.trial
def test_every_parameter_of_the_storyteller(storyteller):
    _, hparams, params = storyteller
    params, ids = cast(params, "float64"), rng.integers(0, 2048, 24)
    loss, gradient = check_model(params, hparams["n_head"], ids)
    check_central_differences(loss, gradient, params, ids)


TINY, ROWS = cast(random_params(n_layer=1), "float64"), rng.integers(0, 11, (3, 7))


def short_loss(params, row):
    """Embedding, attention, loss: JAX compiles it in half the time of a whole model."""
    (block,), wte = params["blocks"], params["wte"]
    x = gpt2.embed(row[:-1], wte, params["wpe"])
    x = x + gpt2.mha(gpt2.layer_norm(x, **block["ln_1"]), **block["attn"], n_head=2)
    return np.mean(token_losses(gpt2.unembed(x, wte), row[1:]))


def per_example(value_and_grad, vmap, params, rows):
    return vmap(value_and_grad(short_loss), (None, 0))(params, rows)


def of_a_batch(value_and_grad, vmap, params, rows):
    return value_and_grad(lambda params: np.mean(vmap(short_loss, (None, 0))(params, rows)))(params)


def twice(value_and_grad, vmap, params, rows):
    """The gradient of the squared norm of the gradient by the attention's parameters."""

    def norm(params):
        (block,) = params["blocks"]

        def loss(attn):
            return short_loss({**params, "blocks": [{**block, "attn": attn}]}, rows[0])

        gradient = value_and_grad(loss)(block["attn"])[1]
        return sum(np.sum(gradient[part][name] ** 2) for part in ("c_attn", "c_proj") for name in ("w", "b"))

    return value_and_grad(norm)(params)


def in_turns(value_and_grad, vmap, params, rows):
    """For each of two numbers k, the gradient of a sum over rows of gradients."""
    x, ks = params["blocks"][0]["attn"]["c_attn"]["w"], params["wpe"][:2, 0]

    def gradient(x, y):
        return value_and_grad(lambda x: np.sum(np.sin(x @ x.mT) * np.max(x * y)))(x)[1]

    def summed(x, k):
        return np.sum(vmap(gradient, (None, 0))(x, np.stack([k * x[0], x[1] * x[2]])) ** 3)

    return vmap(value_and_grad(summed), (None, 0))(x, ks)


@pytest.mark.parametrize("f", [per_example, of_a_batch, twice, in_turns])
def test_transforms_compose_as_in_jax(f):
    found = f(value_and_grad, vmap, TINY, ROWS)
    expected = in_jax(lambda v, m, *args: jax.jit(functools.partial(f, v, m))(*args), TINY, ROWS)
    assert_close(list(found), list(expected), 1e-10)


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_one_matrix_that_is_no_argument_serves_all_rows(n_rows):
    """Also where the rows are tracers of a transform outside."""
    w, x = rng.normal(size=(4, 3)), rng.normal(size=(n_rows, 4))
    gradient = grad(lambda x: np.sum(vmap(lambda row: np.tanh(row @ w))(x)))(x)
    assert_close(gradient, (1 - numpy.tanh(x @ w) ** 2) @ w.T, 1e-12)
    pairs = vmap(lambda a: vmap(lambda b: (a * b) @ w)(x))(x)
    assert_close(pairs, (x[:, None] * x) @ w, 1e-12)


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)])
def test_the_gradient_of_a_layer_by_any_of_its_arguments_for_each_row(in_axes):
    """By the gain of layer_norm, where x belongs to the vmap outside only."""
    args = [rng.normal(size=5 if axis is None else (3, 5)) for axis in in_axes]
    each = lambda x, g: grad(lambda g: np.sum(np.sin(gpt2.layer_norm(x, g, b=0.5))))(g)  # noqa: E731
    alone = [each(*(x if axis is None else x[i] for x, axis in zip(args, in_axes, strict=True))) for i in range(3)]
    assert_close(vmap(each, in_axes)(*args), numpy.stack(alone), 1e-12)


def test_levels_are_not_confused():
    """The classic example: d/dx of x * (d/dy of x + y) is 1. Who takes the inner x for another y gets 2."""
    assert grad(lambda x: x * grad(lambda y: x + y)(1.0))(1.0) == 1
    assert grad(lambda x: x * grad(lambda y: x * y)(2.0))(3.0) == 6  # x * x
    assert vmap(grad(lambda x: x * grad(lambda y: x * y * y)(x)))(numpy.array([1.0, 2.0])).tolist() == [6, 24]  # 2x^3


def test_repeated_rows_count_as_often_as_they_occur():
    table, ids = rng.normal(size=(5, 3)), numpy.array([1, 4, 1, 1, 0])
    counts = numpy.bincount(ids, minlength=5)[:, None]
    assert numpy.array_equal(grad(lambda table: np.sum(table[ids]))(table), counts * numpy.ones((5, 3)))
    batched = grad(lambda table: np.sum(vmap(lambda ids: table[ids])(ids[:, None])))(table)
    assert numpy.array_equal(batched, counts * numpy.ones((5, 3)))


@pytest.mark.parametrize("hidden", [-1e10, numpy.inf, numpy.nan])
@pytest.mark.parametrize("stand_in", [-1e10, -numpy.inf])
def test_what_is_masked_never_makes_a_nan(hidden, stand_in):
    mask, scores, weights = numpy.tri(3, dtype=bool), rng.normal(size=(3, 3)), rng.normal(size=(3, 3))

    def f(scores):
        return np.sum(gpt2.softmax(np.where(mask, scores, stand_in)) * weights)

    gradient = grad(f)(numpy.where(mask, scores, hidden))
    assert numpy.array_equal(gradient[~mask], numpy.zeros(3))
    assert numpy.array_equal(gradient, grad(f)(scores))


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_an_infinite_slope_behind_a_mask_is_nothing():
    x, mask = numpy.array([1.0, 2.0, 4.0]), numpy.array([True, False, True])
    gradient = grad(lambda x: np.sum(1 / np.where(mask, x, 0.0)) + np.sum(1 / np.where(mask, 0.0, x)))(x)
    assert gradient.tolist() == [-1, -1 / 4, -1 / 16]


def test_a_sorted_number_has_the_gradient_of_its_place():
    x, weights = numpy.array([3.0, 1.0, 5.0, 2.0, 4.0]), numpy.array([1.0, 10.0, 100.0, 1000.0, 10000.0])
    assert grad(lambda x: np.sum(np.sort(x) * weights))(x).tolist() == [100, 1, 10000, 10, 1000]


def test_a_maximum_passes_the_gradient_to_the_largest_and_to_equals_in_equal_parts():
    inf = numpy.inf
    assert grad(np.max)(numpy.array([2.0, 1.0, 2.0])).tolist() == [0.5, 0, 0.5]
    assert grad(np.min)(numpy.array([-inf, inf])).tolist() == [1, 0]
    assert grad(lambda x: np.maximum(x, 0).sum())(numpy.array([-inf, 0.0, inf])).tolist() == [0, 0.5, 1]
    assert grad(lambda x: np.sum(x.max(axis=0)))(numpy.array([[1.0, 5.0], [1.0, -inf]])).tolist() == [
        [0.5, 1],
        [0.5, 0],
    ]


@pytest.mark.parametrize("power", [0, 1, 2, 3, 0.0, 2.0])
def test_powers_at_0(power):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grad(lambda x: x**power)(0.0) == (power == 1)
        assert grad(lambda x: np.sum(x**power))(numpy.zeros(2)).tolist() == [power == 1] * 2


def test_the_cached_model_has_the_gradient_of_the_plain_one():
    """`update` copies under a gradient: the cache that goes in stays as it is."""
    params, ids = TINY, ROWS[0]
    cache = kv_cache.init_cache(params, 8, n_head=2)

    def cached(params):
        first, after = kv_cache.forward(params, ids[:3], cache, 0, n_head=2)
        second, _ = kv_cache.forward(params, ids[3:], after, 3, n_head=2)
        return np.sum(np.sin(np.concatenate([first, second])))

    def plain(params):
        return np.sum(np.sin(gpt2.gpt2(ids, **params, n_head=2)))

    assert_close(grad(cached)(params), grad(plain)(params), 1e-10)
    assert not any(array.any() for layer in cache for array in layer)


def test_update_is_followed_into_both_arrays():
    buffer, new = rng.normal(size=(3, 4)), rng.normal(size=(2, 1))
    weights = numpy.arange(12.0).reshape(3, 4)
    gradient = grad(lambda both: np.sum(update(*both, (1, 2)) * weights))((buffer, new))
    assert gradient[0].tolist() == [[0, 1, 2, 3], [4, 5, 0, 7], [8, 9, 0, 11]]
    assert gradient[1].tolist() == [[6], [10]]


def test_a_long_chain_needs_no_recursion():
    def chain(x):
        for _ in range(20_000):
            x = x * 1.0001
        return x

    assert grad(chain)(1.0) == pytest.approx(1.0001**20_000)


def test_arrays_are_freed_as_the_gradient_passes():
    """A chain of 20 arrays of 1 MB, each remembered: going back must not keep 20 gradients as well."""

    def chain(x):
        for _ in range(20):
            x = np.tanh(x)
        return np.sum(x)

    x = numpy.ones(131_072)
    tracemalloc.start()
    value_and_grad(chain)(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 27 * x.nbytes


def test_nothing_lives_on_afterwards():
    seen = []

    def f(x):
        y = np.tanh(x)
        seen.append(weakref.ref(y.value))
        return np.sum(y * y)

    gc.disable()
    try:
        value_and_grad(f)(numpy.ones(5))
        assert seen[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_gradient_has_the_dtype_of_its_parameter(dtype):
    dtype = numpy.dtype(getattr(jax.numpy, dtype))
    params = cast(random_params(n_layer=1), dtype)
    value, gradient = value_and_grad(functools.partial(lm_loss, n_head=2))(params, ROWS[0])
    assert value.dtype == (dtype if dtype.itemsize > 2 else numpy.float32)
    expected = grad(functools.partial(lm_loss, n_head=2))(TINY, ROWS[0])
    tolerance = {2: 0.1, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
    for found, exact in zip(leaves(gradient), leaves(expected), strict=True):
        assert found.dtype == dtype
        assert numpy.linalg.norm(found.astype("float64") - exact) <= tolerance * max(numpy.linalg.norm(exact), 1e-2)
    mixed = grad(lambda x: np.sum(x * numpy.ones(3)))(numpy.ones(3, numpy.float32))
    assert mixed.dtype == numpy.float32


def test_gradients_are_arrays_of_their_own():
    """Also of what has no effect, and of two parameters with the same gradient."""
    tree = {"a": numpy.ones(2), "b": [numpy.ones(2), (numpy.ones(2), 3.0)]}
    value, gradient = value_and_grad(lambda tree: np.sum(tree["a"] + tree["b"][0]))(tree)
    assert (value, gradient["b"][1][1]) == (4, 0)
    gradient["a"] += 1
    gradient["b"][1][0][:] = 5
    assert gradient["a"].tolist() == [2, 2]
    assert gradient["b"][0].tolist() == [1, 1]
    assert grad(lambda x: 2.0)(1.0) == 0


@pytest.mark.parametrize(
    ("f", "params", "error", "message"),
    [
        (lambda x: x, numpy.ones(3), TypeError, r"must be one number, not of shape \(3,\)"),
        (lambda x: (x, x), 1.0, TypeError, "the value of f must be floats, not object"),
        (lambda x: np.argmax(x), numpy.ones(3), TypeError, "the value of f must be floats, not int64"),
        (lambda x: np.sum(x), numpy.arange(3), TypeError, "params must be floats, not int64"),
        (lambda x: x["a"], {"a": 1.0, "b": [True]}, TypeError, "params must be floats, not bool"),
        (lambda x: np.median(x), numpy.ones(3), NotImplementedError, "value_and_grad on NumPy has no rule for median"),
        (lambda x: np.sum(numpy.exp(x)), numpy.ones(3), TypeError, "GradTracer"),
        (lambda x: np.sum(numpy.array(x)), numpy.ones(3), TypeError, "no value that Python or NumPy itself could see"),
        (lambda x: x.__setitem__(0, 1), numpy.ones(3), TypeError, "use np.where or backends.update"),
    ],
)
def test_what_has_no_gradient_is_refused(f, params, error, message):
    with pytest.raises(error, match=message):
        value_and_grad(f)(params)
