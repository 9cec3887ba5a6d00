"""What a backend does, in plain NumPy. Lay it beside jax_backend.py, the same names: here stands what they mean."""

import numpy


def start(dtype="float32"):
    """Readies this process for `dtype` and says in words what will compute."""
    keep_freed_memory()
    return f"NumPy {numpy.__version__}"


def keep_freed_memory():
    """Lets this process keep up to 62 MiB of what it frees, for the next array.

    By itself glibc hands most of it back and gets it anew, page by page: an eighth of the time that a prompt of 512
    tokens takes. But it learns: it keeps twice as much as the largest array freed so far, those above 32 MiB apart
    (mallopt(3), M_MMAP_THRESHOLD; MALLOC_ variables overrule it). So one is freed here.
    """
    numpy.empty(31 << 20, numpy.uint8)


def asarray(tree):
    """A nest of arrays, dicts, lists and tuples: the same nest with NumPy arrays, their dtypes unchanged."""
    return map_nest(numpy.asarray, tree)


def matrix(w):
    """An array w, [n_in, n_out], in the form that makes `x @ w` fastest, the only use it then has; x is [n_in] or
    [n_seq, n_in]. NumPy reads it as it is, unless it is tall and large: see Tall."""
    w = numpy.asarray(w)
    tall = w.shape[0] > w.shape[1] and w.nbytes >= 4 << 20 and w.dtype.itemsize >= 4
    return Tall(w) if tall else w


class Tall:
    """Stands for w in `x @ w`, a w of more rows than columns, too large to stay in the processor's cache.

    One token takes as long as the weights take to come from memory, and they come faster in long lines. So w is laid
    out by columns, once it has been read for 64 single rows: by then, going without has cost as much as the copy. A
    long text is written in nine tenths of the time, a first token loses nothing; the last bits may change.
    """

    __array_ufunc__ = None  # so that NumPy's arrays leave `x @ tall` to this class

    def __init__(self, w):
        self.w, self.n_read = w, 0

    def __array__(self, dtype=None, copy=None):
        return numpy.array(self.w, dtype, copy=copy)

    def __rmatmul__(self, x):
        self.n_read += x.size == x.shape[-1]
        if self.n_read == 64:
            self.w = numpy.asfortranarray(self.w)
        return x @ self.w


def table(rows):
    """An array of rows, likewise for `rows[ids]` and `x @ rows.T`."""
    return numpy.asarray(rows)


def map_nest(f, *nests):
    """A nest like each of `nests`, which are alike, with f(a leaf of each) at its leaves."""
    if isinstance(nests[0], dict):
        return {key: map_nest(f, *(nest[key] for nest in nests)) for key in nests[0]}
    if isinstance(nests[0], (list, tuple)):
        return type(nests[0])(map_nest(f, *parts) for parts in zip(*nests, strict=True))
    return f(*nests)


def to_numpy(tree):
    """A nest of this backend's arrays -> the same nest of NumPy arrays."""
    return asarray(tree)


def n_padded(n):
    """The length to which n tokens are padded before they are read: n, any length will do."""
    return n


def n_cache(n):
    """The number of positions to make room for where n are needed: n."""
    return n


def jit(f, donate_argnums=()):
    """f, to be called many times with arguments of the same shapes; of a donated argument only the result lives on.

    NumPy has nothing to compile. f must be pure: no result may depend on anything but the arguments.
    """
    return f


def vmap(f, in_axes=0):
    """f for one -> f for a batch: the arguments whose axis is 0 hold one per row, those with None serve all rows.

    No loop: each operation in f becomes one that does all rows at once. Arguments and results may be nests of arrays.
    """
    from backends import numpy_vmap

    return numpy_vmap.vmap(f, in_axes)


def update(buffer, new, start):
    """`buffer` with `new` written at the indices `start`, one for each axis. Go on with what is returned, only that.

    Here the buffer itself is written to, as no copy is needed then. Raises ValueError where `new` does not fit.
    """
    place = tuple(slice(i, i + n) for i, n in zip(start, new.shape, strict=True))
    if min(start) < 0 or buffer[place].shape != new.shape:
        raise ValueError(f"{list(new.shape)} numbers from {list(start)} on do not fit into {list(buffer.shape)}")
    buffer[place] = new
    return buffer


def value_and_grad(f):
    """f(params, ...) -> (f's value, its gradient: a nest shaped like params)."""
    from backends import numpy_grad

    return numpy_grad.value_and_grad(f)
