"""Random functions of `np`, to compare transforms of them on NumPy and on JAX: a composition of operations, each drawn
from OPERATIONS with its arguments drawn from the results of those before. All axes have length 2 or 3, and all ids are
0 or 1, so that most operations fit most arrays."""

import numpy

from backends import np, update

SHAPES = [(), (2,), (3,), (2, 3), (3, 2), (3, 3), (2, 2), (2, 3, 2), (2, 2, 3)]


def broadcasts(x, y):
    try:
        return len(numpy.broadcast_shapes(x.shape, y.shape)) <= 3
    except ValueError:
        return False


def multiplies(x, y):
    if not (x.ndim and y.ndim) or x.shape[-1] != y.shape[-2 if y.ndim > 1 else 0]:
        return False
    return x.ndim == 1 or y.ndim == 1 or broadcasts(x[..., 0, 0], y[..., 0, 0])


def reduced(name):
    def operation(draw, x):
        if x.ndim == 0:
            return lambda x: getattr(np, name)(x)
        axis = draw([None, *range(-x.ndim, x.ndim)] + [(0, -1)] * (x.ndim > 1))
        keepdims, as_method = draw([False, True]), draw([False, True])
        if as_method:
            return lambda x: getattr(x, name)(axis=axis, keepdims=keepdims)
        return lambda x: getattr(np, name)(x, axis=axis, keepdims=keepdims)

    return operation


def along(name, **kwargs):
    def operation(draw, x):
        if x.ndim:
            axis = draw(range(-x.ndim, x.ndim))
            return lambda x: getattr(np, name)(x, axis=axis, **kwargs)

    return operation


def always(f):
    return lambda draw, *args: f


def if_axes(n, f):
    return lambda draw, x, *others: f if x.ndim >= n else None


def if_both(fits, f):
    return lambda draw, x, y: f if fits(x, y) else None


def reshaped(draw, x):
    shape = draw([(-1,), (1, *x.shape), (*x.shape[::-1], 1)])
    return draw([lambda x: x.reshape(shape), lambda x: np.reshape(x, shape), lambda x: x.reshape(*shape)])


def swapped(draw, x):
    if x.ndim:
        one, other = draw(range(-x.ndim, x.ndim)), draw(range(-x.ndim, x.ndim))
        return lambda x: x.swapaxes(one, other)


def sliced(draw, x):
    if x.ndim:
        parts = [slice(None), slice(1, None), slice(-1, None), slice(0, 2), slice(None, None, -1), 0, -1, 1, None, ...]
        index = tuple(draw(parts) for _ in range(draw(range(1, x.ndim + 1))))
        if index.count(...) < 2:
            return lambda x: x[index]


def halved(draw, x):
    axes = [i for i, n in enumerate(x.shape) if n == 2]
    if axes:
        axis = draw(axes)
        return lambda x: np.split(x, 2, axis=axis)[1] + np.split(x, [1], axis=axis)[0]


def joined(draw, x, y):
    if x.ndim and x.ndim == y.ndim:
        axis = draw(range(-x.ndim, x.ndim))
        if all(a == b for i, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if i != axis % x.ndim):
            return lambda x, y: np.concatenate([x, y], axis=axis)


def stacked(draw, x, y):
    if x.shape == y.shape:
        axis = draw(range(-x.ndim - 1, x.ndim + 1))
        return lambda x, y: np.stack([x, y], axis=axis)


def best(draw, x, y):
    """Something of x at the place of the largest of y."""
    if x.ndim and y.ndim:
        axis = draw(range(-y.ndim, y.ndim))
        ways = [lambda x, y: x[np.argmax(y) % len(x)], lambda x, y: x[np.argmin(y, axis=axis) % len(x)]]
        return draw([*ways, lambda x, y: x.sum() * y.argmax(axis=axis)])


def picked(draw, x, ids):
    if x.ndim >= 1:
        ways = [lambda x, ids: x[ids], lambda x, ids: np.asarray(x)[np.asarray(ids) - 1]]
        if x.ndim >= 2:
            ways += [lambda x, ids: x[:, ids], lambda x, ids: x[..., ids], lambda x, ids: x[ids, 0]]
            ways += [lambda x, ids: x[ids, ids], lambda x, ids: x[ids, 1:], lambda x, ids: x[1, ids]]
            ways += [lambda x, ids: x[None, ids], lambda x, ids: x[ids, [0]], lambda x, ids: x[ids, None]]
        if x.ndim >= 3:
            ways += [lambda x, ids: x[ids, :, ids], lambda x, ids: x[0, :, [1, 0]] if ids.ndim == 0 else x[:, ids, ids]]
        return draw(ways)


def taken(draw, x):
    if x.ndim:
        axis = draw(range(-x.ndim, x.ndim))
        return lambda x: np.take_along_axis(x, np.argsort(x, axis=axis), axis=axis)


def updated(draw, x, y, ids):
    if x.ndim and x.ndim == y.ndim and all(m >= 2 for m in x.shape):
        one = (slice(0, 1),) * x.ndim

        def write(x, y, ids):
            start = ids.reshape(-1)[0]
            return update(x + 0, y[one], (start, *[0, 1, start][: x.ndim - 1]))

        return write


def searched(draw, x, y):
    if x.ndim == 1:
        side = draw(["left", "right"])
        return lambda x, y: x[0] * np.searchsorted(np.sort(x), y.reshape(-1)[0], side=side)


def chosen(draw, x, ids):
    if x.ndim:
        return lambda x, ids: np.where(np.isin(np.arange(len(x)), ids), x.T, -x.T)


