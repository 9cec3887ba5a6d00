"""vmap in NumPy: f for one example becomes f for a batch, without a loop over the rows.

What vmap is: an array with a batch axis that the code does not see. f is called once, with tracers. A tracer of 16
sequences holds an array [16, n_seq, n_embd] and says that its shape is [n_seq, n_embd]. For each operation the table
RULES below knows how to do all rows at once, mostly by adding 1 to the number of the axis:

    in f                              what is computed for all rows
    x + y                             x + y, after adding axes of length 1, so that both have equally many
    x.sum(axis=0)                     x.sum(axis=1)
    x @ w, the same w for all rows    [n_batch * n_seq, n_in] @ w: one product, which reads w once, not n_batch times
    table[ids]                        table[ids], with ids [n_batch, n_seq]
    update(buffer, new, start)        each row at its own start

An argument whose axis is None becomes a tracer too, one without the hidden axis: because a NumPy table cannot be
indexed by a tracer. An operation without a rule is refused.
"""

import functools

import numpy  # NumPy itself; np, below, follows its arguments
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

from backends import np
from backends.numpy_levels import Tracer, call, highest, map_args, new_level, plain
from weights.params import tree_map


def vmap(f, in_axes=0):
    """f for one -> f for a batch: an argument with axis 0 has one entry for each example, one with None is shared.

    Arguments and results are trees of arrays, and each array of the result has one row per example. Raises ValueError
    for another axis, or for arrays whose axes 0 differ in length; NotImplementedError for an operation without a rule.
    """

    def batched(*args):
        axes = list(in_axes) if isinstance(in_axes, (tuple, list)) else [in_axes] * len(args)
        n_batch, level = batch_size(args, axes), new_level()

        def trace(arg, axis):
            return tree_map(lambda leaf: BatchTracer(level, leaf, axis == 0) if is_array(leaf) else leaf, arg)

        def untrace(leaf):
            if leaf is None:
                return None
            ours = isinstance(leaf, BatchTracer) and leaf.level == level
            value = leaf.value if ours else leaf
            return value if ours and leaf.batched else np.copy(repeat(value, n_batch))

        return tree_map(untrace, f(*map(trace, args, axes)))

    return batched


def is_array(leaf):
    """Python's own numbers stay what they are: they are the same for all rows."""
    return not isinstance(leaf, (int, float, str, type(None)))


def batch_size(args, axes):
    """The length of axis 0 of all arrays that have one row per example. Raises ValueError."""
    if len(axes) != len(args) or any(axis not in (0, None) for axis in axes):
        raise ValueError(f"vmap: in_axes {axes} for {len(args)} arguments: there must be a 0 or a None for each")
    shapes = set()
    mapped = [arg for arg, axis in zip(args, axes, strict=True) if axis == 0]
    tree_map(lambda leaf: shapes.add(numpy.shape(leaf)), mapped)
    if () in shapes:
        raise ValueError(f"vmap: in_axes {axes}: an argument with axis 0 holds a single number: its axis must be None")
    lengths = sorted({shape[0] for shape in shapes})
    if len(lengths) != 1:
        raise ValueError(f"vmap: in_axes {axes}, lengths {lengths}: one axis 0 at least, one length for all")
    return lengths[0]


