"""AdamW: how far and in which direction one step of training moves each parameter, and the learning rate of each step.

The gradient of a batch says which small change of each parameter would lower the loss of that batch. Moving against it,
times a learning rate, is gradient descent. AdamW improves on that in three ways: it averages the gradients of many
batches, because that of one batch is noisy; it scales the step of each parameter by the size of that parameter's own
gradients, because one learning rate must serve parameters whose gradients differ a thousandfold; and it pulls the
weight matrices towards 0.

    state = {"params": ..., "mean": ..., "square": ...}     three trees of the same names and shapes

Everything here is a function of its arguments, and computes with NumPy or JAX, whichever the arrays belong to.
"""

import math

from backends import np
from weights.params import flatten, tree_map


def init_state(params):
    """The state before the first step: params, and zeros for both averages of their gradients."""
    return {"params": params, "mean": tree_map(np.zeros_like, params), "square": tree_map(np.zeros_like, params)}


def learning_rate(n_done, peak, n_warmup, n_steps):
    """The learning rate of the step after n_done others: a straight line up to the peak (the warm-up), then half a
    cosine down to a twentieth of the peak at n_steps (Loshchilov & Hutter 2017, "SGDR", equation 5).

    Warm-up, because the averages of AdamW know only few gradients at first: its first step moves every parameter by the
    whole learning rate, in a direction that one batch has chosen. Decay, because the noise of the batches keeps the
    parameters moving about a minimum, at a distance that grows with the learning rate: a small one lets them settle.
    """
    n_warmup = min(n_warmup, n_steps)
    if n_done < n_warmup:
        return peak * (n_done + 1) / (n_warmup + 1)
    progress = min((n_done - n_warmup) / max(n_steps - n_warmup, 1), 1)  # from 0 to 1
    return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def global_norm(tree):
    """The length of all numbers of a tree as one vector: the square root of the sum of their squares."""
    return np.sqrt(sum((leaf * leaf).sum() for leaf in flatten(tree).values()))


def clip_by_global_norm(gradients, limit):
    """The gradients, scaled down to norm `limit` if theirs is larger (Pascanu et al. 2013, algorithm 1): g = g *
    limit/|g|. All are scaled alike, so their direction stays. Without it, one unusual batch could undo the work of many
    steps."""
    scale = 1 / np.maximum(global_norm(gradients) / limit, 1)
    return tree_map(lambda g: g * scale, gradients)


def adamw(state, gradients, n_done, rate, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8):
    """The state after one step against the gradients, which have the shapes of the params (Loshchilov & Hutter 2019,
    "Decoupled Weight Decay Regularization", algorithm 2). n_done steps were taken before.

        m = beta1 m + (1 - beta1) g            mean of the last 1 / (1 - beta1) gradients, roughly
        v = beta2 v + (1 - beta2) g^2          mean of their squares
        p = p - rate (m' / (sqrt(v') + eps) + weight_decay p),   m' = m / (1 - beta1^t),  v' = v / (1 - beta2^t)

    Bias correction: m and v start at 0, so the first ones are too small; after t steps their weights add up to
    1 - beta^t, which is divided away. Decoupled decay: weight_decay is not part of g, or sqrt(v') would divide it, and
    parameters with large gradients would hardly decay. Only matrices decay, for that keeps their products small. Biases
    and gains, which have one axis, are few, and a gain pulled towards 0 would only shrink its layer's output.
    """
    mean = tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, state["mean"], gradients)
    square = tree_map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state["square"], gradients)
    unbias_mean, unbias_square = 1 - beta1 ** (n_done + 1), 1 - beta2 ** (n_done + 1)

    def move(p, m, v):
        direction = m / unbias_mean / (np.sqrt(v / unbias_square) + eps)
        return p - rate * (direction + weight_decay * p if p.ndim > 1 else direction)

    return {"params": tree_map(move, state["params"], mean, square), "mean": mean, "square": square}
