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
    64 columns at a time, F           25.1  19.1  39.7

So the fastest form depends on the number of rows, and 16 rows can take less than three times as long as one.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy

from backends import numpy_threads
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
    """x @ w in the form that is fastest for the number of rows of x; x is [..., n_in], w [n_in, n_out]."""
    if x.ndim > 2:
        return product(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[1])
    n_rows = len(x) if x.ndim == 2 else 1
    if n_rows == 2 or (n_rows == 3 and w.flags.c_contiguous):
        return numpy.stack([row @ w for row in x])
    if 3 <= n_rows <= 5 and w.flags.f_contiguous:
        return in_halves(x, w)
    if 3 <= n_rows <= 64:
        return (w.T @ numpy.ascontiguousarray(x.T)).T
    return x @ w


def in_halves(x, w):
    """x @ w for few rows, 64 columns at a time: OpenBLAS computes so small a product without copying its part of w
    first, but with one thread. So each half of the columns has a thread of its own."""
    if numpy_threads.current() == 1:
        return in_blocks(x, w)
    half = w.shape[1] // 128 * 64
    second = helper.submit(in_blocks, x, w[:, half:])
    return numpy.concatenate([in_blocks(x, w[:, :half]), second.result()], axis=1)


def in_blocks(x, w):
    n_in, n_out = w.shape
    n_whole = n_out // 64 * 64
    blocks = w.T[:n_whole].reshape(-1, 64, n_in).mT  # -> [n_whole / 64, n_in, 64]
    y = (x @ blocks).swapaxes(0, 1).reshape(len(x), n_whole)  # -> [n_rows, n_whole]
    return y if n_whole == n_out else numpy.concatenate([y, x @ w[:, n_whole:]], axis=1)


helper = ThreadPoolExecutor(1)  # its thread starts with the first product in halves


def keep_freed_memory():
    """Makes this process keep up to 62 MiB of the memory that it frees, and use it for the next arrays.

    By itself glibc returns freed memory to the system and gets it back page by page, which costs an eighth of the time
    of a prompt of 512 tokens. After an array below 32 MiB has been freed, glibc keeps up to twice its size (mallopt(3),
    M_MMAP_THRESHOLD; MALLOC_ variables overrule it). So an array of 31 MiB is freed here once.
    """
    numpy.empty(31 << 20, numpy.uint8)
