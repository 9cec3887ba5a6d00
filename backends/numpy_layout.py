"""How matrices lie in memory on NumPy, and in which form they are multiplied. For speed only: every result is the same,
up to rounding in the last bits.

Generating a token reads every weight once, so it takes as long as the weights take to come from memory. A matrix is
read fastest along long contiguous runs: a tall one (more rows than columns) along its columns. Measured on two cores,
all 48 block matrices of 124M, in milliseconds, with w in row order (C) or column order (F):

    rows of x                      1     2     4     8    16    32
    x @ w, C                    12.2  34.2  35.5  36.3  40.8  48.6
    row by row, C               12.4  21.2  33.3  56.5   102   194
    (w.T @ x.T).T, C            11.3  30.9  31.5  33.8  36.3  43.8
    x @ w, F                    11.2  37.1  37.8  38.4  43.5  51.8
    (w.T @ x.T).T, F            11.3  26.2  26.8  29.1  30.2  39.0
    in blocks of columns, F           18.9  20.0  22.3  28.3  39.7

So the fastest form depends on the number of rows, and 16 rows take two and a half times as long as one.
"""

import numpy

from backends import numpy_threads
from weights.params import replace_leaves

N_READS = 64  # products of a single row that a matrix serves before it is copied to column order
SMALL = 1_000_000  # n_rows * n_in * n_out up to which OpenBLAS multiplies without copying w first


def prepare(params):
    """Lays out params for speed, in place, and returns them: each large matrix `w` becomes a ColumnMajor, `wte` and
    `lm_head` a Table."""
    forms = {"w": ColumnMajor, "wte": Table, "lm_head": Table}

    def lay_out(path, array):
        array = numpy.asarray(array)
        is_large = array.nbytes >= 1 << 20 and array.dtype.itemsize >= 4
        return forms[path[-1]](array) if path[-1] in forms and is_large else array

    return replace_leaves(lay_out, params)


class ColumnMajor:
    """Stands for w in `x @ w`. Switches to a copy of w in column order once that copy has paid for itself.

    The copy takes as long as it saves in N_READS products of a single row, so a short text does not pay for it. A
    single row gains only if w is tall: a token of a long text on 124M takes 11% less time. A few rows, as of a batch,
    gain for every w, and as much in a third as many products.
    """

    __array_ufunc__ = None  # NumPy's arrays then leave `x @ w` to __rmatmul__ below
    shape = property(lambda self: self.w.shape)
    ndim = property(lambda self: self.w.ndim)

    def __init__(self, w):
        self.w, self.n_reads, self.is_tall = w, 0, w.shape[0] > w.shape[1]

    def __array__(self, dtype=None, copy=None):
        return numpy.array(self.w, dtype, copy=copy)

    def __rmatmul__(self, x):
        n_rows = x.size // x.shape[-1]
        self.n_reads += self.is_tall if n_rows == 1 else 3 * (n_rows <= 32)
        if self.n_reads >= N_READS and not self.w.flags.f_contiguous:
            self.w = in_column_order(self.w)
        return product(x, self.w)


def in_column_order(w):
    """A copy of w, 64 rows at a time: they fit into a core's cache, which halves the time."""
    copy = numpy.empty(w.shape, w.dtype, "F")
    for start in range(0, len(w), 64):
        copy[start : start + 64] = w[start : start + 64]
    return copy


class Table:
    """Stands for rows in `rows[ids]` and `x @ rows.T`."""

    shape = property(lambda self: self.rows.shape)
    dtype = property(lambda self: self.rows.dtype)

    def __init__(self, rows):
        self.rows, self.T = rows, ColumnMajor(rows.T)

    def __array__(self, dtype=None, copy=None):
        return numpy.array(self.rows, dtype, copy=copy)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, ids):
        return self.rows[ids]

    def transpose(self, axes=None):
        return self.T  # numpy.transpose calls this, for vmap


def product(x, w):
    """x @ w in the form that is fastest for the number of rows of x; x is [..., n_in], w [n_in, n_out]."""
    if x.ndim > 2:
        return product(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[1])
    n_rows = len(x) if x.ndim == 2 else 1
    if 2 <= n_rows <= 16 and w.flags.f_contiguous:
        return in_blocks(x, w)
    if 2 <= n_rows <= 3:
        return numpy.stack([row @ w for row in x])
    if 4 <= n_rows <= 64:
        return (w.T @ numpy.ascontiguousarray(x.T)).T
    return x @ w


def in_blocks(x, w):
    """x @ w for few rows, a block of at most 64 columns at a time. OpenBLAS computes a product of SMALL numbers without
    copying its part of w first, but with one thread. So each thread gets a share of the blocks."""
    (n_rows, n_in), n_out, n = x.shape, w.shape[1], 64
    while n > 8 and n_rows * n_in * n > SMALL:
        n //= 2
    n_blocks, y = n_out // n, numpy.empty((n_rows, n_out), x.dtype)
    blocks = w.T[: n_blocks * n].reshape(-1, n, n_in).mT  # [n_in, n_out] -> [n_blocks, n_in, n]
    parts = y[:, : n_blocks * n].reshape(n_rows, -1, n).swapaxes(0, 1)  # [n_rows, n_out] -> [n_blocks, n_rows, n]
    first, *others = numpy_threads.shares(n_blocks)
    waiting = [numpy_threads.pool.submit(numpy.matmul, x, blocks[share], parts[share]) for share in others]
    numpy.matmul(x, blocks[first], parts[first])
    y[:, n_blocks * n :] = x @ w[:, n_blocks * n :]
    for share in waiting:
        share.result()
    return y


def keep_freed_memory():
    """Makes this process keep up to 62 MiB of the memory that it frees, and use it for the next arrays.

    By itself glibc returns freed memory to the system and gets it back page by page, which costs an eighth of the time
    of a prompt of 512 tokens. After an array below 32 MiB has been freed, glibc keeps up to twice its size (mallopt(3),
    M_MMAP_THRESHOLD; MALLOC_ variables overrule it). So an array of 31 MiB is freed here once.
    """
    numpy.empty(31 << 20, numpy.uint8)
