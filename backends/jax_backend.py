"""The operations of a backend in JAX. Read it beside numpy_backend.py, which has the same names in the same order and
says what each one means."""

import os

import jax

from backends import jax_layout, numpy_layout
from backends.jax_layout import prepare

__all__ = ["prepare"]  # lays out the matrices of a model for speed, in place: see jax_layout.py
COMPILES = True  # whether each new combination of shapes costs the compilation of a program
N_DATA = N_MODEL = 1  # devices that divide the rows of a batch, and the matrices: sharding.py has more
ROW_COSTS = {1: 1.0, 8: 1.5}  # few entries, as each number of rows is a program


def setup(dtype="float32"):
    """Prepares this process to compute in `dtype`. Returns a description of what will compute.

    JAX computes in 64 bits only if that is switched on, for the whole process. Raises OSError if it finds no device.
    """
    numpy_layout.keep_freed_memory()
    jax_layout.configure()
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition("\n")[0]
        raise OSError(f"JAX finds no device (JAX_PLATFORMS={platforms!r}): {reason}") from None
    return f"JAX {jax.__version__} on {device.device_kind} ({device.platform}){', 64 bits on' * (dtype == 'float64')}"


def asarray(tree):
    """A tree of arrays -> the same tree with JAX arrays, dtypes unchanged.

    On a CPU they may share the memory of the NumPy arrays: do not change those later. Raises ValueError for float64
    while JAX has 64 bits switched off, as it would convert to float32 without a warning.
    """
    for leaf in jax.tree.leaves(tree):
        if getattr(leaf, "dtype", None) == "float64" and not jax.config.jax_enable_x64:
            raise ValueError("float64 on JAX needs jax.config.update('jax_enable_x64', True) first")
    return jax.tree.map(jax_layout.to_device, tree)


def to_numpy(tree):
    """A tree of this backend's arrays -> the same tree with NumPy arrays."""
    return jax.tree.map(jax.device_get, tree)


def bucket_length(n):
    """The length to which a prompt of n tokens is padded: 1, or the next of 16, 32, 64, ...

    Each length is a program of its own, and compiling one takes longer than computing a few tokens of padding.
    """
    return 1 if n == 1 else max(16, 1 << (n - 1).bit_length())


def cache_capacity(n):
    """The number of positions of a cache that needs n: the next of 64, 128, 256, 512, 768, 1024, ..."""
    return max(64, 1 << (n - 1).bit_length()) if n <= 256 else -(-n // 256) * 256


def jit(f, donate_argnums=()):
    """f, compiled. JAX calls f once with tracers, which have a shape and a dtype but no values, records what f does
    with them, compiles that, and runs the compiled program from then on: one program for each new combination of
    shapes."""
    return jax.jit(f, donate_argnums=donate_argnums)


def vmap(f, in_axes=0):
    """f for one example -> f for a batch, without a loop: each operation in f becomes one that computes all rows."""
    return jax.vmap(f, in_axes=in_axes)


def sum_over(f, rows):
    """See numpy_backend.sum_over. f is traced and compiled once, however many rows there are, and each row is computed
    in the memory of the one before."""

    def add(total, row):
        return jax.tree.map(jax.numpy.add, total, f(row)), None

    result = jax.eval_shape(f, jax.tree.map(lambda leaf: leaf[0], rows))
    return jax.lax.scan(add, jax.tree.map(jax.numpy.zeros_like, result), rows)[0]


def own(hparams):
    """See numpy_backend.own."""
    return hparams


def rows(read, shape):
    """See numpy_backend.rows."""
    return read(slice(None))


def over_devices(f, mean=False):
    """See numpy_backend.over_devices: f itself, as this is JAX on one device."""
    return f


def tune(step):
    """step itself: JAX manages its own threads."""
    return step


def update(buffer, new, start):
    """`buffer` with `new` written at the indices `start`, one for each axis. Use only what is returned.

    JAX arrays never change: this is a new array, made in the memory of the old one if that was donated. JAX moves a
    start so large that `new` would not fit, without an error: check lengths before.
    """
    start = [jax.numpy.asarray(i, jax.numpy.int32) for i in start]  # of one type, whatever the type of the position
    return jax.lax.dynamic_update_slice(buffer, new, start)


def value_and_grad(f):
    """A function of the same arguments that returns (the value of f, its gradient with regard to the first argument, a
    tree like that argument)."""
    return jax.value_and_grad(f)
