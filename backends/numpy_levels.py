"""What numpy_vmap.py and numpy_grad.py share: tracers, the objects that a transform puts in the place of arrays.

vmap(f) and value_and_grad(f) call f with tracers. A tracer has a shape, a dtype, operators and methods like an array,
so f does not notice; but each operation on it comes to `call` below, and the transform does more than compute: vmap
does the operation for all rows of a batch, value_and_grad remembers how the result was computed.

Transforms nest, as in vmap(value_and_grad(f)): then a tracer holds tracers. To keep them apart each call of a transform
has a level, a number larger than those of the transforms around it. An operation belongs to the highest level among its
arguments. Its rule unwraps the tracers of that level and does the operation on what they hold, which may again be
tracers, of lower levels; in the end there are NumPy arrays. JAX's own transforms work in this way.
"""

import functools
import itertools
import math
import operator

import numpy  # NumPy itself; np, below, follows its arguments

from backends import np, update

new_level = itertools.count(1).__next__


def call(name, *args, **kwargs):
    """The operation `name` on arrays and tracers: a function of NumPy, or one of PLAIN and COMPOSED below."""
    tracer = highest(args)
    if tracer is None:
        return plain(name)(*args, **kwargs)
    if name in COMPOSED:
        return COMPOSED[name](*args, **kwargs)
    return tracer.apply(name, args, kwargs)


def plain(name):
    """The function that does an operation on arrays."""
    return PLAIN.get(name) or getattr(numpy, name)


def highest(args):
    """The tracer of the highest level in a nest of lists and tuples, or None."""
    top = None
    for arg in args:
        found = highest(arg) if isinstance(arg, (list, tuple)) else arg
        if isinstance(found, Tracer) and (top is None or found.level > top.level):
            top = found
    return top


def map_args(f, args):
    """A nest of lists and tuples with f(leaf) in the place of each leaf."""
    return type(args)([map_args(f, arg) if isinstance(arg, (list, tuple)) else f(arg) for arg in args])


class Namespace:
    """The library that a tracer belongs to, as NumPy is an array's: `np.exp(tracer)` is `call("exp", tracer)`."""

    def __getattr__(self, name):
        setattr(self, name, functools.partial(call, name))  # looked up once, then an ordinary attribute
        return getattr(self, name)


class Tracer:
    """Stands for an array while a transform runs. A subclass adds `shape` and `apply(name, args, kwargs)`."""

    __slots__ = ("level", "value")
    __array_ufunc__ = None  # so that NumPy's arrays leave `array + tracer` to the operators of this class
    namespace = Namespace()
    dtype = property(lambda self: self.value.dtype)
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    T = property(lambda self: np.transpose(self))
    mT = property(lambda self: np.swapaxes(self, -1, -2))

    def __array_namespace__(self, api_version=None):
        return self.namespace

    def __repr__(self):
        return f"{type(self).__name__}({self.dtype}{list(self.shape)})"

    def __len__(self):
        return len(numpy.broadcast_to(0, self.shape))

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def reshape(self, *shape):
        return np.reshape(self, shape[0] if len(shape) == 1 else shape)

    def __setitem__(self, index, value):
        raise TypeError("an array inside vmap or value_and_grad cannot be assigned to: use np.where or backends.update")

    def no_value(self, *_args, **_kwargs):
        raise TypeError(
            f"{self} has no value that Python or NumPy itself could see: it stands for an array inside vmap or "
            "value_and_grad. Use np.where, `from backends import np`, and pass an array that it indexes as an argument"
        )

    __array__ = __bool__ = __int__ = __float__ = __index__ = no_value


METHODS = ["sum", "mean", "max", "min", "any", "all", "argmax", "argmin", "cumsum", "swapaxes", "astype"]
OPERATORS = {"getitem": "getitem", "neg": "negative", "abs": "absolute", "invert": "invert", "lt": "less",
             "gt": "greater", "le": "less_equal", "ge": "greater_equal", "eq": "equal", "ne": "not_equal"}  # fmt: skip
BINARY = {"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide",
          "mod": "remainder", "pow": "power", "matmul": "matmul", "and": "bitwise_and", "or": "bitwise_or",
          "xor": "bitwise_xor", "lshift": "left_shift", "rshift": "right_shift"}  # fmt: skip

for _method, _name in [(name, name) for name in METHODS] + [(f"__{op}__", name) for op, name in OPERATORS.items()]:
    setattr(Tracer, _method, lambda *args, _name=_name, **kwargs: call(_name, *args, **kwargs))
for _method, _name in BINARY.items():
    setattr(Tracer, f"__{_method}__", lambda x, y, _name=_name: call(_name, x, y))
    setattr(Tracer, f"__r{_method}__", lambda x, y, _name=_name: call(_name, y, x))


# ---- Operations that are made of others, the same for every transform ----


def mean(x, axis=None, keepdims=False):
    total = np.sum(x, axis=axis, keepdims=keepdims)
    return total / (x.size // total.size)


def asarray(x, dtype=None):
    x = stack(x) if isinstance(x, (list, tuple)) else x
    return x if dtype is None else np.astype(x, dtype)


def stack(arrays, axis=0):
    return np.concatenate([np.expand_dims(x, axis) for x in arrays], axis=axis)


def expand_dims(x, axis):
    i = axis % (x.ndim + 1)
    return np.reshape(x, (*x.shape[:i], 1, *x.shape[i:]))


def split(x, parts, axis=0):
    """`parts` is how many, of equal length, or a list of where the second, the third, ... begins."""
    n, before = x.shape[axis], (slice(None),) * (axis % x.ndim)
    if isinstance(parts, int) and n % parts:
        raise ValueError(f"np.split: {n} does not divide into {parts} equal parts")
    starts = range(0, n, n // parts) if isinstance(parts, int) else [0, *parts]
    return [x[(*before, slice(start, end))] for start, end in zip(starts, [*starts[1:], n], strict=True)]


def matmul(x, w):
    """Makes it a product of matrices: a vector is one row or one column; many rows times one matrix are one product.
    A tuple stands for a matrix that knows its own product, as a sum of several (training/lora.py)."""
    if isinstance(w, tuple):
        return w.__rmatmul__(x)
    n_axes = w.ndim
    if n_axes == 1:
        return (x @ w.reshape(-1, 1)).reshape(x.shape[:-1])
    if n_axes == 2 and x.ndim != 2:
        return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], -1)
    if x.ndim == 1:
        return (x.reshape(1, -1) @ w).reshape(*w.shape[:-2], -1)
    return highest([x, w]).apply("matmul", (x, w), {})


def take_along_axis(x, indices, axis):
    """x[index], where all axes but one are read in step with the indices."""
    index = [*numpy.indices(x.shape, sparse=True)]  # arange(n) along each axis
    index[axis] = indices
    return call("getitem", x, tuple(index))


def take(x, indices, axis):
    """x[indices] along an axis. Unlike x[indices], it accepts a NumPy array x with traced indices."""
    return call("getitem", x, (*(slice(None),) * (axis % x.ndim), indices))


COMPOSED = {f.__name__: f for f in (mean, asarray, stack, expand_dims, split, matmul, take, take_along_axis)}
COMPOSED["clip"] = lambda x, low, high: np.minimum(np.maximum(x, low), high)
PLAIN = {"getitem": operator.getitem, "update": update, "astype": lambda x, dtype: x.astype(dtype)}  # not NumPy's own
