"""The cost of each line of a model's source, in operations and in bytes, counted while the line computes.

    costs = count(gpt2, lambda params: gpt2.gpt2(ids, **params, n_head=n_head), params)
    costs[80]       # Cost(operations=..., bytes=..., times=...) of line 80

The params are arrays that count (a subclass of NumPy's array), and so is everything that is computed from them. NumPy
hands each of their operations to `__array_ufunc__` or `__array_function__`, which adds its cost to the line of the file
that asked for it. An operation is one addition, multiplication, comparison or function such as exp; the matrix product
of [n, m] and [m, k] is 2*n*m*k of them. Bytes are those of the arrays that an operation reads and writes. Both are what
the lines ask for: what stays in a processor's cache between two operations counts twice.
"""

import collections
import sys
from typing import NamedTuple

import numpy

from weights.params import tree_map

CONTRACTIONS = (numpy.matmul, numpy.vecdot) if hasattr(numpy, "vecdot") else (numpy.matmul,)


class Cost(NamedTuple):
    operations: int
    bytes: int
    times: int  # how many operations of NumPy


def count(module, run, params):
    """{line: Cost} of run(params)."""
    found = collections.defaultdict(lambda: Cost(0, 0, 0))

    def add(operations, n_bytes):
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != module.__file__:
            frame = frame.f_back
        if frame is not None:
            before = found[frame.f_lineno]
            found[frame.f_lineno] = Cost(before[0] + operations, before[1] + n_bytes, before[2] + 1)

    class Counting(numpy.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
            inputs = plain(inputs)
            result = getattr(ufunc, method)(*inputs, **plain(kwargs))
            if ufunc in CONTRACTIONS:
                operations = 2 * result.size * inputs[0].shape[-1]
            else:
                operations = inputs[0].size if method == "reduce" else result.size
            add(operations, moved(inputs, result))
            return counting(result)

        def __array_function__(self, function, types, args, kwargs):
            result = function(*plain(args), **plain(kwargs))
            if isinstance(result, (list, tuple)):  # np.split: parts of the same memory
                return type(result)(map(counting, result))
            if not any(share_memory(result, part) for part in plain(args)):
                add(result.size if function is numpy.where else 0, moved(plain(args), result))
            return counting(result)

        def __getitem__(self, key):
            part = super().__getitem__(key)
            if is_array(part) and not share_memory(part, self):  # rows by their ids are copied
                add(0, 2 * part.nbytes)
            return part

        def reshape(self, *shape):
            result = super().reshape(*shape)
            if not share_memory(result, self):  # its numbers lie in another order
                add(0, 2 * self.nbytes)
            return result

    def counting(value):
        return value.view(Counting) if is_array(value) else value

    run(tree_map(counting, params))
    return dict(found)


def is_array(value):
    return isinstance(value, numpy.ndarray)


def share_memory(a, b):
    return is_array(a) and is_array(b) and numpy.may_share_memory(plain(a), plain(b))


def plain(values):
    """The same arguments with NumPy's own arrays."""
    if isinstance(values, dict):
        return {name: plain(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(map(plain, values))
    return values.view(numpy.ndarray) if is_array(values) else values


def moved(inputs, result):
    """The bytes that an operation reads and writes."""
    return sum(part.nbytes for part in (*inputs, result) if is_array(part))
