"""The devices and processes of a training run: one device, or those of --mesh; one process, or those of --coordinator.

with joined(settings) as is_first:                       # process 0 is the first: it alone prints and writes files
    library = make_library(settings, params, hparams)     # the backend, or a sharding.Backend over a mesh
"""

import contextlib
import math
import sys

import backends

FLAGS = ("mesh", "coordinator", "n_processes", "process_id")
DIFFERENT = {"data", "out", *FLAGS} - {"mesh"}  # flags that need not be equal in all processes


def faults(s):
    """Pairs (whether settings s have this fault, its message)."""
    uneven = s.micro_batch_size is not None and (s.micro_batch_size == 0 or s.batch_size % s.micro_batch_size)
    yield uneven, f"--micro_batch_size {s.micro_batch_size} does not divide --batch_size {s.batch_size}"
    for name in ("mesh", "coordinator"):
        value = getattr(s, name)
        yield value and s.backend != "jax", f"--{name} {value} needs --backend jax: NumPy computes on one device"
    if s.coordinator or s.n_processes is not None or s.process_id is not None:
        from backends import processes  # here, as most runs have one process

        yield from processes.faults(s.coordinator, s.n_processes, s.process_id)


@contextlib.contextmanager
def joined(s):
    """Inside, the processes of settings s are connected (processes.joined) and the backend is set up. Yields whether
    this is the first process, which prints what computes."""
    together = contextlib.nullcontext(True)
    if s.coordinator:
        from backends import processes

        same = {name: value for name, value in vars(s).items() if name not in DIFFERENT}
        together = processes.joined(s.coordinator, s.n_processes, s.process_id, same)
    with together as is_first:
        description = backends.get(s.backend).setup(s.dtype)
        if is_first:
            print(description + f", {s.n_processes} processes" * bool(s.n_processes), file=sys.stderr)
        yield is_first


def make_library(s, params, hparams):
    """The backend of settings s: over the devices of --mesh, or, if that is left out, over all that JAX has, which then
    divide the batch. One device needs no mesh. Raises ValueError for a mesh that does not fit the devices, the heads or
    the batch."""
    library = backends.get(s.backend)
    if s.backend == "jax" and (s.mesh or jax_devices()[1] > 1):
        from backends import sharding

        library = sharding.Backend(sharding.make_mesh(s.mesh), params, hparams)
    n_rows, remainder = divmod(s.batch_size, library.N_DATA)
    if remainder:
        raise ValueError(
            f"--batch_size {s.batch_size} cannot be divided among {library.N_DATA} devices (data x fsdp): choose a "
            f"multiple of {library.N_DATA}, or another --mesh"
        )
    if s.micro_batch_size and n_rows % s.micro_batch_size:
        raise ValueError(f"--micro_batch_size {s.micro_batch_size} does not divide the {n_rows} windows of each device")
    return library


def choose_micro_batch_size(s, library):
    """--micro_batch_size, or four windows on a CPU, whose cache holds their activations, or all that a device has."""
    n_rows = s.batch_size // library.N_DATA
    on_cpu = s.backend != "jax" or jax_devices()[0] == "cpu"
    return s.micro_batch_size or (math.gcd(n_rows, 4) if on_cpu else n_rows)


def jax_devices():
    """(the kind of JAX's devices, such as "cpu"; their number)."""
    import jax

    return jax.default_backend(), jax.device_count()
