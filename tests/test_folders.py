"""Model folders: which one a name means, and how the model in it ends a text."""

import json
import shutil
from itertools import product

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, openai_tokenizer, random_params

import gpt2
import utils
from inference.model import load
from tools import models
from utils import Ending

SIZES = {"n_vocab": 512, "n_ctx": 16, "n_embd": 4, "n_head": 2, "n_layer": 1}
GOLDEN_END = 511  # <|endoftext|> of the golden tokenizer


@pytest.fixture
def folder(tmp_path):
    """Makes a model folder in one layout, with what its hparams.json or generation_config.json says besides."""

    def make(layout="tf", said=None, **sizes):
        path, hparams = tmp_path / f"model-{layout}", SIZES | sizes
        path.mkdir()
        source = openai_tokenizer() if hparams["n_vocab"] == 50257 else GOLDEN
        utils.save_tokenizer(source, path, [layout])
        utils.save_model(path, hparams, random_params(**hparams), [layout])
        if said is not None:
            file = path / ("hparams.json" if layout == "tf" else "generation_config.json")
            file.write_text(json.dumps(said | (hparams if layout == "tf" else {})), encoding="utf-8")
        return path

    return make


def ending(path):
    encoder, hparams, _ = utils.load_folder(path)
    return utils.read_ending(path, encoder, hparams)


# ---- How a text ends ----


@pytest.mark.parametrize(
    ("layout", "said", "expected"),
    [
        ("tf", {}, Ending((GOLDEN_END,), True)),
        ("tf", {"end_ids": [3, 7]}, Ending((3, 7), True)),
        ("tf", {"end_ids": 3}, Ending((3,), True)),
        ("tf", {"end_ids": []}, Ending((), True)),
        ("tf", {"end_ids": None}, Ending((GOLDEN_END,), True)),
        ("tf", {"stop_at_eos": False}, Ending((GOLDEN_END,), False)),
        ("tf", {"end_ids": [0], "stop_at_eos": False}, Ending((0,), False)),
        ("hf", None, Ending((GOLDEN_END,), True)),
        ("hf", {}, Ending((GOLDEN_END,), False)),
        ("hf", {"eos_token_id": None}, Ending((GOLDEN_END,), False)),
        ("hf", {"eos_token_id": 5}, Ending((5,), True)),
        ("hf", {"eos_token_id": [5, 6]}, Ending((5, 6), True)),
    ],
)
def test_the_folder_says_how_its_model_ends(folder, layout, said, expected):
    path = folder(layout, said)
    assert ending(path) == expected
    _, model = load(str(path))
    assert (model.end_ids, model.stop_at_eos) == expected


@pytest.mark.parametrize(
    ("layout", "said", "stops"),
    [
        ("tf", {}, False),
        ("tf", {"stop_at_eos": True}, True),
        ("hf", None, False),
        ("hf", {"eos_token_id": None}, False),
        ("hf", {"eos_token_id": 50256}, True),
    ],
)
def test_openais_vocabulary_goes_on_unless_the_folder_says_otherwise(folder, layout, said, stops):
    assert ending(folder(layout, said, n_vocab=50257)) == Ending((50256,), stops)


NO_IDS = ["<|endoftext|>", -1, 2.0, True, [None], {"id": 3}, [[3]]]


@pytest.mark.parametrize(("layout", "value"), [*product(utils.LAYOUTS, NO_IDS), ("tf", 512), ("tf", [3, 600])])
def test_ids_that_are_none_name_the_file(folder, layout, value):
    path = folder(layout, {"end_ids" if layout == "tf" else "eos_token_id": value})
    with pytest.raises(OSError, match=r"(hparams|generation_config)\.json: the end id .* is not one of the 512"):
        ending(path)


def test_hugging_face_ids_above_the_vocabulary_are_left_out(folder):
    """transformers writes 50256 for any vocabulary."""
    assert ending(folder("hf", {"eos_token_id": [3, 50256]})) == Ending((3,), True)


