"""The caches of a batch: arrays with a batch axis, [n_slots, ...], and what is done with them between steps.

`cache` is the cache of all slots; `row` that of one sequence, without the batch axis. Each function returns a new one,
but on NumPy write_row writes into the old one.
"""

import functools
import itertools

from backends import np, update
from inference.model import n_positions
from weights.params import tree_map


def init_caches(model, n_slots, n_tokens):
    """An empty cache for each slot, of at least n_tokens. Every slot reads its whole cache in each step, so a short one
    is shorter than that of one sequence."""
    return repeat(model.init_cache(model.params, capacity(model, n_tokens)), n_slots)


def capacity(model, n_tokens):
    """The number of positions of a batch's cache that needs n_tokens."""
    return min(model.n_ctx, model.backend.bucket_length(n_tokens), model.backend.cache_capacity(n_tokens))


def capacities(model, n_tokens):
    """Few numbers of positions up to n_tokens: 64, 128, 256, ... A cache of one of these lengths is at most twice as
    long as needed, and on JAX each length is a program."""
    longest = capacity(model, n_tokens)
    return (*itertools.takewhile(lambda n: n < longest, (64 << i for i in itertools.count())), longest)


def repeat(row, n_slots):
    """The cache of one sequence -> of n_slots equal ones."""
    return tree_map(lambda array: np.stack([array] * n_slots), row)


def write_row(cache, row, slot):
    """`cache` with `row` in a slot. Positions of the row that the cache has no room for are left out."""
    n = n_positions(cache)
    row = [(keys[..., :n], values[..., :n, :]) for keys, values in row]
    return tree_map(lambda array, new: update(array, new[None], (slot, 0, 0, 0)), cache, row)


def read_row(cache, slot):
    """A copy of the row in a slot."""
    return tree_map(lambda array: np.copy(array[slot]), cache)


def reorder(cache, slots):
    """A cache whose row i is row slots[i] of `cache`."""
    return tree_map(lambda array: array[slots], cache)


def resize(cache, n):
    """A copy of a cache or a row with room for n positions; what is beyond is cut off."""

    def along(axis, array):
        missing = n - array.shape[axis]
        widths = [(0, max(missing, 0) * (i == array.ndim + axis)) for i in range(array.ndim)]
        return np.pad(array, widths) if missing > 0 else np.copy(array[..., :n] if axis == -1 else array[..., :n, :])

    return [(along(-1, keys), along(-2, values)) for keys, values in cache]


@functools.lru_cache
def compiled(f, library, donate=(), **static):
    return library.jit(functools.partial(f, **static), donate_argnums=donate)
