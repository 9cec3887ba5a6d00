"""JAX over many devices: which array is cut where, and the model's own functions on the parts.

    library = sharding.Backend(sharding.make_mesh("data=2,model=4"), params, hparams)
    params = library.asarray(params)             # each device gets its part; use library as you use backends.get("jax")

A mesh arranges the devices in a grid with named axes (here 2 x 4). Each axis divides something else:

    data     the rows of a batch: all devices have the same parameters, and their gradients are averaged
    fsdp     the rows too; besides, each device stores only a part of each parameter, and gets the other parts from the
             others when it needs them ("fully sharded data parallelism": Rajbhandari et al. 2020, "ZeRO", stage 3)
    model    the matrices ("tensor parallelism": Shoeybi et al. 2019, "Megatron-LM", section 3)

Tensor parallelism, on two devices. c_attn and c_fc are cut by columns: each device computes its own heads and its own
hidden numbers, from the same x. c_proj is cut by rows, as its rows multiply those heads and hidden numbers: each device
computes one term of the sum that a matrix product is. One psum (all-reduce) adds the terms:

              columns of q, k, v      rows of c_proj
    device 0  x -> heads 0 1 2   ->   term 0 \\
                                              psum, + bias -> x + ...     (mlp: the same with c_fc, gelu and c_proj)
    device 1  x -> heads 3 4 5   ->   term 1 /

wte is cut by rows: each device looks up the tokens whose rows it has, with zeros for the others, and a psum adds these
up. At the output each device computes the logits of its tokens, and they are gathered. So a forward pass has
2 n_layer + 1 all-reduces and one all-gather.

The functions of gpt2.py do not know of this. shard_map runs a function on each device with its parts, and there a
matrix that is cut by rows is an object that stands for w in `x @ w`: its product ends with the psum (class Rows). As
`linear` computes x @ w + b, the bias is added after the sum, once.
"""

import fnmatch
import functools
import math
from typing import NamedTuple

import jax
import numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from backends import jax_backend, parts

AXES = ("data", "fsdp", "model")  # neighbours, which have the fastest connections, are along the last one

# How "model" cuts a parameter. One that is not here is whole on each device.
CUTS = {
    "*.c_attn.[wb]": "columns of each third",  # q, k and v lie side by side: of each, the columns of the device's heads
    "*.c_fc.[wb]": "columns",
    "*.c_proj.w": "rows",
    "wte": "table",  # rows, of which the last device has some that are padding
    "*.c_[qkv].w": "columns",  # LLaMA, from here on
    "*.c_gate.w": "columns",
    "*.c_up.w": "columns",
    "*.c_down.w": "rows",
    "lm_head": "table",
}


# ---- The mesh ----


def make_mesh(text=""):
    """The mesh that `text` describes, such as "data=2,model=4"; "" puts all devices on data. Raises ValueError for an
    unknown axis, and for a number of devices that does not divide the number of those that there are."""
    devices, sizes = jax.devices(), {}
    for part in (text or f"data={len(devices)}").split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) == 0:
            raise ValueError(
                f"--mesh {text}: {part!r} is not data=N, fsdp=N or model=N, N from 1 on, each at most once"
            )
        sizes[name] = int(size)
    shape = [sizes.get(name, 1) for name in AXES]
    n, n_processes = math.prod(shape), jax.process_count()
    if n_processes > 1 and n != len(devices):
        raise ValueError(f"--mesh {text} has {n} devices: {n_processes} processes need all of theirs, {len(devices)}")
    if len(devices) % n:
        hint = "; XLA_FLAGS=--xla_force_host_platform_device_count=8 divides a CPU in 8" * (
            devices[0].platform == "cpu"
        )
        raise ValueError(f"--mesh {text} has {n} devices, JAX finds {len(devices)}: {divisors(len(devices))}{hint}")
    return jax.sharding.Mesh(numpy.reshape(devices[:n], shape), AXES)


def divisors(n):
    """What may divide n things, as text for an error."""
    return f"choose {', '.join(str(i) for i in range(1, n + 1) if n % i == 0)}"


# ---- The backend ----


