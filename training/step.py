"""One step of training: from a batch of text and the current state to the state after it.

The forward pass computes the loss of the batch. Backpropagation computes its gradient: how much the loss changes with
each parameter, from the last operation to the first by the chain rule (`value_and_grad`; on NumPy that is
backends/numpy_grad.py). AdamW moves the parameters a little against the gradient.

    state, loss = step(state, batch, n_done, rate)        state is optimizer.init_state(params); n_done steps precede

Params that are not to change (frozen ones) are not in `state`: they are a further argument of the step, which the loss
is not differentiated by. So they cost no gradient and no averages.

Everything here is a function of its arguments. JAX compiles it, and reuses the memory of `state` for the result: after
a call, use only the returned state.
"""

import functools
import math
import sys

import numpy  # NumPy itself; np, below, follows its arguments

from backends import np
from training import optimizer
from training.loss import token_losses
from training.model import dropout, dropout_keys, no_dropout
from weights.params import find_dtype, flatten, from_names, matching, named_leaves, shapes_of, tree_map, unflatten


def init_params(hparams, seed):
    """Random params, float32: weights normal with standard deviation 0.02, biases 0, gains 1. The projections that add
    to the residual stream, two in each block (c_proj, and a LLaMA's c_down), start smaller by 1/sqrt(2 n_layer), so
    that their sum does not grow with depth (Radford et al. 2019, section 2.3)."""
    rng = numpy.random.default_rng(seed)

    def init(path, shape):
        if len(shape) == 1:
            return numpy.full(shape, path[-1] == "g", numpy.float32)
        scale = 0.02 / (math.sqrt(2 * hparams["n_layer"]) if {"c_proj", "c_down"} & {*path} else 1)
        return rng.normal(scale=scale, size=shape).astype(numpy.float32)

    return unflatten({path: init(path, shape) for path, shape in shapes_of(hparams).items()})


def row_loss(forward, params, row, drop=no_dropout):
    """The mean loss of the predictions of row[1:], [n_ctx + 1] ids, each from those before it: training.loss.lm_loss
    for any model.forward_of."""
    return np.mean(token_losses(forward(params, row[:-1], drop=drop), row[1:]))


def make_loss(library, forward, dropout_rate=0.0, dtype="float32"):
    """The function that training differentiates: (params, rows [n, n_ctx + 1], keys [n, 1]) -> the mean loss of n rows
    of a batch, under dropout with these keys. `forward` is that of training.model.forward_of. With frozen params, its
    fourth argument, both are as `split` gives them.

    With dtype bfloat16 the layers compute in bfloat16, which is faster on a GPU, from float32 params (master weights):
    a step often changes a parameter by less than 1/256 of it, and bfloat16 would round such a change away.
    """
    dtype = find_dtype(dtype)

    def loss(params, row, key):
        params = tree_map(lambda array: array.astype(dtype), params)
        return row_loss(forward, params, row, dropout(dropout_rate, key))

    def mean(params, rows, keys, *frozen):
        return np.mean(library.vmap(loss, in_axes=(None, 0, 0))(join(params, *frozen), rows, keys))

    return mean


def split(params, pattern):
    """({name: leaf} in whose names the regular expression is found, {name: leaf} of the others), to be trained and
    frozen. Raises ValueError if there are none of the first."""
    leaves = named_leaves(params)
    trainable = {name: leaves[name] for name in matching(pattern, leaves)}
    if not trainable:
        raise ValueError(f"{pattern!r} matches no parameter: names are like {', '.join([*leaves][:3])}")
    return trainable, {name: leaf for name, leaf in leaves.items() if name not in trainable}


def join(params, *frozen):
    """The inverse of split; params alone stay as they are."""
    return from_names(params | frozen[0]) if frozen else params


def freeze(library, params, pattern):
    """(what of params is to be trained, [the frozen leaves on the backend `library`]) for `join`; without a pattern
    (params, []). With one, prints how many numbers each part has."""
    if not pattern:
        return params, []
    trainable, frozen = split(params, pattern)
    n, n_frozen = (sum(leaf.size for leaf in leaves.values()) for leaves in (trainable, frozen))
    print(f"{n:,} of {n + n_frozen:,} parameters are trained ({n / (n + n_frozen):.2%})", file=sys.stderr)
    return trainable, [library.asarray(frozen)]


def make_step(library, loss_of, micro_batch_size, seed=0, clip=1.0, **adamw_settings):
    """The step on the backend `library`, with the loss of make_loss. Its batch is [n_batch, n_ctx + 1] ids, or a tree
    of arrays [n_batch, ...] if that is what loss_of takes.

    The batch passes through the model in micro-batches, and their gradients are added up: the same result as all at
    once, but with memory for the activations (the results of all layers, which backpropagation needs) of one
    micro-batch only (gradient accumulation). On a CPU it is also faster, because the activations of few rows fit into
    its cache. Where the library has many devices, each of them does this with its share of the batch.
    """
    gradient_of = library.value_and_grad(loss_of)

    def mean_gradient(params, rows, *frozen):
        parts = tree_map(lambda array: array.reshape(-1, micro_batch_size, *array.shape[1:]), rows)
        total = library.sum_over(lambda part: gradient_of(params, *part, *frozen), parts)
        n_parts = len(next(iter(flatten(parts).values())))
        return tree_map(lambda array: array / n_parts, total)

    @functools.partial(library.jit, donate_argnums=0)
    def step(state, batch, n_done, rate, *frozen):
        rows = batch, dropout_keys(seed, n_done, len(next(iter(flatten(batch).values()))))
        loss, gradients = library.over_devices(mean_gradient, mean=True)(state["params"], rows, *frozen)
        gradients = optimizer.clip_by_global_norm(gradients, clip)
        return optimizer.adamw(state, gradients, n_done, rate, **adamw_settings), loss

    return step


def make_mean_loss(library, forward, micro_batch_size):
    """A function (params, windows [n_windows, n]) -> the mean loss over the windows, without dropout, a float."""
    losses_of = library.vmap(functools.partial(row_loss, forward), in_axes=(None, 0))
    losses_of, n_rows = library.jit(library.over_devices(losses_of)), micro_batch_size * library.N_DATA

    def mean_loss(params, windows):
        # Rows are repeated to fill the last micro-batch: JAX would compile another program for another length.
        missing = -len(windows) % n_rows
        rows = numpy.concatenate([windows, numpy.repeat(windows[:1], missing, 0)])
        parts = rows.reshape(-1, n_rows, windows.shape[1])  # [..., n] -> [n_parts, n_rows, n]
        losses = numpy.concatenate([library.to_numpy(losses_of(params, part)) for part in parts])
        return float(losses[: len(windows)].mean(dtype=numpy.float64))

    return mean_loss
