"""Gradients in NumPy, by reverse mode (backpropagation): arrays that remember how they were computed.

The chain rule. If the loss L depends on x only through y = f(x), then

    dL/dx = dL/dy * dy/dx

and if it depends on x in several ways, through several y, their contributions are added.

So one walk from the last operation back to the first gives the gradient with respect to everything: on the way back,
dL/dy is always computed before dL/dx needs it. value_and_grad(f) calls f with tracers. Each operation on them computes
its result y and appends an entry to a list, the tape: where its inputs are, and for each input x the function from
dL/dy to dL/dx. `backward` walks the tape from its end. The table RULES at the end of this file says what these
functions are, with a formula for each operation.

Griewank & Walther 2008, "Evaluating Derivatives", chapter 3.
"""

import numpy  # NumPy itself; np, below, follows its arguments
from numpy.lib.array_utils import normalize_axis_tuple

from backends import np, update
from backends.numpy_levels import PLAIN, Tracer, call, map_args, new_level
from weights.params import tree_map


def value_and_grad(f):
    """f(params, ...) -> (f's value, its gradient: a tree like params, each leaf of its shape and dtype).

    Raises TypeError for params that are not floats and for a value that is not one float; NotImplementedError for an
    operation without a rule.
    """

    def value_and_gradient(params, *args, **kwargs):
        level, tape, leaves = new_level(), [], []

        def trace(leaf):
            check_float(leaf, "params")
            leaves.append(leaf)
            tape.append([])
            return GradTracer(level, numpy.asarray(leaf) if isinstance(leaf, float) else leaf, tape)

        loss = f(tree_map(trace, params), *args, **kwargs)
        check_float(loss, "the value of f")
        if numpy.shape(loss) != ():
            raise TypeError(f"value_and_grad: the value of f must be one number, not of shape {numpy.shape(loss)}")
        gradients = {}
        if isinstance(loss, GradTracer) and loss.level == level:
            gradients[loss.place], loss = np.ones_like(loss.value), loss.value
        backward(tape, len(leaves), gradients)
        places = iter(range(len(leaves)))
        return loss, tree_map(lambda leaf: np.copy(gradients.pop(next(places), np.zeros_like(leaf))), params)

    return value_and_gradient


def check_float(x, what):
    dtype = getattr(x, "dtype", numpy.dtype(type(x)))
    if dtype.kind not in FLOATS:
        raise TypeError(f"value_and_grad: {what} must be floats, not {dtype}: only they have a gradient")


def backward(tape, n_leaves, gradients):
    """Walks from the end of the tape to its first n_leaves entries, those of params.

    gradients is {place on the tape: dL/d(the array there)}, of the loss before and of params after. An entry, with the
    arrays that its functions hold, is freed once it has been used.
    """
    while len(tape) > n_leaves:
        inputs, dL_dy = tape.pop(), gradients.pop(len(tape), None)
        for place, dL_dx_from, shape, dtype in inputs if dL_dy is not None else ():
            dL_dx = sum_to_shape(dL_dx_from(dL_dy), shape, dtype)
            gradients[place] = gradients[place] + dL_dx if place in gradients else dL_dx


def sum_to_shape(g, shape, dtype):
    """The gradient g with respect to x after broadcasting -> that with respect to x itself, which has this shape: the
    sum over all copies of each number."""
    new = g.ndim - len(shape)
    repeated = [i for i, n in enumerate(g.shape) if i < new or n != shape[i - new]]
    g = np.sum(g, axis=tuple(repeated)).reshape(shape) if repeated else g
    return g if g.dtype == dtype else g.astype(dtype)