def constant(draw, x):
    if x.ndim:
        n = x.shape[-1]
        weights = draw([numpy.tri(n, dtype=bool), numpy.arange(n), numpy.linspace(-1, 1, n), numpy.tri(n), 1.5])
        return draw([lambda x: x * weights, lambda x: weights - x, lambda x: np.where(weights > 0, x, -1e10) / 1e10])


def powered(draw, x):
    n = draw([0, 1, 2, 3, 2.0])
    return lambda x: np.tanh(x) ** n


FLOATS = [  # of one array
    *(always(f) for f in [np.tanh, np.sin, np.cos, np.negative, np.square, abs, lambda x: -x, lambda x: 2 - x]),
    *(always(f) for f in [lambda x: np.exp(np.tanh(x)), lambda x: np.log(x * x + 1), lambda x: np.sqrt(x * x + 1)]),
    *(always(f) for f in [lambda x: np.clip(x, -0.5, 0.5), lambda x: np.zeros_like(x) + 1 / (x * x + 1)]),
    *(always(f) for f in [np.sign, np.floor, np.ones_like, lambda x: np.copy(x) * 1.0, lambda x: x.astype(x.dtype)]),
    *(reduced(name) for name in ["sum", "mean", "max", "min"]),
    *(along(name) for name in ["cumsum", "sort", "flip"]),
    *(if_axes(1, f) for f in [lambda x: np.cumsum(x), lambda x: np.flip(x), lambda x: sum(x), lambda x: x * len(x)]),
    *(if_axes(1, f) for f in [lambda x: np.stack(list(x), axis=-1), lambda x: x[:, None] + x, lambda x: x[-1]]),
    *(if_axes(2, f) for f in [lambda x: x.mT, lambda x: x.T, lambda x: x @ x.mT, lambda x: np.transpose(x)]),
    lambda draw, x: (lambda x: np.broadcast_to(x, (2, *x.shape))) if x.ndim < 3 else None,
    lambda draw, x: (lambda x: np.expand_dims(x, -1)) if x.ndim < 3 else None,
    *[reshaped, swapped, sliced, halved, taken, constant, powered],
]
PAIRS = [  # of two
    *(if_both(broadcasts, f) for f in [np.add, np.subtract, np.multiply, np.maximum, np.minimum]),
    *(if_both(broadcasts, f) for f in [lambda x, y: x + y, lambda x, y: x * y, lambda x, y: x / (y * y + 1)]),
    *(if_both(broadcasts, f) for f in [lambda x, y: np.where(x > y, x, y * 2), lambda x, y: (x <= y) * x]),
    if_both(broadcasts, lambda x, y: np.where((x > 0) & (y >= 0) | ~(x != y), x, 0.5)),
    *[if_both(multiplies, lambda x, y: np.tanh(x @ y)), if_both(multiplies, lambda x, y: np.tanh(np.matmul(x, y)))] * 2,
    *[joined, stacked, best, searched],
]
WITH_IDS = [  # of an array and ids
    *[picked, picked, picked, chosen],
    if_axes(0, lambda x, ids: x.reshape(-1)[0] * (((ids << 2) ^ 1 ^ ids) >> 1)),
]
UPDATES = [updated]  # of two arrays and ids


def random_function(seed, n_operations=12):
    """(f, inputs): f takes five arrays, three of floats and two of ids, and returns a list of arrays."""
    rng = numpy.random.default_rng(seed)

    def draw(items):
        return items[rng.integers(len(items))]

    shapes = [draw(SHAPES[1:]) for _ in range(3)]
    inputs = [rng.normal(size=shape) for shape in shapes]
    inputs += [rng.integers(0, 2, shape) for shape in [draw([(), (2,), (3,)]), draw([(), (2,), (2, 2)])]]
    floats, steps = [0, 1, 2], []
    values = list(inputs)
    while len(steps) < n_operations:
        recent = floats[-4:] + floats[:3]
        kind = draw([FLOATS, FLOATS, PAIRS, PAIRS, WITH_IDS, UPDATES])
        args = [draw(recent), *([draw(recent)] if kind in (PAIRS, UPDATES) else [])]
        args += [draw([3, 4])] if kind in (WITH_IDS, UPDATES) else []
        f = draw(kind)(draw, *(values[i] for i in args))
        if f is None:
            continue
        try:
            f(*(numpy.ones_like(values[i]) if i in (3, 4) else values[i] for i in args))
        except (IndexError, ValueError):  # it does not fit these shapes
            continue
        value = f(*(values[i] for i in args))
        if numpy.ndim(value) <= 3 and 0 < numpy.size(value) <= 100:
            floats.append(len(values))
            values.append(numpy.asarray(value))
            steps.append((f, args))

    def composed(*inputs):
        values = list(inputs)
        for f, args in steps:
            values.append(f(*(values[i] for i in args)))
        return values[-4:]

    return composed, inputs


def random_batch(inputs, seed, n_batch=4):
    """(in_axes, args): some of the inputs with a row for each of a batch, others the same for all."""
    rng = numpy.random.default_rng(seed + 10**6)
    in_axes = [0, *(0 if rng.random() < 0.7 else None for _ in inputs[1:])]

    def rows(x):
        shape = (n_batch, *x.shape)
        return rng.normal(size=shape) if x.dtype.kind == "f" else rng.integers(0, 2, shape)

    return in_axes, [x if axis is None else rows(x) for x, axis in zip(inputs, in_axes, strict=True)]
