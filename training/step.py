"""One step of training: a batch of text goes forward, the blame goes backward, each parameter moves a little.

    state, loss = step(state, batch, key)        state = (params, opt_state), donated

Everything here is a function of its arguments. JAX follows them once with tracers and compiles the whole step.
"""

import functools
import math

import jax
import numpy as np
import optax

from training.loss import lm_loss, token_losses
from training.model import dropout, forward
from weights.params import param_shapes, unflatten


def init_params(hparams, seed):
    """Fresh params, float32: weights normal with standard deviation 0.02, biases 0, gains 1. The projections that add
    to the residual stream, two in each block, start smaller by 1/sqrt(2 n_layer), so that their sum does not grow with
    depth (Radford et al. 2019, section 2.3)."""
    rng = np.random.default_rng(seed)

    def init(path, shape):
        if len(shape) == 1:
            return np.full(shape, path[-1] == "g", np.float32)
        scale = 0.02 / (math.sqrt(2 * hparams["n_layer"]) if "c_proj" in path else 1)
        return rng.normal(scale=scale, size=shape).astype(np.float32)

    return unflatten({path: init(path, shape) for path, shape in param_shapes(**hparams).items()})


def learning_rate(peak, n_warmup, n_steps):
    """A function of the number of steps done: up to the peak in a straight line, then down along half a cosine, to a
    twentieth of it at the end (Loshchilov & Hutter 2017, "SGDR")."""
    n_warmup = min(n_warmup, n_steps)
    cosine = optax.cosine_decay_schedule(peak, max(n_steps - n_warmup, 1), alpha=0.05)
    warmup = optax.linear_schedule(peak / (n_warmup + 1), peak, max(n_warmup, 1))
    return optax.join_schedules([warmup, cosine], [n_warmup])


def make_optimizer(schedule, weight_decay, beta2, clip):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on gradients whose norm, over all parameters together, is at most
    `clip`. Matrices decay; biases and gains, which have one axis, do not."""
    matrices = functools.partial(jax.tree.map, lambda array: array.ndim > 1)
    adamw = optax.adamw(schedule, b1=0.9, b2=beta2, weight_decay=weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def make_step(optimizer, n_head, n_rows, dropout_rate=0.0, dtype="float32"):
    """The compiled step. A batch, [n_batch, n_ctx + 1], goes through the model n_rows at a time and the gradients are
    added up: the same result as all at once, in less memory. A CPU, whose cache few rows fit, is sooner done with it.

    With dtype bfloat16 the layers compute in it; params, gradients and sums stay float32.
    """

    def row_loss(params, row, key):
        params = jax.tree.map(lambda array: array.astype(dtype), params)
        logits = forward(params, row[:-1], n_head, dropout(dropout_rate, key))
        return token_losses(logits, row[1:]).mean()

    def loss_of(params, rows, keys):
        return jax.vmap(row_loss, in_axes=(None, 0, 0))(params, rows, keys).sum()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, key):
        params, opt_state = state
        rows = batch.reshape(-1, n_rows, batch.shape[1])  # [n_batch, n_ctx + 1] -> [..., n_rows, n_ctx + 1]
        keys = jax.random.split(key, rows.shape[:2])

        def add(total, part):
            return jax.tree.map(jax.numpy.add, total, jax.value_and_grad(loss_of)(params, *part)), None

        nothing = (jax.numpy.zeros(()), jax.tree.map(jax.numpy.zeros_like, params))
        total, _ = jax.lax.scan(add, nothing, (rows, keys))
        loss, gradients = jax.tree.map(lambda array: array / len(batch), total)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step


@functools.lru_cache
def batch_losses(n_head):
    """The compiled lm_loss of each row of a batch: (params, [n_batch, n]) -> [n_batch]."""
    return jax.jit(jax.vmap(functools.partial(lm_loss, n_head=n_head), in_axes=(None, 0)))


def mean_loss(params, windows, n_head, n_rows):
    """The mean of lm_loss over windows, [n_windows, n], n_rows at a time, without dropout. A number."""
    short = -len(windows) % n_rows  # the last batch is filled up: another length would be another program
    rows = np.concatenate([windows, np.repeat(windows[:1], short, 0)]).reshape(-1, n_rows, windows.shape[1])
    losses = np.concatenate([batch_losses(n_head)(params, batch) for batch in rows])
    return float(losses[: len(windows)].mean(dtype=np.float64))