class GradTracer(Tracer):
    """An array, value, that was computed from params, and its place on the tape."""

    __slots__ = ("place", "tape")

    def __init__(self, level, value, tape):
        self.level, self.value, self.tape, self.place = level, value, tape, len(tape) - 1

    @property
    def shape(self):
        return self.value.shape

    def apply_layer(self, layer, args, kwargs):
        """A layer with a rule of its own counts as one operation. None for others, and for bfloat16."""
        if layer.__name__ in RULES and not args and not kwargs and self.dtype.itemsize > 2:
            return self.apply(layer.__name__, (self,), {}, layer)
        return None

    def apply(self, name, args, kwargs, f=None):
        def ours(x):
            return isinstance(x, GradTracer) and x.level == self.level

        values = map_args(lambda x: x.value if ours(x) else x, args)
        if name == "update":  # may not write to an array that a function on the tape holds
            values = (np.copy(values[0]), *values[1:])
        if name not in RULES and name not in CONSTANT:
            raise NotImplementedError(f"value_and_grad on NumPy has no rule for {name}: add one in numpy_grad.py")
        y = f(*values, **kwargs) if f else call(name, *values, **kwargs)
        if name in CONSTANT or y.dtype.kind not in FLOATS:
            return y
        inputs = args[0] if isinstance(args[0], (list, tuple)) else args
        functions = RULES[name](y, *values, **kwargs)
        self.tape.append([(x.place, f, x.shape, x.dtype) for x, f in zip(inputs, functions, strict=False) if ours(x)])
        return GradTracer(self.level, y, self.tape)


# ---- The rules. From y and the inputs: for each input x the function g -> dL/dx, where g is dL/dy. ----
#
# A function keeps in memory only the arrays that it names. Where x was broadcast, sum_to_shape adds up the copies.


def restore_axes(g, axis, shape):
    """g, the gradient of a sum (or maximum) of an array of `shape` along `axis`, with these axes again, of length 1."""
    axes = range(len(shape)) if axis is None else normalize_axis_tuple(axis, len(shape))
    return np.reshape(g, [1 if i in axes else n for i, n in enumerate(shape)])


def extreme(y, x, axis=None, keepdims=False):
    """max and min: only the largest (smallest) number affects the result; if several are equal, each gets an equal
    part of the gradient."""
    is_extreme = x == restore_axes(y, axis, x.shape)
    n = np.sum(is_extreme, axis=axis, keepdims=True).astype(x.dtype)
    return [lambda g: np.where(is_extreme, restore_axes(g, axis, is_extreme.shape) / n, 0)]


def where_larger(g, a, b):
    """g where a is larger than b, half of g where they are equal, elsewhere 0."""
    return np.where(a > b, g, np.where(a == b, g / 2, 0))


def cumsum(y, x, axis=None):
    i = 0 if axis is None else axis
    return [lambda g, shape=x.shape: np.flip(np.cumsum(np.flip(g, i), axis=i), i).reshape(shape)]


def sort(y, x, axis=-1):
    back = np.argsort(np.argsort(x, axis=axis, stable=True), axis=axis)
    return [lambda g: np.take_along_axis(g, back, axis)]


def transpose(y, x, axes=None):
    back = None if axes is None else numpy.argsort([axis % x.ndim for axis in axes]).tolist()
    return [lambda g: np.transpose(g, back)]


def concatenate(y, arrays, axis=0):
    lengths = [x.shape[axis] for x in arrays]
    before, ends = (slice(None),) * (axis % y.ndim), numpy.cumsum(lengths).tolist()
    return [lambda g, part=slice(end - n, end): g[(*before, part)] for n, end in zip(lengths, ends, strict=True)]


def update_rule(y, buffer, new, start):
    """update: numbers that were overwritten get gradient 0, those of `new` get that of where they were written."""
    place = tuple(i + numbers for i, numbers in zip(start, numpy.indices(new.shape, sparse=True), strict=True))
    zeros = np.zeros_like(new)
    return [lambda g: update(np.copy(g), zeros, start), lambda g: call("getitem", g, place)]


def scatter(x, index, shape):
    """Zeros of `shape` with x added at `index`, as often as a place occurs there."""
    total = numpy.zeros(shape, x.dtype)
    parts = index if isinstance(index, tuple) else (index,)
    if all(isinstance(part, (int, slice, type(None), type(...))) for part in parts):  # no place occurs twice
        total[index] = x
    else:
        numpy.add.at(total, index, x)
    return total


