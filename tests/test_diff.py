"""tools.diff finds what is planted, wherever it is planted."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, oracle

import gpt2
import utils
from tools import bench, diff

oracle("jax")
MODEL = ["--model_size", "3M"]
LAYERS = [
    "gelu",
    "softmax",
    "layer_norm",
    "linear",
    "ffn",
    "attention",
    "attention_scores",
    "split_heads",
    "merge_heads",
    "mha",
]
LAYERS += ["transformer_block", "embed", "unembed"]


@pytest.fixture
def run(command):
    return lambda *arguments: command(*arguments, *MODEL, main=diff.main)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a model of two blocks: the errors that are planted in it do not depend on the size."""
    folder = tmp_path_factory.mktemp("tiny")
    bench.save_random_model(folder, {"n_vocab": 300, "n_ctx": 24, "n_embd": 12, "n_head": 2, "n_layer": 2})
    return ["--model_size", str(folder)]


@pytest.fixture
def run_tiny(command, tiny_model):
    return lambda *arguments: command(*arguments, *tiny_model, main=diff.main)


def test_the_list_here_is_the_list_there():
    assert set(diff.layers_of(gpt2)) == set(LAYERS)


def test_without_a_difference_the_status_is_0_and_every_place_is_listed(run):
    status, out, err = run("Once upon a time")
    assert (status, err) == (0, "")
    places = [line.split()[0] for line in out.split("\n\n")[0].splitlines()[5:]]
    assert places[0] == "embed"
    assert places[-1] == "logits"
    assert "blocks[3].mha.attention" in places
    assert "blocks[5].mha.linear(c_proj)" in places
    assert len(places) == len(set(places)) == 6 * 17 + 4
    assert "the next token is the same" in out
    assert "ahead" in out


@pytest.mark.parametrize("name", LAYERS)
def test_an_error_in_one_layer_function_on_jax_is_named(run_tiny, name, monkeypatch, tiny_model):
    layer = getattr(gpt2, name)

    def wrong(x, *args, **kwargs):
        y = layer(x, *args, **kwargs)
        return y if isinstance(y, np.ndarray) else y + 1e-3

    wrong.__name__, wrong.__module__ = name, "gpt2"
    monkeypatch.setattr(gpt2, name, wrong)
    status, out, _ = run_tiny("Once upon a time", "--json")
    found = json.loads(out)
    first = found["first_beyond"]
    assert status == 1
    assert first.split(".")[-1].split("(")[0] == {"transformer_block": "blocks[0]"}.get(name, name)
    encoder = utils.load_folder(Path(tiny_model[1]))[0]
    assert f"the first is {first}" in "\n".join(diff.report(found, encoder, 1e-5))


@pytest.mark.parametrize("name", LAYERS)
def test_a_changed_line_shows_against_a_recording(run_tiny, name, monkeypatch, tmp_path):
    recording = str(tmp_path / "before.npz")
    assert run_tiny("A cat", "--save", recording, "--backend_b", "numpy")[0] == 0
    assert run_tiny("A cat", "--against", recording)[0] == 0
    layer = getattr(gpt2, name)

    def changed(*args, **kwargs):
        return layer(*args, **kwargs) + np.float32(1e-3)

    changed.__name__, changed.__module__ = name, "gpt2"
    monkeypatch.setattr(gpt2, name, changed)
    status, out, _ = run_tiny("A cat", "--against", recording, "--json")
    first = json.loads(out)["first_beyond"]
    assert (status, first.split(".")[-1].split("(")[0]) == (1, {"transformer_block": "blocks[0]"}.get(name, name))


def test_a_layer_function_that_is_new_is_a_place_too(run_tiny, monkeypatch, tmp_path):
    recording = str(tmp_path / "before.npz")
    run_tiny("A cat", "--save", recording, "--backend_b", "numpy")
    gelu = gpt2.gelu

    def bell(x):
        return gelu(x)

    bell.__module__ = "gpt2"
    monkeypatch.setattr(gpt2, "bell", bell, raising=False)
    monkeypatch.setattr(gpt2, "gelu", lambda x: gpt2.bell(x))
    status, out, _ = run_tiny("A cat", "--against", recording, "--json")
    assert (status, json.loads(out)["first_beyond"]) == (1, "blocks[0].ffn.bell")


@pytest.mark.parametrize("pair", [("numpy", "float32", "jax", "bfloat16"), ("jax", "float64", "numpy", "float64")])
def test_pairs_may_be_chosen(run, pair):
    flags = zip(("--backend_a", "--dtype_a", "--backend_b", "--dtype_b"), pair, strict=True)
    status, out, _ = run("A cat", "--json", *(word for flag in flags for word in flag))
    assert status == 0
    assert f"{pair[0]} {pair[1]} - {pair[2]} {pair[3]}" in json.loads(out)["places"][0]


def test_json(run):
    found = json.loads(run("A cat", "--json")[1])
    assert found["first_beyond"] is None
    row = next(row for row in found["places"] if row["place"] == "blocks[3].mha.attention.softmax")
    assert row["shape"] == [6, 2, 2]
    assert set(row["numpy float32 - jax float32 jit"]) == {"abs", "rel"}
    assert found["next_token"]["numpy float32"]["gap"] > 0


def test_nan_is_beyond_every_tolerance():
    assert diff.difference(np.array([np.nan]), np.array([1.0]), 1.0)["abs"] == float("inf")


def test_the_core_is_as_it_was_after_a_run(run_tiny):
    before = dict(vars(gpt2))
    run_tiny("A cat")
    assert all(vars(gpt2)[name] is value for name, value in before.items())


def test_mistakes_are_one_line(run, command, tmp_path):
    recording = str(tmp_path / "r.npz")
    run("A cat", "--save", recording, "--backend_b", "numpy")
    (tmp_path / "other.npz").write_bytes(b"PK\x03\x04")
    for arguments, word in [
        (["A dog", "--against", recording], "recording of another prompt"),
        (["A cat", "--against", str(tmp_path / "other.npz")], "no recording"),
        (["A cat", "--against", "nowhere.npz"], "No such file"),
        (["A cat", "--dtype_b", "float16"], "unknown dtype"),
        (["A cat", "--against", recording, "--dtype_b", "float16"], "unknown dtype"),
        (["A cat", "--against", recording, "--backend_b", "banana"], "leave out --backend_b"),
        (["A cat", "--backend_a", "torch"], "unknown backend"),
        (["a " * 300], "n_ctx 256"),
    ]:
        status, out, err = run(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), arguments
        assert word in err
    status, _, err = command("A cat", "--against", recording, "--model_size", str(GOLDEN), main=diff.main)
    assert (status, "recording of another" in err) == (2, True)
    status, _, err = run("A cat", "--save", str(tmp_path / "no" / "r.npz"), "--backend_b", "numpy")
    assert (status, err.count("\n")) == (1, 1)