class Cut(NamedTuple):
    """How a parameter is cut: one of CUTS or "whole", and the axes that model and fsdp cut, None for none."""

    kind: str = "whole"
    model: int | None = None
    fsdp: int | None = None
    n_rows: int = 0  # without the padding of a table

    def spec(self):
        """The name of the axis of the mesh that cuts each axis of the parameter, None for none."""
        names = {axis: name for axis, name in ((self.model, "model"), (self.fsdp, "fsdp")) if axis is not None}
        return P(*(names.get(axis) for axis in range(max(names, default=-1) + 1)))


class Backend:
    """backends/jax_backend.py over the devices of a mesh: what is not here is as there.

    `asarray` cuts parameters and distributes them. `to_numpy` collects them in the form that they had, so what is saved
    does not depend on the mesh. Both also take a tree that holds several trees of that form, as the state of an
    optimizer does. Of hparams, only the numbers of heads are used.
    """

    def __init__(self, mesh, params, hparams):
        self.mesh, self.N_MODEL = mesh, mesh.shape["model"]
        self.N_DATA = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch = tuple(name for name in ("data", "fsdp") if mesh.shape[name] > 1)  # what divides rows
        n_head = hparams.get("n_head_kv", hparams["n_head"])  # of which n_head is a multiple
        if n_head % self.N_MODEL:
            raise ValueError(f"--mesh model={self.N_MODEL} does not divide the {n_head} heads: {divisors(n_head)}")
        self.cuts = {}
        map_leaves(lambda name, leaf: self.cuts.update({name: self.find_cut(name, leaf.shape)}), params)

    def __getattr__(self, name):
        return getattr(jax_backend, name)

    def own(self, hparams):
        """hparams with the numbers of heads that each device has."""
        return hparams | {name: hparams[name] // self.N_MODEL for name in ("n_head", "n_head_kv") if name in hparams}

    def find_cut(self, name, shape):
        """The Cut of a parameter. fsdp cuts the longest axis that it divides and that model does not cut."""
        kind = next((k for pattern, k in CUTS.items() if self.N_MODEL > 1 and fnmatch.fnmatch(name, pattern)), "whole")
        model = {"whole": None, "rows": 0, "table": 0}.get(kind, len(shape) - 1)
        if kind in ("rows", "columns") and shape[model] % self.N_MODEL:
            raise ValueError(f"--mesh model={self.N_MODEL} does not divide the {shape[model]} {kind} of {name}")
        n_fsdp = self.mesh.shape["fsdp"]
        free = [axis for axis, size in enumerate(shape) if axis != model and size % n_fsdp == 0]
        fsdp = max(free, key=lambda axis: shape[axis], default=None) if n_fsdp > 1 else None
        return Cut(kind, model, fsdp, shape[0])

    def cut_of(self, name):
        """The Cut of a parameter by its name, or by "mean." and its name and the like in a tree of several trees."""
        return self.cuts.get(name) or self.cuts.get(name.partition(".")[2]) or Cut()

    def specs(self, params):
        return map_leaves(lambda name, _: self.cut_of(name).spec(), params)

    # ---- To the devices and back ----

    def asarray(self, tree):
        return map_leaves(self.distribute, tree)

    def to_numpy(self, tree):
        return map_leaves(self.collect, tree)

    def distribute(self, name, array):
        """A NumPy array -> one in the memory of the devices. A process reads the parts of its own devices only."""
        array, cut = numpy.asarray(array), self.cut_of(name)
        # Device after device, its columns of q, k and v.
        array = swap_columns(array, 3, self.N_MODEL) if cut.kind == "columns of each third" else array
        if cut.kind == "table":
            array = numpy.pad(array, ((0, -len(array) % self.N_MODEL), (0, 0)))
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, cut.spec()), array.__getitem__)

    def collect(self, name, array):
        """The inverse of distribute. All processes must call it, as each has only a part."""
        if not (array.is_fully_addressable or array.is_fully_replicated):
            array = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, P()))(array)
        array, cut = numpy.asarray(array), self.cut_of(name)
        array = swap_columns(array, self.N_MODEL, 3) if cut.kind == "columns of each third" else array
        return array[: cut.n_rows] if cut.kind == "table" else array

    def rows(self, read, shape):
        """A batch of `shape`, cut by rows. read(a slice) returns these rows; a process reads those of its devices."""
        sharding = NamedSharding(self.mesh, P(self.batch))
        return jax.make_array_from_callback(shape, sharding, lambda place: read(place[0]))

    # ---- Functions of all devices ----

    def over_devices(self, f, mean=False):
        """See numpy_backend.over_devices: each device calls f with its parts of params and its rows. `others` are trees
        of other parameters."""

        def on_each(params, rows, *others):
            others = map(self.on_device, others)
            if not mean:
                return f(self.on_device(params), rows, *others)
            # Each device's copy now counts as a parameter of its own, so JAX adds up the gradients of its rows alone.
            copies = map_leaves(lambda name, leaf: jax.lax.pcast(leaf, self.same_along(name), to="varying"), params)
            loss, gradients = f(copies, rows, *others)
            return self.mean("", loss), map_leaves(self.mean, gradients)

        def on_all(params, rows, *others):
            specs, *more = (self.specs(tree) for tree in (params, *others))
            places = {"in_specs": (specs, P(self.batch), *more), "out_specs": (P(), specs) if mean else P(self.batch)}
            return jax.shard_map(on_each, mesh=self.mesh, **places)(params, rows, *others)

        return on_all

    def mean(self, name, array):
        return jax.lax.psum(array, self.same_along(name)) / self.N_DATA

    def same_along(self, name):
        """The axes that divide rows, along which a parameter is the same. (The gradient of a part that fsdp has cut is
        the sum along fsdp already: see Part.gathered.)"""
        return tuple(axis for axis in self.batch if axis == "data" or self.cut_of(name).fsdp is None)

    def value_and_grad(self, f):
        """jax_backend.value_and_grad, inside over_devices. What fsdp has gathered is not kept for the backward pass,
        but gathered again."""
        if self.mesh.shape["fsdp"] > 1:
            f = jax.checkpoint(f, policy=lambda primitive, *_, **__: primitive is not jax.lax.all_gather_p)
        return jax.value_and_grad(lambda params, *rows: f(self.on_device(params), *rows))

    def on_device(self, params):
        """One device's arrays -> what stands for the params in the functions of gpt2.py."""
        return map_leaves(self.part, params)

    def part(self, name, array):
        kind, _, fsdp, n_rows = self.cut_of(name)
        if kind == "table":
            return parts.Table(array, fsdp, n_rows)
        if kind == "rows":
            return parts.Rows(array, fsdp)
        return array if fsdp is None else parts.Gathered(array, fsdp)


