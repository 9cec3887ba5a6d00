"""Many texts at once. Reading a weight from memory costs the same for one row as for many, so where vmap is more than a
loop, on JAX, sixteen texts take about twice the time of one.

    finish(model, rows)

Each row has its own prompt, place and end. The prompts are padded on the right to one length; that rows stand at
different positions needs no further thought, as `position` is an argument and vmap gives each row its own. What the
padding left in a row's cache lies behind its position, out of sight, and is overwritten as the row gets there.
"""

import functools

import numpy

from backends import np
from inference.kv_cache import map_cache


@functools.lru_cache
def batched(forward, backend):
    """model.forward for a batch: params for all; tokens, cache, position and last for each row."""
    return backend.jit(backend.vmap(forward, in_axes=(None, 0, 0, 0, 0)), donate_argnums=(2,))


def start(model, n_rows, n_tokens):
    """An empty cache for each of n_rows, of at least n_tokens."""
    n_cache = min(model.n_ctx, model.backend.n_padded(n_tokens), model.backend.n_cache(n_tokens))
    cache = model.new_cache(model.params, n_cache)
    return repeat(cache, n_rows)


def repeat(cache, n_rows):
    """One text's cache -> n_rows rows of it: an axis more for each array, in front."""
    return map_cache(lambda array: np.stack([array] * n_rows), cache)


def read(model, tokens, cache, position):
    """kv_cache.read for a batch: a list of tokens and a position for each row."""
    longest = max(map(len, tokens))
    n_padded = min(model.backend.n_padded(longest), cache[0][0].shape[-1] - max(position))
    padded = numpy.zeros((len(tokens), n_padded), numpy.int32)
    for row, some in zip(padded, tokens, strict=True):
        row[: len(some)] = some
    last = numpy.array([len(some) - 1 for some in tokens], numpy.int32)
    forward = batched(model.forward, model.backend)
    return forward(model.params, padded, cache, numpy.array(position, numpy.int32), last)


def finish(model, rows):
    """Generates for all rows until each has stopped. Each has an id at least, and n_ctx has room for what it wants."""
    rows = [row for row in rows if row.stop_reason is None]
    if not rows:
        return
    position = [0] * len(rows)
    cache = start(model, len(rows), max(len(row.ids) + row.n_tokens_to_generate for row in rows))
    tokens = [row.ids[:] for row in rows]
    while not all(row.stop_reason for row in rows):
        logits, cache = read(model, tokens, cache, position)
        for i, (row, its_logits) in enumerate(zip(rows, model.backend.to_numpy(logits), strict=True)):
            if row.stop_reason is None:  # a row that has stopped stands still, and what it computes is not looked at
                row.take(its_logits)
                tokens[i], position[i] = row.ids[-1:], position[i] + len(tokens[i])
