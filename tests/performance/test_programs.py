"""Compiled programs: how many JAX makes, what they are told, and that they are kept."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, oracle, random_params

import backends
from backends import np
from inference import kv_cache

jax = oracle("jax")


@pytest.fixture(scope="module")
def library():
    return backends.get("jax")


@pytest.fixture
def traced(monkeypatch):
    """A list of (the number of tokens, the capacity of the cache) for each program. The programs compute nothing: how
    many there are depends on shapes alone."""
    found = []

    def forward(params, tokens, cache, position, last=None, **_settings):
        found.append((len(tokens), cache[0][0].shape[-1]))
        return np.zeros_like(params["wte"][:, 0]) + position, cache

    monkeypatch.setattr(kv_cache, "forward", forward)
    kv_cache.forward_on.cache_clear()
    yield found
    kv_cache.forward_on.cache_clear()


def test_jax_compiles_one_program_per_bucket_and_one_for_decoding(golden, traced):
    params = backends.get("jax").asarray(golden["params"])
    for n_prompt in range(1, 45, 2):  # with 20 more, all fit into a cache of 64
        kv_cache.generate([5] * n_prompt, params, golden["hparams"]["n_head"], 20, "jax")
    assert sorted(n for n, _ in traced) == [1, 16, 32, 64], "the first serves both a prompt of one token and decoding"


def test_jax_traces_one_block_for_all(golden, monkeypatch):
    """Tracing is Python, and costs a start 0.1 s where each of twelve blocks is traced."""
    traced, block = [], kv_cache.transformer_block
    monkeypatch.setattr(kv_cache, "transformer_block", lambda *a, **k: traced.append(a[0].shape) or block(*a, **k))
    kv_cache.forward_on.cache_clear()
    kv_cache.generate([5] * 9, golden["params"], golden["hparams"]["n_head"], 3, "jax")
    kv_cache.forward_on.cache_clear()
    assert golden["hparams"]["n_layer"] > 1
    assert [n_seq for n_seq, _ in traced] == [16, 1], "one for the prompt, one for each token after it"


def test_larger_models_have_a_set_of_programs_for_each_cache_size(traced):
    """Caches have 64, 128, 256, 512, 768 or 1024 positions: to read 1024 for each token of a short text costs more."""
    params = backends.get("jax").asarray(random_params(n_ctx=1024, n_layer=1))
    for n_prompt in range(5, 1000, 34):
        kv_cache.generate([5] * n_prompt, params, 2, 4, "jax")
    assert len(traced) == len(set(traced))
    assert {n_cache for _, n_cache in traced} == {64, 128, 256, 512, 768, 1024}
    assert {n for n, _ in traced} == {1, 16, 64, 128, 256, 512}, "a long prompt passes through in parts of 512 tokens"


@pytest.mark.parametrize("told", [True, False])
def test_programs_are_not_handed_to_a_thread_unless_told_otherwise(told, library, monkeypatch):
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    monkeypatch.delenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", raising=False)
    if told:
        monkeypatch.setenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", "1")
    library.setup()
    assert jax.config.values["jax_cpu_enable_async_dispatch"] is told


@pytest.mark.parametrize("flags", ["", "--xla_cpu_enable_fast_math=false", "--xla_cpu_prefer_vector_width=128"])
def test_start_widens_vectors_unless_told_otherwise(flags, library, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    library.setup()
    library.setup()
    now = os.environ["XLA_FLAGS"]
    assert now.startswith(flags)
    assert now.count("xla_cpu_prefer_vector_width") == 1
    assert ("=512" in now) is ("=128" not in flags)


def test_the_compiler_hears_of_it(tmp_path):
    """It reads XLA_FLAGS once in a process: `start` must come in time."""
    program = "import backends, numpy; b = backends.get('jax'); b.setup(); b.jit(lambda x: x * x + x)(numpy.ones(4096))"
    environment = {"XLA_FLAGS": f"--xla_dump_to={tmp_path}", "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
    heard = [path.read_text() for path in tmp_path.glob("*.debug_options")]
    assert heard
    assert all("xla_cpu_prefer_vector_width: 512" in text for text in heard)