class BatchTracer(Tracer):
    """An array for each row of a batch: value is [n_batch, *shape]. Or, if not `batched`, one for all: [*shape]."""

    __slots__ = ("batched",)

    def __init__(self, level, value, batched):
        self.level, self.value, self.batched = level, value, batched

    @property
    def shape(self):
        return self.value.shape[1:] if self.batched else self.value.shape

    def apply(self, name, args, kwargs):
        level, rows, values = self.level, [], []

        def lower(x):
            if not isinstance(x, BatchTracer) or x.level != level:
                values.append(x)
                return x
            values.append(x.value)
            if not x.batched:
                return x.value
            rows.append(Rows(x.value))
            return rows[-1]

        args = map_args(lower, args)
        f = plain(name) if highest(values) is None else functools.partial(call, name)
        if not rows:
            return BatchTracer(level, f(*args, **kwargs), False)
        if name not in RULES:
            raise NotImplementedError(f"vmap on NumPy has no rule for {name}: add one to RULES in numpy_vmap.py")
        return BatchTracer(level, RULES[name](f, *args, **kwargs), True)

    def apply_layer(self, layer, args, kwargs):
        """A layer of [..., n] arrays accepts any number of leading axes, so it is called once, with the batch axis in
        front. Returns None if another argument has a batch axis too, or a higher level: then the rules compute it."""
        others = [x for x in (*args, *kwargs.values()) if isinstance(x, Tracer) and x.level >= self.level]
        if not self.batched or any(x.level > self.level or x.batched for x in others):
            return None
        values = tree_map(lambda x: x.value if any(x is other for other in others) else x, (args, kwargs))
        return BatchTracer(self.level, layer(self.value, *values[0], **values[1]), True)


class Rows:
    """What a rule sees of an argument with the hidden axis: array is [n_batch, ...]. Others it sees as they are."""

    __slots__ = ("array",)

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        raise TypeError("vmap on NumPy: an array inside a list; make it one array with np.stack")


# ---- What the rules are made of. f is the operation, now to be called with the batch axis. ----


def find_rows(args):
    """All Rows in a nest of lists and tuples."""
    found = []
    map_args(lambda arg: found.append(arg) if isinstance(arg, Rows) else None, args)
    return found


def size(args):
    """n_batch, by the first Rows."""
    return len(find_rows(args)[0].array)


def repeat(x, n_batch):
    """[n_batch, ...] of x, if it is not so already."""
    return x.array if isinstance(x, Rows) else np.broadcast_to(x, (n_batch, *numpy.shape(x)))


def ndim(x):
    """The number of axes that f sees; 0 for a number, and for a dtype (numpy.float32.ndim is no number)."""
    if isinstance(x, Rows):
        return x.array.ndim - 1
    return 0 if isinstance(x, (int, float, type)) else numpy.ndim(x)


def align(x, n):
    """x with as many axes of length 1 after the batch axis as it takes to have n axes in f's view."""
    if not isinstance(x, Rows):
        return x
    missing, (n_batch, *shape) = n + 1 - x.array.ndim, x.array.shape
    return x.array.reshape(n_batch, *[1] * missing, *shape) if missing else x.array


def elementwise(f, *args, **kwargs):
    n = max([ndim(x) for x in args])
    return f(*[align(x, n) for x in args], **kwargs)


def along(f, x, axis=None, **kwargs):
    """Operations along axes; None means all of them."""
    axes = range(ndim(x)) if axis is None else normalize_axis_tuple(axis, ndim(x))
    return f(x.array, axis=tuple(i + 1 for i in axes), **kwargs)


def along_one(f, x, axis=None, **kwargs):
    """Operations along one axis; None means that of the flattened array."""
    array = x.array.reshape(len(x.array), -1) if axis is None else x.array
    return f(array, axis=1 if axis is None else shift(axis, ndim(x)), **kwargs)


def shift(axis, n):
    return normalize_axis_index(axis, n) + 1


def row_by_row(f, *args, **kwargs):
    """A loop, for what NumPy does only for one."""

    def row(i):
        return map_args(lambda x: x.array[i] if isinstance(x, Rows) else x, args)

    return np.stack([f(*row(i), **kwargs) for i in range(size(args))])


def reshape(f, x, shape):
    return f(x.array, (len(x.array), *([shape] if isinstance(shape, int) else shape)))


def swapaxes(f, x, axis1, axis2):
    return f(x.array, shift(axis1, ndim(x)), shift(axis2, ndim(x)))


def transpose(f, x, axes=None):
    axes = range(ndim(x))[::-1] if axes is None else axes
    return f(x.array, (0, *(shift(axis, ndim(x)) for axis in axes)))


def broadcast_to(f, x, shape):
    return f(align(x, len(shape)), (len(x.array), *shape))