PLAIN["scatter"] = scatter
RULES = {
    "add": lambda y, a, b: [lambda g: g, lambda g: g],  # d(a + b) = da + db
    "subtract": lambda y, a, b: [lambda g: g, lambda g: -g],  # d(a - b) = da - db
    "multiply": lambda y, a, b: [lambda g: g * b, lambda g: g * a],  # d(a * b) = b da + a db
    "divide": lambda y, a, b: [lambda g: g / b, lambda g: g * y / -b],  # d(a / b) = da / b - a / b^2 db
    "power": lambda y, a, b: [  # d(a^b) = b a^(b-1) da + a^b log(a) db; b = 0 gives 0 for a = 0 too
        lambda g: g * (b * a ** (b - (b != 0))),
        lambda g: g * (y * np.log(a)),
    ],
    "negative": lambda y, x: [lambda g: -g],  # d(-x) = -dx
    "absolute": lambda y, x: [lambda g: g * np.sign(x)],  # d|x| = sign(x) dx
    "square": lambda y, x: [lambda g: g * 2 * x],  # d(x^2) = 2 x dx
    "sqrt": lambda y, x: [lambda g: g * 0.5 / y],  # d sqrt(x) = dx / (2 sqrt(x))
    "exp": lambda y, x: [lambda g: g * y],  # d exp(x) = exp(x) dx
    "log": lambda y, x: [lambda g: g / x],  # d log(x) = dx / x
    "tanh": lambda y, x: [lambda g: g * (1 - y * y)],  # d tanh(x) = (1 - tanh(x)^2) dx
    "sin": lambda y, x: [lambda g: g * np.cos(x)],
    "cos": lambda y, x: [lambda g: -g * np.sin(x)],
    # The smaller of two numbers does not affect their maximum. np.where, not a product with 0: 0 * inf would be NaN.
    "maximum": lambda y, a, b: [lambda g: where_larger(g, a, b), lambda g: where_larger(g, b, a)],
    "minimum": lambda y, a, b: [lambda g: where_larger(g, b, a), lambda g: where_larger(g, a, b)],
    "where": lambda y, c, a, b: [None, lambda g: np.where(c, g, 0), lambda g: np.where(c, 0, g)],
    "matmul": lambda y, a, b: [lambda g: g @ b.mT, lambda g: a.mT @ g],  # d(A B) = dA B + A dB
    # A whole layer, gpt2.softmax: dy = y (dx - sum(y dx)). Its maximum cancels out, so no gradient passes through that;
    # with the rules of its five operations a step of training takes a tenth longer.
    "softmax": lambda y, x: [lambda g: y * (g - np.sum(g * y, axis=-1, keepdims=True))],
    # Each term of a sum gets the gradient of the sum. Where numbers were only moved, their gradients are moved back.
    "sum": lambda y, x, axis=None, keepdims=False: [
        lambda g, shape=x.shape: np.broadcast_to(restore_axes(g, axis, shape), shape),
    ],
    "max": extreme,
    "min": extreme,
    "cumsum": cumsum,
    "sort": sort,
    "flip": lambda y, x, axis=None: [lambda g: np.flip(g, axis)],
    "reshape": lambda y, x, _: [lambda g, shape=x.shape: g.reshape(shape)],
    "swapaxes": lambda y, x, i, j: [lambda g: g.swapaxes(i, j)],
    "transpose": transpose,
    "concatenate": concatenate,
    "broadcast_to": lambda y, x, _: [lambda g: g],
    "copy": lambda y, x: [lambda g: g],
    "astype": lambda y, x, _: [lambda g: g],
    "getitem": lambda y, x, index: [lambda g, shape=x.shape: call("scatter", g, index, shape)],  # repeated rows add up
    "scatter": lambda y, x, index, _: [lambda g: call("getitem", g, index)],
    "update": update_rule,
}
RULES["abs"] = RULES["absolute"]
# Operations whose result stays the same while their inputs change a little, so that no gradient passes through them.
CONSTANT = """
less less_equal greater greater_equal equal not_equal isnan isinf isfinite isin searchsorted argmax argmin argsort
any all sign floor ceil floor_divide logical_and logical_or logical_not zeros_like ones_like"""
CONSTANT = set(CONSTANT.split())
FLOATS = "fV"  # the kinds of dtypes that have a gradient; V is bfloat16's
