"""AdamW, clipping and the schedule: against optax, and against the papers' formulas in plain loops of Python floats."""

import math

import numpy as np
import pytest
from conftest import cast, oracle, random_params

import backends
from training import optimizer
from weights.params import flatten, tree_map

BACKENDS = ["numpy", "jax"]
SETTINGS = {"weight_decay": 0.3, "beta2": 0.95}
PEAK, N_WARMUP, N_STEPS, LIMIT = 0.01, 3, 10, 20.0


def leaves(tree):
    return {path: np.asarray(array) for path, array in flatten(tree).items()}


def gradients_of(params, n_done):
    """Random ones: small, and every third time too large for LIMIT. One is always 0."""
    rng = np.random.default_rng(n_done)
    size = 5.0 if n_done % 3 == 2 else 0.1
    gradients = tree_map(lambda p: rng.normal(scale=size, size=p.shape).astype(p.dtype), params)
    return gradients | {"wpe": np.zeros_like(params["wpe"])}


def ten_steps(params, library):
    """Ours, compiled where the library compiles."""

    def step(state, gradients, n_done, rate):
        gradients = optimizer.clip_by_global_norm(gradients, LIMIT)
        return optimizer.adamw(state, gradients, n_done, rate, **SETTINGS)

    state, step = optimizer.init_state(library.asarray(params)), library.jit(step)
    for i in range(10):
        rate = optimizer.learning_rate(i, PEAK, N_WARMUP, N_STEPS)
        state = step(state, library.asarray(gradients_of(params, i)), i, rate)
    return leaves(library.to_numpy(state["params"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_clipped_steps_equal_optax(backend):
    jax, optax = oracle("jax"), oracle("optax")
    params = random_params()
    adamw = optax.adamw(
        lambda i: jax.numpy.array([optimizer.learning_rate(n, PEAK, N_WARMUP, N_STEPS) for n in range(10)])[i],
        b2=SETTINGS["beta2"],
        weight_decay=SETTINGS["weight_decay"],
        mask=lambda tree: jax.tree.map(lambda array: array.ndim > 1, tree),
    )
    theirs = optax.chain(optax.clip_by_global_norm(LIMIT), adamw)
    expected, state = jax.tree.map(jax.numpy.array, params), theirs.init(params)
    for i in range(10):
        updates, state = theirs.update(gradients_of(params, i), state, expected)
        expected = optax.apply_updates(expected, updates)
    found, start = ten_steps(params, backends.get(backend)), leaves(params)
    for path, array in leaves(expected).items():
        assert np.abs(found[path] - array).max() < 1e-6, path
        assert found[path].dtype == np.float32
        assert np.abs(array - start[path]).max() > 0.001 or path == ("wpe",)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_clipped_steps_equal_the_papers_one_number_at_a_time(backend):
    params = cast(random_params(n_vocab=5, n_ctx=4, n_embd=4, n_layer=1), "float64")
    expected = {path: array.copy() for path, array in leaves(params).items()}
    m, v = ({path: np.zeros_like(a) for path, a in expected.items()} for _ in range(2))
    norms = []
    for t in range(1, 11):
        gradients = leaves(gradients_of(params, t - 1))
        norms.append(math.sqrt(sum(float(g) ** 2 for array in gradients.values() for g in array.flat)))
        rate = reference_rate(t - 1, PEAK, N_WARMUP, N_STEPS)
        for path, p in expected.items():
            for i in np.ndindex(p.shape):
                g = gradients[path][i] * min(1, LIMIT / norms[-1])
                m[path][i] = 0.9 * m[path][i] + 0.1 * g
                v[path][i] = 0.95 * v[path][i] + 0.05 * g * g
                direction = m[path][i] / (1 - 0.9**t) / (math.sqrt(v[path][i] / (1 - 0.95**t)) + 1e-8)
                p[i] -= rate * (direction + (0.3 * p[i] if p.ndim > 1 else 0))
    assert min(norms) < LIMIT < max(norms)
    if backend == "jax":
        with oracle("jax").enable_x64(True):
            found = ten_steps(params, backends.get(backend))
    else:
        found = ten_steps(params, backends.get(backend))
    for path, array in expected.items():
        assert found[path].dtype == np.float64
        assert np.abs(found[path] - array).max() < 1e-12, path


def reference_rate(i, peak, n_warmup, n_steps):
    if i < n_warmup:
        return peak * (i + 1) / (n_warmup + 1)
    return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * (i - n_warmup) / (n_steps - n_warmup))) / 2)


@pytest.mark.parametrize(("n_warmup", "n_steps"), [(4, 20), (0, 7), (100, 1500), (9, 5), (5, 5), (1, 1), (0, 1)])
def test_the_schedule_equals_optax(n_warmup, n_steps):
    optax, peak = oracle("optax"), 3e-3
    found = [optimizer.learning_rate(i, peak, n_warmup, n_steps) for i in range(n_steps + 3)]
    n = min(n_warmup, n_steps)
    cosine = optax.cosine_decay_schedule(peak, max(n_steps - n, 1), alpha=0.05)
    warmup = optax.linear_schedule(peak / (n + 1), peak, max(n, 1))
    theirs = optax.join_schedules([warmup, cosine], [n])
    assert found == pytest.approx([float(theirs(i)) for i in range(n_steps + 3)], rel=1e-5)
    if n_warmup < n_steps:
        expected = [reference_rate(i, peak, n_warmup, n_steps) for i in range(n_steps + 1)]
        assert found[: n_steps + 1] == pytest.approx(expected, rel=1e-12)


def test_the_schedule_rises_peaks_and_ends_at_a_twentieth():
    rates = [optimizer.learning_rate(i, 3e-3, 4, 20) for i in range(21)]
    assert rates[4] == max(rates) == 3e-3
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[20] == pytest.approx(3e-3 / 20)
    assert 0 < rates[0] < 3e-3 / 4
    assert optimizer.learning_rate(4, 3e-3, 100, 5) < 3e-3, "a run may be shorter than its warm-up"


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_scales_only_what_is_too_long(backend):
    library = backends.get(backend)
    tree = library.asarray({"a": np.array([3.0, 0.0], np.float32), "b": [np.array([[4.0]], np.float32)]})
    assert float(optimizer.global_norm(tree)) == pytest.approx(5)
    for limit, length in [(10.0, 5), (5.0, 5), (1.0, 1), (1e-3, 1e-3)]:
        clipped = optimizer.clip_by_global_norm(tree, limit)
        assert float(optimizer.global_norm(clipped)) == pytest.approx(length)
        assert float(clipped["b"][0][0, 0]) == pytest.approx(4 * length / 5)


def test_gradients_of_zero_stay_zero_without_a_warning():
    zeros = tree_map(np.zeros_like, random_params())
    with np.errstate(all="raise"):
        state = optimizer.adamw(optimizer.init_state(zeros), optimizer.clip_by_global_norm(zeros, 1.0), 0, 0.1)
    assert all((array == 0).all() for array in leaves(state).values())


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_first_step_has_the_learning_rate_for_its_length(size):
    """Whatever the size of the gradient: that is what bias correction and the division by sqrt(v) do."""
    params = {"w": np.zeros((2, 2)), "b": np.ones(2)}
    gradients = {"w": np.full((2, 2), -size), "b": np.full(2, size)}
    state = optimizer.adamw(optimizer.init_state(params), gradients, 0, rate=0.1, weight_decay=0.5)
    assert np.allclose(state["params"]["w"], 0.1, rtol=1e-4)
    assert np.allclose(state["params"]["b"], 0.9, rtol=1e-4), "a vector does not decay"