def concatenate(f, arrays, axis=0):
    return f([repeat(x, size(arrays)) for x in arrays], axis=shift(axis, ndim(arrays[0])))


def matmul(f, x, w):
    """One matrix w for all rows (or what stands for one): a single product. Else one for each row."""
    if not isinstance(w, Rows) and getattr(w, "ndim", 2) == 2:
        *outer, n_in = x.array.shape
        rows = x.array.reshape(-1, n_in)  # [n_batch, ..., n_in] -> [n_batch * ..., n_in]
        return (rows @ w).reshape(*outer, -1)
    n = max(ndim(x), ndim(w))
    return f(align(x, n), align(w, n))


def batch_index(index, x_has_rows):
    """The index that does for all rows what the tuple `index` does for one, or None if there is none.

    Batched ids: row i of x is to be read at row i of the ids. So the numbers 0, 1, ... of the rows are a further index
    in front of them. That works if the ids come first in the index; elsewhere NumPy would put their axes elsewhere.
    """
    at = [i for i, part in enumerate(index) if not isinstance(part, (slice, type(None), type(...)))]
    rows, n = find_rows(index), max((ndim(index[i]) for i in at), default=0)
    adjacent = not at or at[-1] - at[0] == len(at) - 1
    if any(part.array.dtype == bool for part in rows):
        raise NotImplementedError("vmap on NumPy: x[mask] has another length in each row: use np.where(mask, x, ...)")
    if not rows:
        return (slice(None), *index) if adjacent or n == 0 else None
    if not adjacent or at[0] != 0:
        return None
    numbers = Rows(numpy.arange(size(rows)))
    ids = [align(part, n) for part in ([numbers] if x_has_rows else []) + [index[i] for i in at]]
    return (*ids, *index[len(at) :])


def getitem(f, x, index):
    index = index if isinstance(index, tuple) else (index,)
    place = batch_index(index, isinstance(x, Rows))
    if place is None:
        return row_by_row(f, x, index)
    return f(x.array if isinstance(x, Rows) else x, place)


def scatter(f, x, index, shape):
    index = index if isinstance(index, tuple) else (index,)
    n_batch, place = size((x, index)), batch_index(index, x_has_rows=True)
    if place is None:
        return row_by_row(f, x, index, shape)
    return f(repeat(x, n_batch), place, (n_batch, *shape))


def update(f, buffer, new, start):
    """A buffer that has a row for each example is written in place, as without vmap."""
    n_batch = size((buffer, new, start))
    buffer = buffer.array if isinstance(buffer, Rows) else np.copy(repeat(buffer, n_batch))
    new = repeat(new, n_batch)
    if not find_rows(start):
        return f(buffer, new, (0, *start))
    columns = [part.array.tolist() if type(getattr(part, "array", None)) is numpy.ndarray else
               part.array if isinstance(part, Rows) else [part] * n_batch for part in start]  # fmt: skip
    rows = [f(*row) for row in zip(buffer, new, zip(*columns, strict=True), strict=True)]
    return np.stack(rows) if isinstance(rows[0], Tracer) else buffer


ELEMENTWISE = """
add subtract multiply divide floor_divide remainder power maximum minimum where negative absolute abs sign square
exp log sqrt tanh sin cos floor ceil less less_equal greater greater_equal equal not_equal isnan isinf isfinite
logical_and logical_or logical_not bitwise_and bitwise_or bitwise_xor invert left_shift right_shift copy zeros_like
ones_like astype"""
RULES = {
    **dict.fromkeys(ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(["sum", "max", "min", "any", "all", "flip"], along),
    **dict.fromkeys(["argmax", "argmin", "cumsum"], along_one),
    **dict.fromkeys(["sort", "argsort"], lambda f, x, axis=-1, **kwargs: along_one(f, x, axis, **kwargs)),
    **dict.fromkeys(["isin", "searchsorted"], row_by_row),
    **{rule.__name__: rule for rule in (reshape, swapaxes, transpose, broadcast_to, concatenate, matmul)},
    **{rule.__name__: rule for rule in (getitem, scatter, update)},
}
