"""Evaluation against a loop that predicts one token at a time."""

import json
import math
import shutil

import numpy as np
import pytest
from conftest import GOLDEN, cast, oracle

import gpt2
import utils
from training import evaluate
from weights.params import tree_map

TEXT = "Once upon a time there was a cat.<|endoftext|>The cat sat on the mat, and the mat sat on the floor. " * 3


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("n_ids", [2, 3, 7, 8, 9, 10, 16, 17, 100])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_each_id_but_the_first_counts_once(n_ids, stride):
    n_ctx, counted = 8, []
    for start, first, end in evaluate.windows(n_ids, n_ctx, stride):
        assert start < first < end <= start + n_ctx + 1
        counted += range(first, end)
        assert start == 0 or first - start > n_ctx - stride, "so many tokens before each, the one at `start` included"
    assert counted == list(range(1, n_ids))


@pytest.mark.parametrize("stride", [5, 16])
def test_losses_equal_a_token_by_token_loop(golden, stride):
    """In which every window and every prediction is computed alone."""
    params, n_head, n_ctx = cast(golden["params"], "float64"), golden["hparams"]["n_head"], 16
    ids = np.random.default_rng(0).integers(0, golden["hparams"]["n_vocab"], 40)
    expected, first = 0.0, 1
    for start in range(0, len(ids), stride):
        for i in range(first, min(start + n_ctx + 1, len(ids))):
            logits = gpt2.gpt2(ids[start:i], **params, n_head=n_head)[-1]
            expected -= math.log(gpt2.softmax(logits)[ids[i]])
        first = max(first, start + n_ctx + 1)
    assert evaluate.total_loss(params, ids, {"n_ctx": n_ctx, "n_head": n_head}, stride) == pytest.approx(
        expected, rel=1e-12
    )


def test_both_backends_and_json(command, text, storyteller):
    oracle("jax")
    found = {}
    for backend in ("numpy", "jax"):
        status, out, _ = command("3M", text, "--json", "--backend", backend, main=evaluate.main)
        found[backend] = json.loads(out)
        assert status == 0
    assert found["numpy"] == pytest.approx(found["jax"], rel=1e-5)
    report = found["numpy"]
    assert list(report) == ["tokens", "bytes", "nats_per_token", "bits_per_byte", "perplexity", "stride"]
    documents = TEXT.split("<|endoftext|>")
    encoder = storyteller[0]
    assert report["tokens"] == sum(1 + len(encoder.encode(document)) for document in documents) - 1
    assert report["bytes"] == sum(len(document.encode()) for document in documents)
    assert report["stride"] == 128
    assert report["perplexity"] == pytest.approx(math.exp(report["nats_per_token"]))
    per_byte = report["nats_per_token"] * report["tokens"] / report["bytes"]
    assert report["bits_per_byte"] == pytest.approx(per_byte / math.log(2))


def test_the_table_has_the_same_figures(command, text):
    status, out, err = command("3M", text, "--stride", "64", main=evaluate.main)
    assert (status, err) == (0, "")
    rows = {line[:15].strip().replace(" ", "_"): line[15:].strip() for line in out.splitlines()}
    found = json.loads(command("3M", text, "--stride", "64", "--json", main=evaluate.main)[1])
    assert (found["stride"], rows["stride"]) == (64, "64")
    for name, value in found.items():
        assert float(rows[name].replace(",", "")) == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("backend", ["numpy", "jax"])
@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        ("nan", "float32", "is nan: NaN or infinity in blocks.1.mlp.c_fc.w"),
        ("inf", "float32", "is nan: NaN or infinity in blocks.1.mlp.c_fc.w"),
        ("3e38", "float32", "overflows: try --dtype float64"),
    ],
)
def test_a_loss_that_is_no_number_is_one_line(value, dtype, words, backend, golden, command, text, tmp_path):
    oracle("jax")
    shutil.copytree(GOLDEN, tmp_path / "model")
    params = tree_map(np.copy, golden["params"])
    params["blocks"][1]["mlp"]["c_fc"]["w"][3] = np.float32(value)
    utils.save_model(tmp_path / "model", golden["hparams"], params, ["tf"])
    status, out, err = command(str(tmp_path / "model"), text, "--backend", backend, main=evaluate.main)
    assert (status, out) == (1, "")
    assert err.count("\n") == (1 if backend == "numpy" else 2), "JAX's device, and the reason"
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["3M", "{text}", "--stride", "0"], "--stride 0 is out of range: 1 to n_ctx, 256"),
        (["3M", "{text}", "--stride", "257"], "1 to n_ctx, 256"),
        (["3M"], "name a model, and a text"),
        (["3M", "nowhere.txt"], "no file or folder 'nowhere.txt'"),
        (["nothing", "{text}"], "no model 'nothing'"),
        (["3M", "{text}", "--dtype", "int8"], "unknown dtype"),
        (["3M", "{text}", "--backend", "torch"], "unknown backend"),
    ],
)
def test_bad_input_is_one_line(arguments, words, command, text):
    arguments = [argument.replace("{text}", text) for argument in arguments]
    status, out, err = command(*arguments, main=evaluate.main)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err
