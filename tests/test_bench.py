"""The benchmark measures what it says; how fast anything is, no test asserts."""

import json

import pytest
from conftest import GOLDEN, oracle

import gpt2
from inference import kv_cache
from tools import bench, curves


@pytest.fixture(scope="module")
def params():
    return bench.random_params(bench.HPARAMS["3M"])


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
    text = "\n".join(bench.report(found, list(rates["decode, prompt 10"])))
    assert "| decode, prompt 10 |" in text


def test_the_picture(tmp_path):
    oracle("matplotlib")
    rates = {name: {"median": rate} for name, rate in (("limits", 50.0), ("numpy", 40.0), ("jax", 45.0))}
    found = {"tokens_per_second": {"decode, prompt 10": rates, "batch of 16, decode": rates}}
    bench.draw(found, [*rates], tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_random_models_are_the_same_each_time_and_load(params, tmp_path, command):
    assert (bench.random_params(bench.HPARAMS["3M"])["wte"] == params["wte"]).all()
    bench.save_random_model(tmp_path, bench.HPARAMS["3M"])
    assert command("The", "--n_tokens_to_generate", "1", "--model_size", str(tmp_path))[0] == 0


def test_transformers_computes_the_same_model(params):
    """Or its times would mean nothing."""
    pytest.importorskip("transformers")
    hparams = bench.HPARAMS["3M"]
    ids = bench.prompt(hparams, 10)
    theirs = bench.Transformers(hparams, params)
    logits = theirs.model(theirs.torch.tensor([ids])).logits[0].detach().numpy()
    assert abs(logits - gpt2.gpt2(ids, **params, n_head=hparams["n_head"])).max() < 1e-4


def test_ctranslate2_computes_the_same_model(params):
    pytest.importorskip("ctranslate2")
    hparams = bench.HPARAMS["3M"]
    ids = bench.prompt(hparams, 10)
    model = bench.CTranslate2(hparams, params)
    found = model.model.generate_batch(
        [[model.tokens[i] for i in ids]], max_length=8, min_length=8, sampling_topk=1, include_prompt_in_result=False
    )
    assert found[0].sequences_ids[0] == kv_cache.generate(ids, params, hparams["n_head"], 8)


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


def test_a_model_folder_may_be_measured():
    engines, folder, hparams = bench.check(str(GOLDEN), "", "", 5, "float32", "numpy", "")
    assert (engines, folder, hparams["n_layer"]) == (["numpy"], str(GOLDEN), 3)


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
        self.name, self.log, self.n = name, log, 0

    def ask(self, task, *arguments):
        self.log.append((self.name, task, *arguments))
        self.n += task != "memory"
        return self.n


def test_each_round_asks_for_every_row_and_the_first_is_not_counted():
    log, tasks = [], {"short": ("decode", [10], 1), "batch": ("batch", [16], 16)}
    workers = [Stopped("limits", log), Stopped("picogpt-style", log)]
    times, compiling, peak = bench.measure(workers, tasks, 2)
    a_round = [("limits", "decode", 10), ("picogpt-style", "decode", 10), ("limits", "batch", 16)]
    first = [("limits", "decode", 10)] * 3 + [("limits", "memory")]  # memory after decoding: later tasks take more
    assert log[:4] == first
    assert [question for question in log[8:] if question[1] != "memory"] == [a_round[2], *2 * a_round]
    assert times["short"] == {"limits": [5, 7], "picogpt-style": [4, 5]}
    assert times["batch"] == {"limits": [6, 8], "picogpt-style": []}
    assert peak == {"limits": 3, "picogpt-style": 3}
    assert [set(row) for row in compiling.values()] == [{"limits", "picogpt-style"}, {"limits"}]


def test_the_curves_do_not_count_the_rounds_in_which_engines_settle_in():
    workers = {name: Stopped(name, []) for name in ("limits", "numpy")}
    found = curves.ask(workers, ["numpy"], "decode", 10, 3)
    assert found == {"numpy": 4, "B": 7, "F": 8}, "the medians of rounds 3 to 5; the limits are asked twice in each"
