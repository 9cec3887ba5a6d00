"""The loss, against golden numbers, closed forms and a fresh model's ignorance."""

import math

import numpy as np
import pytest
from conftest import cast, oracle, random_params

import backends
from training import loss

BACKENDS = ["numpy", "jax"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_losses(golden, backend):
    params = cast(golden["params"], "float64")
    if backend == "jax":
        oracle("jax").config.update("jax_enable_x64", True)
    try:
        params = backends.get(backend).asarray(params)
        for case in golden["cases"][: 2 if backend == "jax" else None]:  # op by op JAX takes its time
            if len(case["ids"]) > 1:
                found = loss.lm_loss(params, np.array(case["ids"]), golden["hparams"]["n_head"])
                assert abs(float(found) - case["mean_nll"]) < 1e-6
    finally:
        if backend == "jax":
            oracle("jax").config.update("jax_enable_x64", False)


def test_closed_forms():
    targets = np.array([1, 0])
    assert np.allclose(loss.token_losses(np.zeros((2, 5)), targets), math.log(5))
    logits = np.log(np.array([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]]))
    assert np.allclose(loss.token_losses(logits, targets), [-math.log(0.7), -math.log(0.5)])


def test_logits_of_any_size_have_a_loss():
    """exp(1e4) and log(0) would not."""
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4 - 1, -2e4]])
    assert np.allclose(loss.token_losses(logits, np.array([1, 0])), [2e4, math.log(1 + math.exp(-1))])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bfloat16_model_has_a_float32_loss(backend):
    ml_dtypes = oracle("ml_dtypes")
    oracle("jax")
    params = backends.get(backend).asarray(cast(random_params(), ml_dtypes.bfloat16))
    logits = params["wte"] @ params["wte"].T
    found = loss.token_losses(logits, np.arange(11))
    assert found.dtype == "float32"
    assert np.array_equal(found, loss.token_losses(logits.astype("float32"), np.arange(11)))


def test_a_batch_is_a_vmap():
    params, rows = random_params(), np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    batch = backends.get("numpy").vmap(lambda params, row: loss.lm_loss(params, row, 2), in_axes=(None, 0))
    assert np.allclose(batch(params, rows), [loss.lm_loss(params, row, 2) for row in rows])


def test_perplexity():
    assert loss.perplexity(math.log(50257)) == pytest.approx(50257)
    assert loss.perplexity(1e9) == math.inf
