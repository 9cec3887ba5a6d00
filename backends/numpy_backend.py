"""The operations of a backend in plain NumPy: what each one means. Read it beside jax_backend.py, which has the same
names in the same order and compiles."""

import functools

import numpy

from backends.numpy_layout import keep_freed_memory, prepare
from weights.params import tree_map

__all__ = ["prepare"]  # lays out the matrices of a model for speed, in place: see numpy_layout.py
COMPILES = False  # whether each new combination of shapes costs the compilation of a program


def setup(dtype="float32"):
    """Prepares this process to compute in `dtype`. Returns a description of what will compute."""
    keep_freed_memory()
    return f"NumPy {numpy.__version__}"


def asarray(tree):
    """A tree of arrays -> the same tree with NumPy arrays, dtypes unchanged."""
    return tree_map(numpy.asarray, tree)


def to_numpy(tree):
    """A tree of this backend's arrays -> the same tree with NumPy arrays."""
    return asarray(tree)


def bucket_length(n):
    """The length to which a prompt of n tokens is padded: n, as NumPy compiles nothing."""
    return n


def cache_capacity(n):
    """The number of positions of a cache that needs n: n."""
    return n


def jit(f, donate_argnums=()):
    """f, to be called many times with arguments of the same shapes. After a call only the result is used, never the
    arguments that were donated.

    NumPy compiles nothing, so this is f itself. f must be pure: its result depends on its arguments alone.
    """
    return f


def vmap(f, in_axes=0):
    """f for one example -> f for a batch. Arguments whose entry in in_axes is 0 have one row for each example along
    axis 0; those with None are the same for all. Arguments and results are trees of arrays.

    A loop, and the results stacked. Raises ValueError for other axes and for batches of different lengths.
    """

    def batched(*args):
        axes = in_axes if isinstance(in_axes, (tuple, list)) else [in_axes] * len(args)
        if set(axes) - {0, None}:
            raise ValueError(f"in_axes {in_axes!r}: each must be 0 or None")
        lengths, mapped = set(), [arg for arg, axis in zip(args, axes, strict=True) if axis == 0]
        tree_map(lambda leaf: lengths.add(len(leaf)), mapped)
        if len(lengths) != 1:
            raise ValueError(f"in_axes {in_axes!r}, lengths {sorted(lengths)}: one axis 0 at least, one length for all")
        (n_batch,) = lengths

        def row(i):
            pick = functools.partial(tree_map, lambda leaf: leaf[i])
            return (arg if axis is None else pick(arg) for arg, axis in zip(args, axes, strict=True))

        return tree_map(lambda *rows: numpy.stack(rows), *(f(*row(i)) for i in range(n_batch)))

    return batched


def update(buffer, new, start):
    """`buffer` with `new` written at the indices `start`, one for each axis. Use only what is returned.

    NumPy writes into the buffer itself, which saves a copy. Raises ValueError where `new` does not fit.
    """
    place = tuple(slice(i, i + n) for i, n in zip(start, new.shape, strict=True))
    if min(start) < 0 or buffer[place].shape != new.shape:
        raise ValueError(f"{list(new.shape)} numbers from {list(start)} on do not fit into {list(buffer.shape)}")
    buffer[place] = new
    return buffer


def value_and_grad(f):
    """Raises NotImplementedError: NumPy does not record how a value was computed, so it cannot differentiate it."""
    raise NotImplementedError("gradients need the jax backend: NumPy keeps no record of how a value was computed")
