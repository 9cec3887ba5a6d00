"""The same code on JAX: eager, jitted, batched, differentiated, and never by way of NumPy."""

import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, cast, oracle, random_params

import backends
import gpt2
from inference import kv_cache
from weights import params as params_module
from weights.params import flatten

jax = oracle("jax")

STORY_PROMPTS = """Once upon a time|One day, a boy named Tim|The cat sat|Lily saw a big|Tom was sad because
In the forest|A small dog|The sun was|Mom said|There was a girl|Ben and Sue|The little bird|It was raining and
Max liked to|She found a|The old man|Every morning|A green frog|The king|Sara had a ball"""
STORY_PROMPTS = STORY_PROMPTS.replace("\n", "|").split("|")  # 20 of them


@pytest.fixture(scope="module")
def library():
    return backends.get("jax")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def models(golden, storyteller):
    """(params, n_head, ids) of the golden model and of 3M."""
    encoder, hparams, params = storyteller
    yield golden["params"], golden["hparams"]["n_head"], golden["cases"][2]["ids"]
    yield params, hparams["n_head"], encoder.encode(" ".join(STORY_PROMPTS))


def all_ways(params, ids, n_head, library):
    """The logits of one sequence: op by op, compiled, and as the first of two rows."""
    model = functools.partial(forward, n_head=n_head)
    params, ids = library.asarray((params, np.asarray(ids, np.int32)))
    yield "eager", model(params, ids)
    yield "jitted", library.jit(model)(params, ids)
    rows = np.stack([ids, ids[::-1]])
    yield "batched", library.jit(library.vmap(model, in_axes=(None, 0)))(params, rows)[0]


def forward(params, tokens, n_head):
    return gpt2.gpt2(tokens, **params, n_head=n_head)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-11)])
