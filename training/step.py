"""One step of training: from a batch of text and the current state to the state after it.

The forward pass computes the loss of the batch. Backpropagation computes its gradient: how much the loss changes with
each parameter, from the last operation to the first by the chain rule (`value_and_grad`; on NumPy that is
backends/numpy_grad.py). AdamW moves the parameters a little against the gradient.

    state, loss = step(state, batch, n_done, rate)        state is optimizer.init_state(params); n_done steps precede

Everything here is a function of its arguments. JAX compiles it, and reuses the memory of `state` for the result: after
a call, use only the returned state.
"""

import functools
import math

import numpy

from backends import np
from training import optimizer
from training.loss import lm_loss, token_losses
from training.model import dropout, dropout_keys, forward
from weights.params import find_dtype, param_shapes, tree_map, unflatten


def init_params(hparams, seed):
    """Random params, float32: weights normal with standard deviation 0.02, biases 0, gains 1. The projections that add
    to the residual stream, two in each block, start smaller by 1/sqrt(2 n_layer), so that their sum does not grow with
    depth (Radford et al. 2019, section 2.3)."""
    rng = numpy.random.default_rng(seed)

    def init(path, shape):
        if len(shape) == 1:
            return numpy.full(shape, path[-1] == "g", numpy.float32)
        scale = 0.02 / (math.sqrt(2 * hparams["n_layer"]) if "c_proj" in path else 1)
        return rng.normal(scale=scale, size=shape).astype(numpy.float32)

    return unflatten({path: init(path, shape) for path, shape in param_shapes(**hparams).items()})


def make_loss(library, n_head, dropout_rate=0.0, dtype="float32"):
    """The function that training differentiates: (params, rows [n, n_ctx + 1], keys [n, 1]) -> the mean loss of n rows
    of a batch, under dropout with these keys.

    With dtype bfloat16 the layers compute in bfloat16, which is faster on a GPU, from float32 params (master weights):
    a step often changes a parameter by less than 1/256 of it, and bfloat16 would round such a change away.
    """
    dtype = find_dtype(dtype)

    def row_loss(params, row, key):
        params = tree_map(lambda array: array.astype(dtype), params)
        logits = forward(params, row[:-1], n_head, dropout(dropout_rate, key))
        return np.mean(token_losses(logits, row[1:]))

    return lambda params, rows, keys: np.mean(library.vmap(row_loss, in_axes=(None, 0, 0))(params, rows, keys))


def make_step(library, loss_of, micro_batch_size, seed=0, clip=1.0, **adamw_settings):
    """The step on the backend `library`, with the loss of make_loss. Its batch is [n_batch, n_ctx + 1] ids.

    The batch passes through the model in micro-batches, and their gradients are added up: the same result as all at
    once, but the memory for the activations of one micro-batch is enough (gradient accumulation). On a CPU it is also
    faster, because the activations of few rows fit into its cache. Where the library has many devices, each of them
    does this with its share of the batch.
    """

    gradient_of = library.value_and_grad(loss_of)

    def mean_gradient(params, batch, keys):
        parts = [array.reshape(-1, micro_batch_size, array.shape[-1]) for array in (batch, keys)]
        total = library.sum_over(lambda part: gradient_of(params, *part), parts)
        return tree_map(lambda array: array / len(parts[0]), total)

    @functools.partial(library.jit, donate_argnums=0)
    def step(state, batch, n_done, rate):
        keys = dropout_keys(seed, n_done, len(batch))
        loss, gradients = library.over_devices(mean_gradient, mean=True)(state["params"], batch, keys)
        gradients = optimizer.clip_by_global_norm(gradients, clip)
        return optimizer.adamw(state, gradients, n_done, rate, **adamw_settings), loss

    return step


def make_mean_loss(library, n_head, micro_batch_size):
    """A function (params, windows [n_windows, n]) -> the mean of lm_loss over the windows, without dropout, a float."""
    losses_of = library.vmap(functools.partial(lm_loss, n_head=n_head), in_axes=(None, 0))
    losses_of, n_rows = library.jit(library.over_devices(losses_of)), micro_batch_size * library.N_DATA

    def mean_loss(params, windows):
        # Rows are repeated to fill the last micro-batch: JAX would compile another program for another length.
        missing = -len(windows) % n_rows
        rows = numpy.concatenate([windows, numpy.repeat(windows[:1], missing, 0)])
        parts = rows.reshape(-1, n_rows, windows.shape[1])  # [..., n] -> [n_parts, n_rows, n]
        losses = numpy.concatenate([library.to_numpy(losses_of(params, part)) for part in parts])
        return float(losses[: len(windows)].mean(dtype=numpy.float64))

    return mean_loss
