"""The benchmark measures what it says; how fast anything is, no test asserts."""

import contextlib
import json

import pytest
from conftest import GOLDEN, oracle

import gpt2
import utils
from inference import kv_cache
from tools import bench, curves, engines

HPARAMS, N_3M = bench.HPARAMS["3M"], 3_111_936  # parameters


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    bench.save_random_model(folder, HPARAMS)
    return utils.load_folder(folder)[2]


def test_every_figure_is_there(command):
    arguments = ["--model_size", "3M", "--rounds", "1", "--json", "--against", "picogpt-style", "--backend", "numpy"]
    status, out, _ = command(*arguments, main=bench.main)
    found = json.loads(out)
    assert status == 0
    rates = found["tokens_per_second"]
    assert {"decode, prompt 10", "batch of 16, decode"} <= set(rates)
    assert set(rates["decode, prompt 10"]) == {"limits", "numpy", "picogpt-style"}
    assert all(r["min"] <= r["median"] <= r["max"] for row in rates.values() for r in row.values())
    assert found["weight_bytes"] == 12_447_744
    assert all(peak > found["weight_bytes"] for peak in found["peak_bytes"].values())
    assert set(found["first_token_of_a_process_seconds"]) == {"numpy"}
    text = "\n".join(bench.report(found))
    assert "| decode, prompt 10 |" in text
    assert all(f"{label}, numpy: " in text for label in ("first token of a new process", "peak memory after decoding"))


def test_the_table_and_its_picture(command, monkeypatch, tmp_path):
    oracle("matplotlib")
    limit = {"median": 4.0, "min": 3.0, "max": 5.0, "of_limit": 1.0}
    slow = {"median": 2.0, "min": 1.0, "max": 2.5, "of_limit": 0.5}
    rates = {"decode": {"limits": limit, "jax": slow}, "batch": {"limits": limit}}
    workers = {name: Stopped(name, []) for name in ("limits", "jax")}
    measured = rates, {"decode": {"limits": 0.0, "jax": 1.5}, "batch": {}}, {"limits": 10**6, "jax": 2 * 10**6}
    monkeypatch.setattr(bench, "start", lambda *_: contextlib.nullcontext(("", workers)))
    monkeypatch.setattr(bench, "measure", lambda *_: measured)
    monkeypatch.setattr(bench, "cold_start", lambda *_: 0.25)
    picture = tmp_path / "bench.png"
    status, out, _ = command("3M", "--plot", str(picture), "--backend", "numpy", main=bench.main)
    assert status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert out.splitlines()[1:] == [
        "device of limits; device of jax",
        "",
        "| tokens/s: median (min to max), share of the limit | limits | jax |",
        "| --- | --- | --- |",
        "| decode | 4.0 (3.0 to 5.0) | 2.0 (1.0 to 2.5), 0.50 |",
        "| batch | 4.0 (3.0 to 5.0) |  |",
        "",
        "first token of a new process, numpy: 0.25 s",
        "peak memory after decoding, limits: 1 MB, 0.08 × the weights",
        "peak memory after decoding, jax: 2 MB, 0.16 × the weights",
        "the first time on JAX, compiling or loading what is compiled, took longer by 1.5 s (decode)",
    ]


def test_random_models_are_the_same_each_time_and_load(params, tmp_path, command):
    bench.save_random_model(tmp_path, HPARAMS)
    assert (utils.load_folder(tmp_path)[2]["wte"] == params["wte"]).all()
    assert command("The", "--n_tokens_to_generate", "1", "--model_size", str(tmp_path))[0] == 0


def test_transformers_computes_the_same_model(params):
    """Or its times would mean nothing."""
    pytest.importorskip("transformers")
    ids = engines.prompt(HPARAMS, 10)
    theirs = engines.Transformers("transformers", HPARAMS, params)
    logits = theirs.model(theirs.torch.tensor([ids])).logits[0].detach().numpy()
    assert abs(logits - gpt2.gpt2(ids, **params, n_head=HPARAMS["n_head"])).max() < 1e-4
    assert theirs.model.generate(theirs.torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0].tolist() == [
        *ids, *kv_cache.generate(ids, params, HPARAMS["n_head"], 8)]  # fmt: skip


def test_ctranslate2_computes_the_same_model(params):
    pytest.importorskip("ctranslate2")
    ids = engines.prompt(HPARAMS, 10)
    theirs = engines.CTranslate2("ctranslate2", HPARAMS, params)
    options = {"max_length": 8, "min_length": 8, "sampling_topk": 1, "include_prompt_in_result": False}
    found = theirs.model.generate_batch(theirs.words([ids]), **options)
    assert found[0].sequences_ids[0] == kv_cache.generate(ids, params, HPARAMS["n_head"], 8)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--against", "llama.cpp"], "unknown peer 'llama.cpp'"),
        (["--backend", "torch"], "unknown backend"),
        (["--dtype", "float16"], "unknown dtype"),
        (["--model_size", "125M"], "did you mean 124M?"),
    ],
)
def test_mistakes_are_one_line(arguments, word, command):
    status, out, err = command(*arguments, main=bench.main)
    assert (status, out, err.count("\n"), word in err) == (2, "", 1, True)


def test_a_model_folder_may_be_measured(command, monkeypatch):
    monkeypatch.setattr(bench, "cold_start", lambda *_: 0.25)
    out = command(str(GOLDEN), "--rounds", "1", "--json", "--backend", "numpy", main=bench.main)[1]
    found, hparams = json.loads(out), utils.read_hparams(GOLDEN)
    assert hparams["n_layer"] == 3
    assert (found["model"], found["weight_bytes"]) == (str(GOLDEN), bench.weight_bytes(hparams, "float32"))


