"""How matrices lie in memory on NumPy. For speed only: every result is the same, up to rounding in the last bits.

Generating one token reads every weight once, so it takes as long as the weights take to come from memory. A matrix is
read fastest along long contiguous runs. A tall matrix (more rows than columns) has its long runs along the columns.
"""

import numpy

from weights.params import replace_leaves

N_READS = 64  # single rows that a matrix serves before it is copied to column order


def prepare(params):
    """Lays out params for speed, in place, and returns them: each `w` that is tall and large becomes a ColumnMajor."""
    return replace_leaves(lambda path, array: lay_out(array) if path[-1] == "w" else numpy.asarray(array), params)


def lay_out(w):
    w = numpy.asarray(w)
    is_tall = w.shape[0] > w.shape[1] and w.nbytes >= 4 << 20 and w.dtype.itemsize >= 4
    return ColumnMajor(w) if is_tall else w


class ColumnMajor:
    """Stands for w in `x @ w`. After N_READS single rows it switches to a copy of w in column order.

    Making the copy takes as long as it saves in 64 products of one row, so a short text does not pay for it. Measured
    on two cores with 124M: a token of a long text takes 11% less time.
    """

    __array_ufunc__ = None  # NumPy's arrays then leave `x @ w` to __rmatmul__ below

    def __init__(self, w):
        self.w, self.n_reads = w, 0

    def __array__(self, dtype=None, copy=None):
        return numpy.array(self.w, dtype, copy=copy)

    def __rmatmul__(self, x):
        self.n_reads += x.size == x.shape[-1]
        if self.n_reads == N_READS:
            self.w = numpy.asfortranarray(self.w)
        return x @ self.w


def keep_freed_memory():
    """Makes this process keep up to 62 MiB of the memory that it frees, and use it for the next arrays.

    By itself glibc returns freed memory to the system and gets it back page by page, which costs an eighth of the time
    of a prompt of 512 tokens. Its threshold adapts: it keeps twice the size of the largest array freed so far, if that
    is below 32 MiB (mallopt(3), M_MMAP_THRESHOLD; MALLOC_ variables overrule it). So one such array is freed here.
    """
    numpy.empty(31 << 20, numpy.uint8)