# ---- Inference ----


def spread(model, forward, mesh):
    """A Model of NumPy's -> the same Model over the devices of a mesh: params and the heads of the cache cut along
    model, the sequences of a batch along data. `forward` is that of its architecture, not compiled."""
    if mesh.shape["fsdp"] > 1:
        raise ValueError("--mesh fsdp divides training: choose data and model")
    settings = model.init_cache.keywords  # n_head, or config for a LLaMA
    library = Backend(mesh, model.params, settings.get("config", settings))
    own = {"config": library.own(settings["config"])} if "config" in settings else library.own(settings)

    def on_each(params, tokens, cache, position, last):
        return forward(library.on_device(params), tokens, cache, position, last, **own, jit=jax.jit)

    cache = P("model") if library.N_MODEL > 1 else P()  # of the heads, the first axis
    places = {"in_specs": (library.specs(model.params), P(), cache, P(), P()), "out_specs": (P(), cache)}
    step = jax.jit(jax.shard_map(on_each, mesh=mesh, **places), donate_argnums=2)
    empty = jax.jit(model.init_cache, static_argnums=1, out_shardings=NamedSharding(mesh, cache))
    library.vmap = functools.partial(vmap_along_data, mesh.shape["data"])
    return model._replace(params=library.asarray(model.params), forward=step, init_cache=empty, backend=library)


def vmap_along_data(n_data, f, in_axes):
    """jax.vmap of a function of all devices, which divide the rows of the batch if their number allows it."""

    def batch(*rows):
        n_rows = next(len(jax.tree.leaves(row)[0]) for row, axis in zip(rows, in_axes, strict=True) if axis == 0)
        return jax.vmap(f, in_axes, spmd_axis_name="data" if n_rows % n_data == 0 else None)(*rows)

    return batch


def map_leaves(f, tree):
    """The tree of f(name, leaf), with names such as blocks.0.attn.c_attn.w."""
    name_of = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: f(name_of(path), leaf), tree)


def swap_columns(array, n, m):
    """[..., n * m * size] columns, n groups of m -> m groups of n: the i-th of each group come to stand together."""
    return array.reshape(*array.shape[:-1], n, m, -1).swapaxes(-3, -2).reshape(array.shape)
