"""One code, two array libraries: `np` here is NumPy when it is handed NumPy arrays and jax.numpy when handed JAX ones.

NumPy arrays (from 2.0), JAX arrays, and tracers (the objects that JAX puts in the place of arrays while it compiles a
function) have a method `x.__array_namespace__()`, which returns the library that x belongs to. So the arrays decide
which library computes: there is no switch and no global variable, and both libraries work in one process. Methods and
operators (`x.reshape`, `x @ w`) belong to the array anyway.

A file that also says `import numpy` needs NumPy itself, whatever its arguments are: for token ids, random numbers, and
what backends/numpy_*.py compute.

Where a run is set up, the choice is explicit: `backend = backends.get("jax")`. Both backends have the same names.
"""

import functools
import importlib
import types

import numpy

NAMES = ("numpy", "jax")


@functools.lru_cache
def get(name):
    """The module that computes with `name`, "numpy" or "jax". Raises ValueError for any other, or if it is missing."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: choose {' or '.join(NAMES)}")
    try:
        return importlib.import_module(f"backends.{name}_backend")
    except ModuleNotFoundError as missing:
        raise ValueError(f"the {name} backend needs {missing.name}: python3 -m pip install jax") from None


def namespace_of(args):
    """The library of the first argument, inside lists too, that belongs to another library than NumPy; if there is
    none, NumPy."""
    for arg in args:
        if type(arg) is numpy.ndarray:  # found out below too, but not as fast
            continue
        if isinstance(arg, (list, tuple)):
            found = namespace_of(arg)
        else:
            found = arg.__array_namespace__() if hasattr(arg, "__array_namespace__") else numpy
        if found is not numpy:
            return found
    return numpy


class _Namespace:
    """`np.exp(x)` is `numpy.exp(x)` or `jax.numpy.exp(x)`, depending on x; `np.float32` and `np.pi` are NumPy's own."""

    def __getattr__(self, name):
        own = getattr(numpy, name)
        if isinstance(own, types.ModuleType):
            raise AttributeError(f"np.{name} is a part of NumPy that does not follow its arguments")
        if isinstance(own, type) or not callable(own):
            return own

        def follow(*args, **kwargs):
            return getattr(namespace_of(args), name)(*args, **kwargs)

        setattr(self, name, follow)  # looked up once, then an ordinary attribute
        return follow


np = _Namespace()


def update(buffer, new, start):
    """`update` of the backend that the arguments belong to: see numpy_backend.py."""
    library = namespace_of((buffer, new, start))
    if library is numpy:
        return get("numpy").update(buffer, new, start)
    return (library if hasattr(library, "update") else get("jax")).update(buffer, new, start)


def keeps_dtype(layer=None, *, compute=None):
    """Decorates a layer: its result gets the dtype of its first argument. Only bfloat16 needs it. (A batch inside
    NumPy's vmap also takes a short cut here.)

    float32 and float64 keep their dtype by themselves. For bfloat16 NumPy answers in float32, so the result is rounded
    back. compute="float32" also converts the argument first: bfloat16 has 8 significant bits, too few for long sums. It
    is for layers of [..., n] arrays, whose result has the same shape.
    """
    if layer is None:
        return functools.partial(keeps_dtype, compute=compute)

    @functools.wraps(layer)
    def wrapped(x, *args, **kwargs):
        # A tracer of numpy_vmap.py or numpy_grad.py may know a way to do a whole layer at once.
        if compute and hasattr(x, "apply_layer") and (y := x.apply_layer(wrapped, args, kwargs)) is not None:
            return y
        if x.dtype.itemsize != 2:
            return layer(x, *args, **kwargs)
        return layer(x if compute is None else x.astype(compute), *args, **kwargs).astype(x.dtype)

    return wrapped
