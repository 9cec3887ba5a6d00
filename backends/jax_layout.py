"""How matrices lie in memory on JAX, and the settings of its compiler. For speed only: results are the same, up to
rounding in the last bits."""

import os
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy

from weights.params import replace_leaves


def prepare(params):
    """Lays out params for speed, in place, and returns them as JAX arrays. On a CPU each matrix `w` becomes a
    Transposed, and `wte` and `lm_head` a Table."""
    forms = dict.fromkeys(["wte", "lm_head"], lambda rows: Table(to_device(rows))) | {"w": transposed}

    def lay_out(path, array):
        return forms.get(path[-1], to_device)(array) if transposing_pays(array) else to_device(array)

    return replace_leaves(lay_out, params)


def transposed(w):
    """The Transposed of w. A NumPy array in column order has its rows in memory already, so it is not copied."""
    in_columns = isinstance(w, numpy.ndarray) and w.flags.f_contiguous
    return Transposed(to_device(w.T) if in_columns else to_device(w).T)


def to_device(array):
    return jax.device_put(array, may_alias=True)


def transposing_pays(array):
    """True on a CPU, except for bfloat16, where a token would take a third longer."""
    return jax.default_backend() == "cpu" and array.dtype.itemsize >= 4


@jax.tree_util.register_dataclass
@dataclass
class Transposed:
    """Stands for w = rows.T in `x @ w`.

    One row of x, or one for each sequence of a batch, is small beside a matrix: the time goes into reading the matrix.
    On a CPU, XLA reads it fastest as the left factor, summed along its rows: one token then takes 7/8 of the time, one
    token for each of 16 sequences 3/4 (124M, two cores), for 0.2 s more when the model is loaded.
    """

    rows: jax.Array

    def __array__(self, dtype=None, copy=None):
        return numpy.asarray(self.rows.T, dtype)

    def __rmatmul__(self, x):
        if x.size > 128 * x.shape[-1]:  # with more rows than this, the usual order is faster
            return x @ self.rows.T
        # Without the barrier XLA would rewrite the product of a batch as x @ rows.T.
        return jax.lax.optimization_barrier(self.rows @ x.T).T


@jax.tree_util.register_dataclass
@dataclass
class Table:
    """Stands for rows in `rows[ids]` and `x @ rows.T`."""

    rows: jax.Array

    def __array__(self, dtype=None, copy=None):
        return numpy.asarray(self.rows, dtype)

    def __getitem__(self, ids):
        return self.rows[ids]

    @property
    def shape(self):
        return self.rows.shape

    @property
    def T(self):
        return Transposed(self.rows)


def configure():
    """Settings that make compiled programs faster, and kept on disk. Whatever the user has set stays as it is."""
    # By default XLA uses vectors of 256 bits on processors that have 512: a token then takes 3 to 8% longer.
    if "xla_cpu_prefer_vector_width" not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512".strip()
    # Each token is waited for before the next, so handing a program to another thread only costs time: 2% of a token.
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    # By default JAX keeps on disk only programs that took over a second to compile.
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "gpt2" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