def test_peers_that_are_not_installed_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(bench, "installed", lambda name: name != "transformers")
    assert bench.choose_engines("", "transformers,picogpt-style") == ["numpy", "jax", "picogpt-style"]
    assert capsys.readouterr().err == "transformers is not installed and left out\n"
    assert bench.choose_engines("numpy", "") == ["numpy"]


def test_curves_measure_and_predict(command, monkeypatch, tmp_path):
    oracle("matplotlib")
    monkeypatch.setattr(curves, "CONTEXTS", (10,))
    monkeypatch.setattr(curves, "BATCHES", (2,))
    monkeypatch.setattr(curves.backends, "NAMES", ("numpy",))
    picture = tmp_path / "curves.png"
    status, out, _ = command("3M", "--rounds", "1", "--plot", str(picture), main=curves.main)
    assert status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for head in ("| tokens/s: 3M, tokens before | numpy | uncached | cached, predicted | uncached, predicted |",
                 "| tokens/s: 3M, batch of | numpy | predicted |", "| 10 | ", "| 2 | ", "| 3M | "):  # fmt: skip
        assert head in out
    for arguments, words in ((["4M"], "unknown size '4M'"), (["3M", "--rounds", "0"], "--rounds 0 is out of range")):
        status, out, err = command(*arguments, main=curves.main)
        assert (status, out, err.count("\n"), words in err) == (2, "", 1, True)


def test_the_arithmetic_of_the_curves():
    """By hand: 100 weights read in 2 s; a token before adds 2 * 1 * 5 cached numbers; 256 tokens multiply in 64 s."""
    found = curves.predicted({"B": 2.0, "F": 64.0}, {"n_layer": 1, "n_embd": 5}, 100, 10)
    assert found == {"cached, predicted": 1 / 4.0, "uncached, predicted": 1 / 2.5}


def test_the_machine_is_told_with_what_slows_it(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert "OPENBLAS_CORETYPE=Haswell" in bench.machine()


class Stopped:
    """A worker whose answers are known: at its nth question, n."""

    def __init__(self, name, log):
        self.device, self.name, self.log, self.n = f"device of {name}", name, log, 0

    def ask(self, task, *arguments):
        self.log.append((self.name, task, *arguments))
        self.n += task != "memory"
        return self.n


def test_each_round_asks_for_every_row_and_the_first_is_not_counted():
    log, tasks = [], {"short": ("decode", 10, 1), "batch": ("batch", 16, 16)}
    workers = {name: Stopped(name, log) for name in ("limits", "picogpt-style")}
    rates, compiling, peak = bench.measure(workers, tasks, 2)
    a_round = [("limits", "decode", 10), ("picogpt-style", "decode", 10), ("limits", "batch", 16)]
    first = [("limits", "decode", 10)] * 3 + [("limits", "memory")]  # memory after decoding: later tasks take more
    assert log[:4] == first
    assert [question for question in log[8:] if question[1] != "memory"] == [a_round[2], *2 * a_round]
    assert rates["short"]["limits"] == pytest.approx({"min": 1 / 7, "max": 1 / 5, "median": 6 / 35, "of_limit": 1})
    pico = {"min": 1 / 5, "max": 1 / 4, "median": 9 / 40, "of_limit": 9 / 40 * 35 / 6}
    assert rates["short"]["picogpt-style"] == pytest.approx(pico)
    assert rates["batch"] == {"limits": pytest.approx({"min": 2, "max": 8 / 3, "median": 7 / 3, "of_limit": 1})}
    assert peak == {"limits": 3, "picogpt-style": 3}
    assert [set(row) for row in compiling.values()] == [{"limits", "picogpt-style"}, {"limits"}]


def test_what_the_first_time_takes_longer(monkeypatch):
    """A clock that the worker sets: it answers after 9 s, then after 2, 4 and 3."""
    clock, waits = [0.0], iter([9, 1, 1, 0, 2, 4, 3])  # those of 1 s: asked twice more, then for its memory

    class Slow(Stopped):
        def ask(self, *question):
            clock[0] += next(waits)
            return super().ask(*question)

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    _, compiling, _ = bench.measure({"limits": Slow("limits", [])}, {"short": ("decode", 10, 1)}, 3)
    assert compiling == {"short": {"limits": 9 - 3}}


def test_the_curves_take_medians_without_the_first_round_and_the_limits_from_the_same_rounds(monkeypatch):
    """Each worker answers 1, 2, 3, ... seconds. In the first round the first task is asked three times. So in rounds 1,
    2 and 3 the limits answer 7, 11, 15 to the first task, 8, 12, 16 to the second, and so on."""
    workers = {name: Stopped(name, []) for name in ("limits", "numpy", "picogpt-style")}
    monkeypatch.setattr(bench, "start", lambda *_: contextlib.nullcontext(("", workers)))
    monkeypatch.setattr(curves, "CONTEXTS", (20, 256))  # the second one is too long for 3M
    monkeypatch.setattr(curves, "BATCHES", (2,))
    found = {(title, row): rates for title, row, rates in curves.measure("3M", 3, size_alone=False)}
    assert found == {
        ("size", "3M"): {"numpy": 1 / 9, "uncached": 1 / 7, **curves.predicted({"B": 11, "F": 12}, HPARAMS, N_3M, 10)},
        ("context", 20): {
            "numpy": 1 / 10,
            "uncached": 1 / 8,
            **curves.predicted({"B": 13, "F": 12}, HPARAMS, N_3M, 20),
        },
        ("batch", 2): {"numpy": 2 / 11, "predicted": 2 / 14},
    }
    asked = [question for question in workers["limits"].log if question[1] == "one_product"]
    assert asked == 4 * [("limits", "one_product", 256)]
