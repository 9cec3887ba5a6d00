"""Memory: what is shared, what is given back, and what is kept for the next arrays."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, model_of, oracle, random_params

import backends
import utils
from inference import kv_cache, slot_caches

jax = oracle("jax")


@pytest.fixture(scope="module")
def library():
    return backends.get("jax")


def test_asarray_shares_the_bytes_of_the_file(storyteller, library):
    """A copy would take as much memory again. A CPU shares arrays that begin at a multiple of 64 bytes."""
    if jax.default_backend() != "cpu":
        pytest.skip("only a CPU shares its memory")
    mapped = jax.tree.leaves(storyteller[2])
    there = jax.tree.leaves(library.asarray(storyteller[2]))
    assert [array.unsafe_buffer_pointer() for array in there] == [array.ctypes.data for array in mapped]


def test_prepare_gives_the_memory_of_what_it_copies_back(tmp_path):
    """A model of 6 GB would need 10 otherwise."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or jax.default_backend() != "cpu":
        pytest.skip("looks at /proc, and for copies that are made on a CPU")
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    hparams = {"n_vocab": 512, "n_ctx": 96, "n_embd": 160, "n_head": 4, "n_layer": 3}  # each matrix above 64 KiB
    utils.save_model(tmp_path, hparams, random_params(**hparams), ["tf"])

    def n_mapped():
        return sum(line.endswith(str(tmp_path / utils.DATA)) for line in maps.read_text(encoding="utf-8").splitlines())

    _, hparams, params = utils.load_folder(tmp_path)
    n_tensors, n_matrices = n_mapped(), 4 * hparams["n_layer"]
    assert n_tensors > n_matrices
    held = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert held.count(str(tmp_path / utils.DATA)) <= n_matrices + 3, "a process may have 256 files open, or 1024"
    library = backends.get("jax")
    model = kv_cache.make_model(library.prepare(params), hparams, library)
    jax.block_until_ready(model.params)
    assert n_mapped() <= n_tensors - n_matrices


FREED_AND_TAKEN_AGAIN = """
import resource, sys, numpy, backends
backends.get(sys.argv[1]).setup()
faults = []
for _ in range(3):
    arrays = [numpy.ones(3 << 20, numpy.uint8) for _ in range(8)]  # 24 MiB; each too small for a large page of memory
    del arrays
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is known to give memory back and get it anew")
@pytest.mark.parametrize("name", backends.NAMES)
def test_memory_that_was_freed_is_used_again(name):
    """Got anew from the system, 24 MiB are 6,144 pages of 4 KiB, each cleared first."""
    command = [sys.executable, "-c", FREED_AND_TAKEN_AGAIN, name]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600


def test_numpy_writes_into_the_one_cache_and_copies_none(golden):
    params, n_head = golden["params"], golden["hparams"]["n_head"]
    cache = kv_cache.init_cache(params, 8, n_head=n_head)
    filled = kv_cache.forward(params, [1, 2], cache, 0, n_head=n_head)[1]
    for (keys, values), same in zip(cache, filled, strict=True):
        assert same[0] is keys
        assert same[1] is values
        assert (keys.shape, values.shape) == ((4, 12, 8), (4, 8, 12))
        for array in (keys.mT, values):
            assert np.abs(array[:, :2]).min() > 0
            assert np.abs(array[:, 2:]).max() == 0
    assert len(cache) == 3


@pytest.mark.parametrize("backend", backends.NAMES)
def test_a_batch_has_the_room_it_needs_and_little_more(backend):
    """Each row reads its whole cache for each token. On JAX each size is a program, so there are few."""
    model, sizes = model_of(random_params(n_ctx=1024, n_layer=1), 2, backend), set()
    for n_tokens in range(1, 1025):
        ((keys, _),) = slot_caches.init_caches(model, 2, n_tokens)
        assert n_tokens <= keys.shape[-1] <= max(16, min(2 * n_tokens, n_tokens + 255))
        sizes.add(keys.shape[-1])
    few = [1, 16, 32, 64, 128, 256, 512, 768, 1024]
    assert sorted(sizes) == (few if backend == "jax" else list(range(1, 1025)))


def test_memory_grows_by_the_cache_and_little_else():
    """A process of its own, whose peak the operating system knows."""
    import subprocess
    import sys

    code = """
import sys
sys.path[:0] = ["tests"]
from tools.bench import peak_memory
from conftest import model_of, random_params
from inference.generate import Sequence, generate
params = random_params(n_vocab=512, n_ctx=1024, n_embd=256, n_head=4, n_layer=8)
import encoder
words = encoder.get_encoder("gpt2_random", "tests/golden")
model = model_of(params, 4)
list(generate(model, Sequence(words, [1], 5)))
before = peak_memory()
list(generate(model, Sequence(words, [1], 1001)))
print(peak_memory() - before - 8 * 2 * 1002 * 256 * 4)
"""
    if sys.platform != "linux":
        pytest.skip("elsewhere the peak is not reset when a process starts another")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20e6
