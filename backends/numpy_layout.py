"""How matrices lie in memory on NumPy, and in which form they are multiplied. For speed only: every result is the same,
up to rounding in the last bits.

Generating a token reads every weight once, so it takes as long as the weights take to come from memory. A matrix is
read fastest along long contiguous runs: a tall one (more rows than columns) along its columns. Measured on two cores,
all 48 block matrices of 124M, in milliseconds, with w in row order (C) or column order (F):

    rows of x                  1     2     4     8    16    32
    x @ w, C                12.2  34.2  35.5  36.3  40.8  48.6
    row by row, C           12.4  21.2  33.3  56.5   102   194
    (w.T @ x.T).T, C        11.3  30.9  31.5  33.8  36.3  43.8
    x @ w, F                11.2  37.1  37.8  38.4  43.5  51.8
    (w.T @ x.T).T, F        11.3  26.2  26.8  29.1  30.2  39.0

So the best form depends on the number of rows, and 16 rows can cost less than three times one.
"""

import numpy

from weights.params import replace_leaves

N_READS = 64  # products that a matrix serves before it is copied to column order


def prepare(params):
    """Lays out params for speed, in place, and returns them: each large matrix `w` becomes a ColumnMajor."""
    return replace_leaves(lambda path, array: lay_out(array) if path[-1] == "w" else numpy.asarray(array), params)


def lay_out(w):
    w = numpy.asarray(w)
    return ColumnMajor(w) if w.nbytes >= 1 << 20 and w.dtype.itemsize >= 4 else w


class ColumnMajor:
    """Stands for w in `x @ w`. Switches to a copy of w in column order once that copy has paid for itself.

    The copy takes as long as it saves in N_READS products, so a short text does not pay for it. A single row gains only
    if w is tall: a token of a long text on 124M takes 11% less time. A few rows, as of a batch, gain for every w.
    """

    __array_ufunc__ = None  # NumPy's arrays then leave `x @ w` to __rmatmul__ below

    def __init__(self, w):
        self.w, self.n_reads, self.is_tall = w, 0, w.shape[0] > w.shape[1]

    def __array__(self, dtype=None, copy=None):
        return numpy.array(self.w, dtype, copy=copy)

    def __rmatmul__(self, x):
        n_rows = x.size // x.shape[-1]
        self.n_reads += self.is_tall if n_rows == 1 else n_rows <= 32
        if self.n_reads == N_READS:
            self.n_reads, self.w = N_READS + 1, numpy.asfortranarray(self.w)
        return product(x, self.w)


def product(x, w):
    """x @ w in the form that is fastest for the number of rows of x."""
    n_rows = len(x) if x.ndim == 2 else 1
    if n_rows == 2:
        return numpy.stack([row @ w for row in x])
    if 3 <= n_rows <= 64:
        return (w.T @ numpy.ascontiguousarray(x.T)).T
    return x @ w


def keep_freed_memory():
    """Makes this process keep up to 62 MiB of the memory that it frees, and use it for the next arrays.

    By itself glibc returns freed memory to the system and gets it back page by page, which costs an eighth of the time
    of a prompt of 512 tokens. Its threshold adapts: it keeps twice the size of the largest array freed so far, if that
    is below 32 MiB (mallopt(3), M_MMAP_THRESHOLD; MALLOC_ variables overrule it). So one such array is freed here.
    """
    numpy.empty(31 << 20, numpy.uint8)
