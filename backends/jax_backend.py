"""What a backend does, in JAX. Lay it beside numpy_backend.py, the same names: there stands what they mean."""

import os
from dataclasses import dataclass
from pathlib import Path

import jax

from backends import numpy_backend


def start(dtype="float32"):
    """Readies this process for `dtype` and says in words what will compute.

    float64 is off in JAX unless asked for. Compiled programs are kept on disk for the next process, all of them (JAX by
    itself keeps those that took over a second), unless JAX_COMPILATION_CACHE_DIR names another place.
    """
    numpy_backend.keep_freed_memory()
    # By itself XLA computes with vectors of 256 bits on processors that have 512: a token then takes 3 to 8% longer.
    if "xla_cpu_prefer_vector_width" not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512".strip()
    # Each token is waited for before the next, so handing a program to another thread only costs time: 2% of a token.
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "gpt2" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise OSError(
            f"JAX finds no device (JAX_PLATFORMS={platforms!r}): {str(error).partition(chr(10))[0]}"
        ) from None
    return f"JAX {jax.__version__} on {device.device_kind} ({device.platform}){', 64 bits on' * (dtype == 'float64')}"


def asarray(tree):
    """A nest of arrays, dicts, lists and tuples: the same nest with JAX arrays, their dtypes unchanged.

    On a CPU they may be the same memory: do not change the NumPy ones later. Raises ValueError for 64-bit numbers while
    JAX has 64 bits switched off: it would halve them without a word.
    """
    for leaf in jax.tree.leaves(tree):
        if getattr(leaf, "dtype", None) == "float64" and not jax.config.jax_enable_x64:
            raise ValueError("float64 on JAX needs jax.config.update('jax_enable_x64', True) first")
    return jax.tree.map(lambda leaf: jax.device_put(leaf, may_alias=True), tree)


def matrix(w):
    """An array w, [n_in, n_out], in the form that makes `x @ w` fastest, the only use it then has; x is [n_in] or
    [n_seq, n_in]."""
    return Transposed(asarray(w).T) if transposing_pays(w) else asarray(w)


def table(rows):
    """An array of rows, likewise for `rows[ids]` and `x @ rows.T`."""
    return Table(asarray(rows)) if transposing_pays(rows) else asarray(rows)


def transposing_pays(array):
    """Whether a Transposed is faster: on a CPU, but not in bfloat16, where a token would take a third longer."""
    return jax.default_backend() == "cpu" and array.dtype.itemsize >= 4


@jax.tree_util.register_dataclass
@dataclass
class Transposed:
    """Stands for rows.T in `x @ rows.T`.

    A single x, or one for each text of a batch, is nothing beside a matrix: the time goes into reading the matrix. On a
    CPU, XLA does that best where it is the left factor and its rows are what is summed over: one token then takes 7/8
    of the time, one for each of 16 texts 3/4, for 0.2 s more at the start (124M, two cores).
    """

    rows: jax.Array

    def __rmatmul__(self, x):
        if x.size > 128 * x.shape[-1]:  # so many rows of one text are faster the usual way
            return x @ self.rows.T
        # Without the barrier XLA would turn a batch's product round again, to x @ rows.T.
        return jax.lax.optimization_barrier(self.rows @ x.T).T


@jax.tree_util.register_dataclass
@dataclass
class Table:
    """Stands for rows in `rows[ids]` and `x @ rows.T`."""

    rows: jax.Array

    def __getitem__(self, ids):
        return self.rows[ids]

    @property
    def T(self):
        return Transposed(self.rows)


def to_numpy(tree):
    """A nest of this backend's arrays -> the same nest of NumPy arrays."""
    return jax.tree.map(jax.device_get, tree)


def n_padded(n):
    """The length to which n tokens are padded before they are read: 1, or the next of 16, 32, 64, ...

    Each length is a program of its own, and compiling one takes longer than reading a few tokens in vain.
    """
    return 1 if n == 1 else max(16, 1 << (n - 1).bit_length())


def n_cache(n):
    """The number of positions to make room for where n are needed: the next of 64, 128, 256, 512, 768, 1024, ..."""
    return max(64, 1 << (n - 1).bit_length()) if n <= 256 else -(-n // 256) * 256


def jit(f, donate_argnums=()):
    """f, to be called many times with arguments of the same shapes; of a donated argument only the result lives on.

    JAX calls f once with tracers, compiles what they went through, and from then on runs that: once for each new shape.
    """
    return jax.jit(f, donate_argnums=donate_argnums)


def vmap(f, in_axes=0):
    """f for one -> f for a batch: the arguments whose axis is 0 hold one per row, those with None serve all rows.

    No loop: each operation in f becomes the one that does all rows at once.
    """
    return jax.vmap(f, in_axes=in_axes)


def scan(f, carry, rows):
    """A loop in which each round hands `carry` to the next: carry, y = f(carry, row) for each row of the tree `rows`,
    whose arrays are cut along axis 0. Returns (the last carry, the y stacked).

    f is traced and compiled once, however many rows there are, and each round uses the memory of the one before.
    """
    return jax.lax.scan(f, carry, rows)


def update(buffer, new, start):
    """`buffer` with `new` written at the indices `start`, one for each axis. Go on with what is returned, only that.

    JAX arrays never change: this is a new one, made in the old one's place if that was donated. A start so large that
    `new` would not fit is moved back without a word: check before.
    """
    return jax.lax.dynamic_update_slice(buffer, new, start)


def value_and_grad(f):
    """f(params, ...) -> (f's value, its gradient: a nest shaped like params)."""
    return jax.value_and_grad(f)
