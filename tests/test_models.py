"""Writing models: nothing half-written, no number changed, and other programs can read it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, cast, random_params

import gpt2
import gpt2_pico
import utils
from tools import models
from weights import files

HF_FILES = ("config.json", "generation_config.json", "merges.txt", "model.safetensors", "vocab.json")
SMALL = {"n_vocab": 300, "n_ctx": 8, "n_embd": 6, "n_head": 2, "n_layer": 2}


def convert(command, *arguments):
    return command(*map(str, arguments), main=models.convert)


def test_there_and_back_no_byte_changes(command, tmp_path):
    """Each layout's own files are those of the original; the index is another program's work, what it says is not."""
    source = utils.MODELS_DIR / "3M"
    assert convert(command, "3M", tmp_path / "hf", "--layout", "hf")[0] == 0
    assert convert(command, tmp_path / "hf", tmp_path / "tf", "--layout", "tf")[0] == 0
    assert convert(command, tmp_path / "tf", tmp_path / "hf2", "--layout", "hf")[0] == 0
    for name in ("encoder.json", "vocab.bpe", utils.DATA):
        assert (tmp_path / "tf" / name).read_bytes() == (source / name).read_bytes(), name
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (tmp_path / "hf2" / path.name).read_bytes(), path.name
    assert list(models.problems(tmp_path / "tf", {})) == []
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == sorted(HF_FILES)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hugging_face_files_keep_their_dtype(dtype, tmp_path):
    params = cast(random_params(**SMALL), dtype)
    utils.save_model(tmp_path, SMALL, params, ["hf"])
    hparams = utils.read_hparams(tmp_path)
    loaded = utils.load_gpt2_params_from_hf(tmp_path / "model.safetensors", hparams)
    assert hparams == SMALL
    assert loaded["wte"].dtype == dtype
    assert np.array_equal(loaded["blocks"][1]["mlp"]["c_fc"]["w"], params["blocks"][1]["mlp"]["c_fc"]["w"])


def test_float64_does_not_fit_into_openais_layout(tmp_path):
    hparams = SMALL | {"n_vocab": 2048}
    (tmp_path / "hf").mkdir()
    utils.save_tokenizer(utils.MODELS_DIR / "3M", tmp_path / "hf", ["hf"])
    utils.save_model(tmp_path / "hf", hparams, cast(random_params(**hparams), "float64"), ["hf"])
    with pytest.raises(ValueError, match="float32 alone"):
        models.convert(str(tmp_path / "hf"), str(tmp_path / "out"), layout="tf")
    assert not (tmp_path / "out").exists()


def test_transformers_loads_it_too(command, tmp_path):
    """The same logits and the same tokens."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    assert convert(command, "3M", tmp_path / "hf", "--layout", "hf")[0] == 0
    encoder, hparams, params = utils.load_encoder_hparams_and_params("3M")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = encoder.encode("Once upon a time, there was a dög.")
    assert tokenizer("Once upon a time, there was a dög.").input_ids == ids
    assert tokenizer.eos_token_id == encoder.end_of_text == model.config.eos_token_id
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(theirs - gpt2.gpt2(ids, **params, n_head=hparams["n_head"])).max() < 1e-4


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as part:
        part.write_text(f"{path.read_text()} ne{1 // 0}")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    files.write_text(path, "new")
    assert path.read_text() == "new"


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    """A limit on the size of files stands in for the disk."""
    pytest.importorskip("resource")
    files.write_text(tmp_path / "config.json", "old")
    code = (
        "import resource, sys; from weights import files; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"files.write_text({str(tmp_path / 'config.json')!r}, 'new' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "cannot write" in done.stderr
    assert "the old file is unchanged" in done.stderr
    assert (tmp_path / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["3M", "{tmp}/new", "--layout", "onnx"], "--layout 'onnx': choose tf or hf"),
        (["3M", "{tmp}", "--layout", "hf"], "is there already"),
        (["3M", "--layout", "hf"], "name a folder to make"),
        (["nothing", "{tmp}/new", "--layout", "hf"], "no model 'nothing'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, words, command, tmp_path):
    status, out, err = convert(command, *[a.replace("{tmp}", str(tmp_path)) for a in arguments])
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert os.listdir(tmp_path) == []


def test_config_json_says_what_transformers_needs(tmp_path):
    utils.save_model(tmp_path, SMALL, random_params(**SMALL))
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None, "no tokenizer, no id"
    utils.save_tokenizer(utils.MODELS_DIR / "3M", tmp_path)
    utils.save_model(tmp_path, SMALL, random_params(**SMALL))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vocab_size"], config["n_positions"], config["eos_token_id"]) == (300, 8, 2047)
    assert config["activation_function"] == "gelu_new"


# ---- Weights that are no numbers ----

WAYS = {
    "one text": ["Once"],
    "drawn": ["Once", "--temperature", "1"],
    "samples": ["Once", "--temperature", "1", "--num_samples", "2"],
    "batch": ["--batch", "--prompt_file", "{tmp}/prompts"],
    "beams": ["Once", "--num_beams", "2"],
    "trace": ["Once", "--trace", "20"],
    "json": ["Once", "--json"],
    "slide": ["Once", "--overflow", "slide", "--n_tokens_to_generate", "150"],
    "jax": ["Once", "--backend", "jax"],
    "bfloat16": ["Once", "--dtype", "bfloat16"],
}


def golden_folder(folder, edit, layout="tf", n_vocab=512, tokenizer=None):
    """The golden model with other params, and with the tokenizer that `tokenizer` makes of its {spelling: id}."""
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(GOLDEN))
    params["wte"] = np.resize(params["wte"], (n_vocab, 48))
    edit(params)
    folder.mkdir()
    utils.save_tokenizer(GOLDEN, folder, ["tf"])
    if tokenizer:
        (folder / "encoder.json").write_text(json.dumps(tokenizer(encoder.ids)), encoding="utf-8")
    utils.save_tokenizer(folder, folder, [layout])
    utils.save_model(folder, hparams | {"n_vocab": n_vocab}, params, [layout])
    return folder


def run(command, way, folder):
    (folder.parent / "prompts").write_text("Once\nOnce upon", encoding="utf-8")
    arguments = [word.replace("{tmp}", str(folder.parent)) for word in WAYS[way]]
    return command(*arguments, "--model_size", str(folder))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_run_that_meets_nan_names_the_tensor(tmp_path, command, way, value):
    def edit(params):
        params["blocks"][1]["mlp"]["c_fc"]["w"][3, 5] = value

    status, out, err = run(command, way, golden_folder(tmp_path / "model", edit))
    assert (status, out) == (1, "")
    assert "not finite numbers: NaN or infinity in blocks.1.mlp.c_fc.w" in err.splitlines()[-1]
    assert err.count("\n") == 1 + (way == "jax")  # which names its device


def test_warnings_of_numpy_are_not_shown(tmp_path):
    def edit(params):
        params["blocks"][1]["mlp"]["c_fc"]["w"][3, 5] = np.inf

    folder = golden_folder(tmp_path / "model", edit)
    arguments = [sys.executable, "gpt2.py", "Once", "--model_size", str(folder)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr


@pytest.mark.parametrize("layout", ["tf", "hf"])
def test_verify_names_the_tensors_with_nan(tmp_path, command, layout):
    def edit(params):
        params["wte"][511, 0] = np.nan  # of a token that no prompt has, so that a run might not meet it
        params["wpe"][95, 0] = -np.inf
        for block in params["blocks"]:
            block["ln_1"]["g"][0] = np.nan

    folder = golden_folder(tmp_path / "model", edit, layout)
    status, out, _ = command(str(folder), main=models.verify)
    assert (status, out.count("\n")) == (1, 1)
    assert out.endswith("NaN or infinity in wte, wpe, blocks.0.ln_1.g and 2 more\n")


def test_numbers_too_large_for_the_dtype_say_so(tmp_path, command):
    def edit(params):
        params["ln_f"]["g"][...] = 3e38

    folder = golden_folder(tmp_path / "model", edit)
    assert command(str(folder), main=models.verify)[0] == 0
    status, out, err = command("Once", "--model_size", str(folder))
    assert (status, out) == (1, "")
    assert "float32 overflows: try --dtype float64" in err


# ---- Ids without a token ----


def loud(params):
    """Rows beyond the tokenizer's, whose logits are mostly the largest."""
    params["wte"][511:] *= 5


def gap(ids):
    return ids | {"<|endoftext|>": 599}


KINDS = {"padded": (loud, 640, None), "gap": (loud, 600, gap)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_an_id_without_a_token_is_never_chosen(tmp_path, command, way, kind):
    edit, n_vocab, tokenizer = KINDS[kind]
    folder = golden_folder(tmp_path / "model", edit, n_vocab=n_vocab, tokenizer=tokenizer)
    status, out, err = run(command, way, folder)
    assert status == 0, err
    assert len(out) > 10
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(folder))
    chosen = gpt2.generate(encoder.encode("Once"), params, hparams["n_head"], 10)
    assert set(chosen) - encoder.spellings.keys(), "it would have been, without a mask"


def test_an_end_id_without_a_token_still_ends(tmp_path, command):
    """A tokenizer that lacks the token at which the model was trained to stop."""
    folder = golden_folder(tmp_path / "model", lambda params: None, n_vocab=640)
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(folder))
    best = gpt2.gpt2(encoder.encode("Once"), **params, n_head=hparams["n_head"])[-1].argmax()
    params["wte"][600] = 2 * params["wte"][best]
    utils.save_model(folder, hparams, params, ["tf"], ending=utils.Ending((600,), True))
    status, out, _ = command("Once", "--model_size", str(folder), "--json")
    assert status == 0
    assert json.loads(out)["stop_reason"] == "end_of_text"


def test_the_shortest_program_chooses_no_padding_either(tmp_path, capsys):
    folder = golden_folder(tmp_path / "model", loud, n_vocab=640)
    gpt2_pico.main("Once", n_tokens_to_generate=20, model_size=str(folder))
    shortest = capsys.readouterr().out
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(folder))
    params["wte"] = params["wte"][:512]
    ids = gpt2.generate(encoder.encode("Once"), params, hparams["n_head"], 20)
    if encoder.end_of_text in ids:
        ids = ids[: ids.index(encoder.end_of_text)]
    assert shortest == encoder.decode(ids) + "\n"