@pytest.mark.parametrize("said", [Ending((3, 7), True), Ending((3,), False), Ending((GOLDEN_END,), True)])
def test_converting_keeps_it(folder, said, command, tmp_path):
    source = folder(said=said._asdict())
    for layout, made in (("hf", tmp_path / "there"), ("tf", tmp_path / "back")):
        assert command(str(source), str(made), "--layout", layout, main=models.convert)[0] == 0
        assert ending(made).stop_at_eos == said.stop_at_eos
        source = made
    if said.stop_at_eos:
        assert ending(tmp_path / "back") == said


def test_generation_ends_there(folder, command):
    """At the first token that the model would write: no text at all. Told to go on, it writes all of it."""
    path = folder()
    flags = ["a", "--model_size", str(path), "--n_tokens_to_generate", "4", "--json"]
    first = json.loads(command(*flags)[1])["token_ids"][0]
    (path / "hparams.json").write_text(json.dumps(SIZES | {"end_ids": [first]}), encoding="utf-8")
    found = json.loads(command(*flags)[1])
    assert (found["token_ids"], found["stop_reason"]) == ([], "end_of_text")
    assert len(json.loads(command(*flags, "--nostop_at_eos")[1])["token_ids"]) == 4
    (path / "hparams.json").write_text(json.dumps(SIZES | {"end_ids": [first], "stop_at_eos": False}), encoding="utf-8")
    assert len(json.loads(command(*flags)[1])["token_ids"]) == 4


# ---- Which folder a name means ----


def test_a_name_with_a_slash_or_of_dots_is_a_path_as_in_a_shell(folder, tmp_path, monkeypatch):
    path = folder()
    (path / "inner").mkdir()
    for here, name in [(path, "."), (path, "./"), (path / "inner", ".."), (path / "inner", "../"),
                       (path / "inner", f"../../{path.name}"), (tmp_path, f"./{path.name}"),
                       (tmp_path, f"{path.name}/"), (tmp_path, str(path))]:  # fmt: skip
        monkeypatch.chdir(here)
        assert utils.find_model(name, ROOT / "models").samefile(path), (here, name)
        assert load(name, str(ROOT / "models"))[1].n_ctx == 16


def test_a_bare_name_is_looked_up_in_models_dir_first(folder, tmp_path, monkeypatch):
    here = folder()
    there = tmp_path / "models" / here.name
    shutil.copytree(here, there)
    monkeypatch.chdir(tmp_path)
    assert utils.find_model(here.name, "models").samefile(there)
    assert utils.find_model(f"./{here.name}", "models").samefile(here), "unless it is a path"
    shutil.rmtree(there)
    assert utils.find_model(here.name, "models").samefile(here)


@pytest.mark.parametrize("name", ["./124M", "../124M", "/nowhere/124M", "./3M"])
def test_a_path_that_is_not_there_is_neither_downloaded_nor_replaced(name, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no model"):
        utils.find_model(name)
    assert list(tmp_path.iterdir()) == []


# ---- What the files of a model may hold besides ----


def test_a_padded_vocabulary_writes_no_token_that_is_none(folder, command):
    """wte has 600 rows, the tokenizer 512 tokens: the others are never written, though they are the likeliest."""
    path, params = folder(n_vocab=600), random_params(**SIZES | {"n_vocab": 600})
    params["wte"][512:] *= 3
    utils.save_gpt2_params_to_tf_ckpt(path / "model.ckpt", params)
    assert max(gpt2.generate([1], params, 2, 8)) >= 512
    for flags in ([], ["--temperature", "5", "--seed", "1"], ["--num_beams", "3"]):
        status, out, _ = command("a", "--model_size", str(path), "--n_tokens_to_generate", "8", "--json", *flags)
        assert status == 0
        assert max(max(json.loads(line)["token_ids"]) for line in out.splitlines()) < 512


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(folder, command, value):
    path, params = folder(), random_params(**SIZES)
    params["blocks"][0]["mlp"]["c_fc"]["w"][1, 2] = value
    utils.save_gpt2_params_to_tf_ckpt(path / "model.ckpt", params)
    for flags in ([], ["--num_beams", "2"], ["--num_samples", "2", "--temperature", "1"]):
        status, out, err = command("a", "--model_size", str(path), "--n_tokens_to_generate", "4", *flags)
        assert (status, out) == (1, "")
        assert "NaN or infinity in blocks.0.mlp.c_fc.w" in err.splitlines()[-1]
