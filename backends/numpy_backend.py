"""The operations of a backend in plain NumPy: what each one means. Read it beside jax_backend.py, which has the same
names in the same order and compiles."""

import functools
import operator

import numpy

from backends import numpy_grad, numpy_threads, numpy_vmap
from backends.numpy_layout import keep_freed_memory, prepare
from weights.params import flatten, tree_map

__all__ = ["prepare"]  # lays out the matrices of a model for speed, in place: see numpy_layout.py
COMPILES = False  # whether each new combination of shapes costs the compilation of a program
N_DATA = N_MODEL = 1  # devices that divide the rows of a batch, and the matrices: sharding.py has more
# {rows of a pass that checks a draft: its time, in passes of one row}, of 124M on two cores
ROW_COSTS = {1: 1.0, 2: 1.7, 4: 1.8, 8: 2.1}


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
    """f, to be called many times with arguments of the same shapes.

    donate_argnums are the numbers of the arguments whose memory JAX may reuse for the result (donated arguments): the
    caller must not use them after the call. NumPy compiles nothing, so this is f itself. f must be pure: its result
    depends on its arguments alone.
    """
    return f


def vmap(f, in_axes=0):
    """f for one example -> f for a batch. Arguments whose entry in in_axes is 0 have one row for each example along
    axis 0; those with None are the same for all. Arguments and results are trees of arrays.

    No loop: each operation in f becomes one that computes all rows. Raises ValueError as numpy_vmap.vmap does.
    """
    return numpy_vmap.vmap(f, in_axes)


def sum_over(f, rows):
    """The sum of the trees f(row) for each row of the tree `rows`, along axis 0 of its arrays. The results are added in
    the order of the rows, so the sum does not depend on which of them is ready first."""
    n_rows = len(next(iter(flatten(rows).values())))
    parts = [tree_map(operator.itemgetter(i), rows) for i in range(n_rows)]
    return functools.reduce(functools.partial(tree_map, operator.add), numpy_threads.parallel_map(f, parts))


def own(hparams):
    """hparams with the numbers of heads that each device has: hparams, as one device has all."""
    return hparams


def rows(read, shape):
    """A batch of `shape`, whose rows read(slice) reads: all of them. Many devices divide them, and each process reads
    those of its own devices (sharding.py)."""
    return read(slice(None))


def over_devices(f, mean=False):
    """f(params, rows, *others), where each device computes its share of the rows of a batch: f itself, on one device.
    f returns a result for each row, or with mean=True a pair of means over its rows: a loss and its gradient, a tree as
    params."""
    return f


def tune(step):
    """The function step(params, tokens, ...), tuned while it runs: it gets the number of BLAS threads that is fastest
    at the moment (numpy_threads.py)."""
    return numpy_threads.adaptive(step)


def update(buffer, new, start):
    """`buffer` with `new` written at the indices `start`, one for each axis. Use only what is returned.

    NumPy writes into the buffer itself, which saves a copy. Raises ValueError where `new` does not fit.
    """
    place = buffer[tuple([slice(i, i + n) for i, n in zip(start, new.shape, strict=True)])]
    if min(start) < 0 or place.shape != new.shape:
        raise ValueError(f"{list(new.shape)} numbers from {list(start)} on do not fit into {list(buffer.shape)}")
    place[...] = new
    return buffer


def value_and_grad(f):
    """f(params, ...) -> (f's value, its gradient: a tree like params). Raises TypeError as numpy_grad.value_and_grad
    does."""
    return numpy_grad.value_and_grad(f)
