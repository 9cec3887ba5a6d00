"""One device's parts of parameters: objects that stand for whole parameters in the functions of gpt2.py.

    linear(x, w=Rows(...), b=b)         x @ w + b: the products of all devices, added up; then the bias, once

sharding.py says how parameters are cut, and makes these objects inside shard_map, which runs a function on each device
with its parts. They multiply as jax_layout.Transposed does: gpt2.py says `x @ w` and `wte[ids]`, and the object knows
what that takes.
"""

from dataclasses import dataclass, field, replace

import jax


@dataclass
class Part:
    """One device's part of a parameter, which stands for the whole in a formula. `fsdp` is the axis that fsdp has cut,
    or None."""

    array: jax.Array
    fsdp: int | None = field(metadata={"static": True})

    def astype(self, dtype):
        return replace(self, array=self.array.astype(dtype))

    def gathered(self):
        """The parts of the devices along fsdp, joined. JAX derives the gradient: that of the joined array is summed
        over the devices, and each keeps its part (reduce-scatter)."""
        return self.array if self.fsdp is None else jax.lax.all_gather(self.array, "fsdp", axis=self.fsdp, tiled=True)


@jax.tree_util.register_dataclass
@dataclass
class Gathered(Part):
    """A parameter whose only cut that matters in a formula is that of fsdp."""

    def __jax_array__(self):  # what JAX calls for x @ w, x + b, g * x
        return self.gathered()

    def __getitem__(self, place):
        return self.gathered()[place]

    @property
    def T(self):
        return self.gathered().T


@jax.tree_util.register_dataclass
@dataclass
class Rows(Part):
    """Those rows of w that multiply the columns of x which this device has computed: the product is one term of the sum
    that x @ w is."""

    def __rmatmul__(self, x):
        return jax.lax.psum(x @ self.gathered(), "model")


@jax.tree_util.register_dataclass
@dataclass
class Table(Part):
    """Some rows of wte, in wte[ids] and x @ wte.T. The whole has n_vocab rows, and padding after them."""

    n_vocab: int = field(metadata={"static": True})

    def __getitem__(self, ids):
        rows = self.gathered()
        places = ids - jax.lax.axis_index("model") * len(rows)
        is_here = ((places >= 0) & (places < len(rows)))[..., None]
        return jax.lax.psum(jax.numpy.where(is_here, rows[places], 0), "model")

    @property
    def T(self):
        return Columns(self.array, self.fsdp, self.n_vocab)


@jax.tree_util.register_dataclass
@dataclass
class Columns(Table):
    """Table.T: each device computes the logits of its tokens, and they are gathered."""

    def __rmatmul__(self, x):
        logits = x @ self.gathered().T
        return jax.lax.all_gather(logits, "model", axis=x.ndim - 1, tiled=True, to="invarying")[..., : self.n_vocab]