def test_logits_equal_numpys(golden, storyteller, library, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        for params, n_head, ids in models(golden, storyteller):
            params = cast(params, dtype)
            expected = forward(params, ids, n_head)
            once = dtype == "float64" and params["wte"].shape[0] == 2048  # 3M, which takes long to compile
            for way, logits in itertools.islice(all_ways(params, ids, n_head, library), 1 if once else None):
                assert isinstance(logits, jax.Array)
                assert logits.dtype == dtype
                assert np.abs(np.asarray(logits) - expected).max() <= tolerance, way


def test_golden_logits_in_float64(golden, library, x64):
    params = library.asarray(cast(golden["params"], np.float64))
    model = library.jit(functools.partial(forward, n_head=golden["hparams"]["n_head"]))
    for i in (0, 2):
        logits = np.asarray(model(params, np.array(golden["cases"][i]["ids"])))
        assert np.abs(logits - golden["arrays"][f"logits_{i}"]).max() <= 1e-11


def test_greedy_text_is_numpys(storyteller):
    encoder, hparams, params = storyteller
    for prompt in STORY_PROMPTS:
        ids = encoder.encode(prompt)
        here, there = (kv_cache.generate(ids, params, hparams["n_head"], 60, backend) for backend in backends.NAMES)
        assert here == there, prompt


def test_vmap_on_numpy_gives_each_row_what_it_gives_alone(storyteller):
    _, hparams, params = storyteller
    tokens = np.array([[1, 2, 3, 4], [9, 8, 7, 6], [5, 5, 5, 5]])
    model = functools.partial(forward, n_head=hparams["n_head"])
    batched = backends.get("numpy").vmap(model, in_axes=(None, 0))(params, tokens)
    alone = np.stack([model(params, row) for row in tokens])
    assert abs(batched - alone).max() < 2e-6 * abs(alone).max()  # the order of sums may differ, nothing else


def spy(monkeypatch, seen):
    """Has every layer function report its result."""
    for name in (
        "gelu",
        "softmax",
        "layer_norm",
        "linear",
        "ffn",
        "attention",
        "attention_scores",
        "mha",
        "transformer_block",
        "embed",
        "unembed",
    ):
        layer = getattr(gpt2, name)

        def reporting(*args, layer=layer, name=name, **kwargs):
            seen.append((name, layer(*args, **kwargs)))
            return seen[-1][1]

        monkeypatch.setattr(gpt2, name, reporting)


def test_every_layer_gives_a_jax_array(library, monkeypatch):
    seen = []
    spy(monkeypatch, seen)
    forward(library.asarray(random_params()), [1, 2, 3], 2)
    assert {name for name, _ in seen} >= {"gelu", "softmax", "layer_norm", "linear", "attention", "embed", "unembed"}
    assert [name for name, result in seen if not isinstance(result, jax.Array)] == []


@pytest.mark.parametrize("backend", backends.NAMES)
def test_with_bfloat16_params_every_activation_is_bfloat16(backend, monkeypatch):
    seen = []
    spy(monkeypatch, seen)
    params = backends.get(backend).asarray(params_module.cast(random_params(), "bfloat16"))
    forward(params, [1, 2, 3], 2)
    assert {name for name, _ in seen} >= {"softmax", "attention_scores"}
    assert {name for name, result in seen if result.dtype != "bfloat16"} == set()


def test_bfloat16_statistics_are_those_of_float32_on_jax(library):
    x = jax.random.normal(jax.random.key(0), (4, 768)).astype("bfloat16") * 3 + 1
    one, zero = library.asarray((np.float32(1), np.float32(0)))
    wide = x.astype("float32")
    assert np.array_equal(gpt2.softmax(x), gpt2.softmax(wide).astype("bfloat16"))
    assert np.array_equal(gpt2.layer_norm(x, one, zero), gpt2.layer_norm(wide, one, zero).astype("bfloat16"))


@pytest.mark.parametrize("backend", backends.NAMES)
def test_bfloat16_mostly_agrees_on_the_next_token(storyteller, backend):
    encoder, hparams, params = storyteller
    library, agree = backends.get(backend), []
    narrow = library.asarray(params_module.cast(params, "bfloat16"))
    model = library.jit(functools.partial(forward, n_head=hparams["n_head"]))
    for prompt in STORY_PROMPTS:
        ids = encoder.encode(prompt)
        ids = np.array(ids + kv_cache.generate(ids, params, hparams["n_head"], 48 - len(ids)))
        best = np.argmax(library.to_numpy(model(narrow, ids)).astype(np.float32), axis=-1)
        agree += list(best == np.argmax(forward(params, ids, hparams["n_head"]), axis=-1))
    assert np.mean(agree) >= 0.95


def test_gradients_equal_central_differences(library, x64):
    params, tokens = cast(random_params(), np.float64), np.array([1, 5, 2, 9, 0])

    @library.jit
    def loss(params):
        logits = forward(params, tokens[:-1], 2)
        return -jax.nn.log_softmax(jax.numpy.asarray(logits))[np.arange(4), tokens[1:]].mean()

    value, gradient = library.value_and_grad(loss)(library.asarray(params))
    assert value.dtype == np.float64
    places, gradient, step = [*flatten(params).items()], library.to_numpy(gradient), 1e-5
    for path, array in places:
        for index in {
            np.unravel_index(i, array.shape) for i in (array.size // 3, array.size // 2 + 1) if i < array.size
        }:
            slopes, kept = [], array[index]
            for sign in (1, -1):
                array[index] = kept + sign * step
                slopes.append(sign * float(loss(params)) / (2 * step))
            array[index] = kept
            found = functools.reduce(lambda nest, key: nest[key], path, gradient)[index]
            assert found == pytest.approx(sum(slopes), rel=1e-6, abs=1e-9), path
    assert {path[-2:] for path, _ in places} >= {("wte",), ("wpe",), ("ln_1", "g"), ("c_attn", "w"), ("c_fc", "b")}


def test_gradients_in_float32(library):
    params = library.asarray(random_params())
    mean = library.jit(lambda params: forward(params, np.array([1, 2, 3]), 2).mean())
    value, gradient = library.value_and_grad(mean)(params)
    assert value.dtype == np.float32
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_float64_is_not_halved_in_silence(library):
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        library.asarray({"a": [np.zeros(2)]})


@pytest.mark.parametrize("bad", [[5, 11], [-1]])
def test_ids_that_jax_would_clamp_are_refused_before(bad):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        kv_cache.generate(bad, random_params(), 2, 2, "jax")


@pytest.mark.parametrize("platform", ["banana", "cuda"])
def test_a_platform_that_is_not_there_is_one_line(platform):
    arguments = [sys.executable, "gpt2.py", "Once", "--model_size", "3M", "--backend", "jax"]
    environment = {"JAX_PLATFORMS": platform, "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"JAX_PLATFORMS={platform!r}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_missing_jax_is_one_line_with_the_command(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "backends.jax_backend", raising=False)
    backends.get.cache_clear()
    status, out, err = command("Once", "--backend", "jax", "--model_size", "3M")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "python3 -m pip install jax" in err


@pytest.mark.parametrize(
    ("flag", "value", "choices"),
    [("backend", "torch", "numpy or jax"), ("dtype", "float16", "float32, bfloat16, float64")],
)
def test_unknown_backends_and_dtypes(flag, value, choices, command):
    status, out, err = command("Once", f"--{flag}", value, "--model_size", "3M")
    assert (status, out, err) == (2, "", f"unknown {flag} {value!r}: choose {choices}\n")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_front_door_names_the_device(dtype, tmp_path):
    """In a process of its own: 64 bits and the place of compiled programs are settings of a whole process."""
    arguments = ["gpt2.py", "Once upon a time", "--model_size", "3M", "--n_tokens_to_generate", "5"]
    arguments += ["--backend", "jax", "--dtype", dtype]
    environment = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    run = functools.partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    done = run([sys.executable, *arguments])
    assert done.stdout == ", there was a little\n"
    assert done.stderr.startswith(f"JAX {jax.__version__} on cpu")
    assert ("64 bits on" in done.stderr) == (dtype == "float64")
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "gpt2" / "jax").iterdir()), "the compiled programs are kept"
