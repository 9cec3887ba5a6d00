"""The loop: from text to a folder that loads, and what an interruption costs. Tiny models, whole runs."""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, oracle

import backends
import utils
from training import data, optimizer, saves, train
from training import step as library
from training.loss import lm_loss
from training.model import forward_of
from weights.files import locked
from weights.params import flatten, tree_map

jax = oracle("jax")
BACKENDS = ["numpy", "jax"]

TINY = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--n_ctx", "16", "--batch_size", "4", "--warmup", "2"]
TINY += ["--eval_every", "3", "--n_steps", "9", "--learning_rate", "0.01", "--dropout", "0.2"]
TINY += ["--weight_decay", "0.3", "--beta2", "0.95", "--clip", "0.3", "--seed", "5"]
TEXT = "<|endoftext|>".join(f"Tom has {n} red balls. He gives one ball to Ann. Now Tom has less.\n" for n in range(60))


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """A data folder with the golden model's tokenizer, 512 tokens."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    data.main(str(folder / "text.txt"), out=str(folder / "ids"), encoder=str(GOLDEN))
    return folder / "ids"


@pytest.fixture(scope="module")
def runs(ids, tmp_path_factory):
    """A function of a backend's name, "" for none given: a finished run on it, (its folder, what it printed)."""
    flags = {
        flag.removeprefix("--"): float(n) if "." in n else int(n) for flag, n in zip(TINY[::2], TINY[1::2], strict=True)
    }

    @functools.cache
    def run(backend):
        folder, said = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
        with contextlib.redirect_stdout(said):
            train.main(str(ids), out=str(folder), backend=backend, **flags)
        return folder, said.getvalue()

    return run


@pytest.fixture(scope="module")
def whole(runs):
    """A finished run on JAX: (its folder, what it printed)."""
    return runs("")


MAKERS = {name: functools.cache(getattr(library, name)) for name in ("make_loss", "make_step", "make_mean_loss")}


@pytest.fixture(autouse=True, scope="module")
def one_program_for_runs_that_are_alike():
    """Runs with the same settings share what JAX has traced and compiled for the first of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, make in MAKERS.items():
            patch.setattr(library, name, make)
        cached = functools.cache(lambda text: forward_of(json.loads(text)))
        patch.setattr(train, "forward_of", lambda hparams: cached(json.dumps(hparams, sort_keys=True)))
        yield


@pytest.fixture
def start(command, ids, tmp_path, monkeypatch):
    """Starts a run in tmp_path/name: (exit status, stdout, stderr). It draws no loss.png; those of `runs` do."""
    monkeypatch.setattr(train.Run, "draw_losses", lambda run: None)

    def run(*flags, name="run", folder=ids):
        return command(str(folder), "--out", str(tmp_path / name), *TINY, *flags, main=train.main)

    return run


def losses(folder):
    return [(line["step"], line.get("loss"), line.get("validation")) for line in saves.read_metrics(folder)]


def params_of(folder):
    params = utils.load_encoder_hparams_and_params(str(folder))[2]
    return {path: np.array(array) for path, array in flatten(params).items()}


def test_from_text_to_a_model_that_writes(whole, command):
    folder, out = whole
    assert out.count("validation ") == 5
    assert out.count("validation loss") == 1
    assert f"{folder} is the model of step" in out
    status, text, err = command("Tom", "--n_tokens_to_generate", "5", "--model_size", str(folder))
    assert (status, err) == (0, "")
    assert text
    found = [(step, loss is not None) for step, loss, _ in losses(folder)]
    assert found == [(0, False), *((i, True) for i in (1, 2, 3)), (3, False), *((i, True) for i in (4, 5, 6)),
                     (6, False), *((i, True) for i in (7, 8, 9)), (9, False)]  # fmt: skip
    assert [line["tokens"] for line in saves.read_metrics(folder) if line["step"] == 9] == [9 * 4 * 16] * 2
    if pytest.importorskip("matplotlib"):
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    first, last = losses(folder)[0][2], losses(folder)[-1][2]
    assert first == pytest.approx(np.log(512), rel=0.02)
    assert last < first - 0.5


def test_the_flags_reach_the_step(whole, ids):
    """The same run from its parts, each given what the flags say: losses equal to the bit."""
    assert [loss for _, loss, _ in losses(whole[0]) if loss is not None] == steps_by_hand(ids, 9, 9)


def steps_by_hand(ids, *n_steps):
    """The losses of a run of TINY, taken step by step, each on the cosine of the number of steps given for it."""
    _, tokens = data.load(ids, 16)
    computing = backends.get("jax")
    loss_of = library.make_loss(computing, forward_of({"n_head": 2}), dropout_rate=0.2, dtype="float32")
    step = library.make_step(computing, loss_of, 4, seed=5, clip=0.3, weight_decay=0.3, beta2=0.95)
    hparams = {"n_vocab": 512, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 1}
    state, found = optimizer.init_state(tree_map(jax.numpy.array, library.init_params(hparams, seed=5))), []
    for n in n_steps:
        while len(found) < n:
            i = len(found)
            state, loss = step(
                state, data.draw(tokens["train"], 16, 4, seed=5, step=i), i, optimizer.learning_rate(i, 0.01, 2, n)
            )
            found.append(float(loss))
    return found


def test_both_layouts_hold_the_same_model(whole):
    folder = whole[0]
    hf = utils.load_gpt2_params_from_hf(folder / "model.safetensors", utils.read_hparams(folder))
    tf = params_of(folder)
    for path, array in flatten(hf).items():
        np.testing.assert_array_equal(array, tf[path])
    assert (folder / "vocab.json").read_bytes() == (folder / "encoder.json").read_bytes()
    assert saves.saved_steps(folder) == [6, 9], "the last two"
    assert not list(folder.parent.glob("**/*.part"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stopped_at", [4, 6])
def test_a_resumed_run_is_the_same_to_the_bit(stopped_at, backend, runs, start, tmp_path, monkeypatch):
    """Stopped between two saves, and right after one."""
    whole, take_step = runs(backend), train.Run.take_step

    def interrupted(run):
        if run.counters["step"] == stopped_at:
            raise KeyboardInterrupt
        return take_step(run)

    monkeypatch.setattr(train.Run, "take_step", interrupted)
    assert start("--backend", backend)[0] == 130
    monkeypatch.setattr(train.Run, "take_step", take_step)
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')  # as a kill might leave it
    assert start("--backend", backend, "--resume")[0] == 0
    assert losses(tmp_path / "run") == losses(whole[0])
    resumed = params_of(tmp_path / "run")
    assert all(np.array_equal(array, resumed[path]) for path, array in params_of(whole[0]).items())


def test_a_run_on_numpy_is_that_on_jax(runs):
    for (_, *found), (_, *expected) in zip(losses(runs("numpy")[0]), losses(runs("jax")[0]), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_without_a_backend_named_jax_is_taken_if_it_is_installed(whole, start, tmp_path, monkeypatch):
    assert saves.load_run(whole[0])[1]["settings"]["backend"] == "jax"
    monkeypatch.setitem(sys.modules, "jax", None)
    status, _, err = start("--n_steps", "1")
    assert (status, err[:5]) == (0, "NumPy")
    assert saves.load_run(tmp_path / "run")[1]["settings"]["backend"] == "numpy"


def test_a_finished_run_goes_on_to_more_steps(whole, ids, start, tmp_path):
    """On the cosine of the new number, from the first new step on."""
    shutil.copytree(whole[0], tmp_path / "run")
    assert start("--resume", "--n_steps", "14")[0] == 0
    assert [loss for _, loss, _ in losses(tmp_path / "run") if loss is not None] == steps_by_hand(ids, 9, 14)
    assert saves.saved_steps(tmp_path / "run") == [12, 14]
    assert steps_by_hand(ids, 9, 14) != steps_by_hand(ids, 14), "the first steps were on another cosine"
    status, _, err = start("--resume", "--n_steps", "13")
    assert (status, "--n_steps 13 is fewer than this run has done: 14" in err) == (2, True)


@pytest.mark.parametrize(
    "damage",
    [b'{"step": 1, "tokens": 64, "lo', b"7", b"[]", b"null", b'{"tokens": 64}', b'{"step": "1", "tokens": 64}', b"\xff",
     b'{"step": 1, "tokens": 64, "loss": NaN}', b'{"step": 1, "tokens": true}', b"", b"[" * 100_000],
)  # fmt: skip
def test_a_damaged_line_of_metrics_is_noticed(damage, whole, start, tmp_path):
    """One line on stderr, which names it, and nothing is changed."""
    shutil.copytree(whole[0], tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], damage, *lines[2:]]))
    before = path.read_bytes()
    status, out, err = start("--resume", "--n_steps", "10")
    assert (status, out, err.count("\n")) == (1, "", 2), "the device, and the damage"
    assert f"{path}, line 3: damaged" in err
    assert path.read_bytes() == before
    path.write_bytes(b"\n".join(lines))
    assert start("--resume", "--n_steps", "10")[0] == 0


SAVING = """
import os, sys, numpy as np, safetensors.numpy
from weights.params import param_shapes, unflatten
from training import saves
hparams = {"n_vocab": 512, "n_ctx": 64, "n_embd": 64, "n_head": 2, "n_layer": 2}
for line in sys.stdin:  # the first step of a process that is to be killed
    if pid := os.fork():
        os.waitpid(pid, 0)
        print("dead", flush=True)
        continue
    print(os.getpid(), flush=True)
    for step in range(int(line), 10**6):
        params = unflatten({path: np.full(shape, step, np.float32) for path, shape in param_shapes(**hparams).items()})
        saves.save_best(sys.argv[1], step, hparams, params)
        saves.save_run(sys.argv[1], step, {"mean": params}, {"step": step})
        print(step, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_twenty_moments(tmp_path):
    """The folder loads each time, and the last step that was reported as saved is there, or the one after. The
    processes are forked from one that has everything imported."""
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    waits, step, pipes = random.Random(0), 0, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path)], cwd=ROOT, **pipes)
    for _ in range(20):
        print(step, file=parent.stdin, flush=True)
        pid, first = int(parent.stdout.readline()), int(parent.stdout.readline())
        time.sleep(waits.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        reported = [first, *map(int, iter(lambda: parent.stdout.readline().strip(), "dead"))][-1]
        assert reported >= first == step
        arrays, counters = saves.load_run(tmp_path)
        assert counters["step"] in (reported, reported + 1)
        assert len(arrays) == 28
        assert all((array == counters["step"]).all() for array in arrays.values())
        numbers = {number for array in params_of(tmp_path).values() for number in (array.min(), array.max())}
        assert len(numbers) == 1, "of one step, all of them"
        assert numbers <= {reported, reported + 1}
        step = counters["step"] + 1
    parent.communicate()


def test_a_full_disk_is_one_line_and_the_last_save_stays(whole, tmp_path, ids):
    """A limit on the size of files stands in for the disk: the params fit below it, the optimizer's state does not."""
    pytest.importorskip("resource")
    shutil.copytree(whole[0], tmp_path / "run")
    os.unlink(tmp_path / "run" / "training-9.npz")  # so that there is something left to do
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    code += "import cli; from training import train; cli.run(train.main, 'train')"
    arguments = [sys.executable, "-c", code, str(ids), "--out", str(tmp_path / "run"), *TINY]
    done = subprocess.run([*arguments, "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert saves.saved_steps(tmp_path / "run") == [6]
    assert params_of(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_loss_that_is_no_number_stops_the_run(start, tmp_path):
    status, _, err = start("--learning_rate", "1e30", "--clip", "1e30", "--warmup", "0")
    assert status == 2
    line = err.splitlines()[-1]
    assert "loss is" in line
    assert "at step" in line
    assert "with another --out and a --learning_rate below 1e+30" in line
    assert "stays as of step 0" in line
    assert all(np.isfinite(array).all() for array in params_of(tmp_path / "run").values())


def test_patience_ends_a_run_that_learns_by_heart_and_keeps_the_best(start, tmp_path):
    flags = ["--n_steps", "400", "--eval_every", "20", "--patience", "2", "--dropout", "0", "--learning_rate", "0.05"]
    status, out, _ = start(*flags)
    evaluations = [(step, loss) for step, _, loss in losses(tmp_path / "run") if loss is not None]
    best = min(evaluations, key=lambda pair: pair[1])
    assert status == 0
    assert evaluations[-1][0] < 400, "stopped"
    assert evaluations[-1][0] == best[0] + 2 * 20
    assert f"is the model of step {best[0]}, validation loss {best[1]:.4f}" in out
    assert f"model.ckpt-{best[0]}" in (tmp_path / "run" / "checkpoint").read_text()


def test_going_on_from_a_model(command, ids, tmp_path, golden):
    """Its first validation loss is that model's own, for the context that it is to have."""
    flags = ["--init_from", str(GOLDEN), "--n_steps", "1", "--batch_size", "2", "--eval_every", "1"]
    assert command(str(ids), "--out", str(tmp_path / "run"), *flags, "--n_ctx", "20", main=train.main)[0] == 0
    windows = data.consecutive(data.load(ids, 20)[1]["validation"], 20, 256)
    expected = [lm_loss(golden["params"], row, golden["hparams"]["n_head"]) for row in windows]
    assert losses(tmp_path / "run")[0][2] == pytest.approx(np.mean(expected), rel=1e-5)
    assert losses(tmp_path / "run")[2][2] != losses(tmp_path / "run")[0][2]
    encoder, hparams, _ = utils.load_encoder_hparams_and_params(str(tmp_path / "run"))
    assert (encoder.ids, hparams) == (golden["encoder"].ids, golden["hparams"] | {"n_ctx": 20})
    status, _, err = command(str(ids), "--out", str(tmp_path / "new"), *flags, "--n_ctx", "97", main=train.main)
    assert (status, "--n_ctx 97 is more than" in err) == (2, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n_embd", "15"], "--n_embd 15 cannot be shared among --n_head 2"),
        (["--n_ctx", "10000"], "fewer than --n_ctx 10000"),
        (["--dropout", "1"], "--dropout 1.0 is out of range"),
        (["--learning_rate", "0"], "--learning_rate 0.0 is out of range"),
        (["--batch_size", "0"], "--batch_size 0 is out of range"),
        (["--micro_batch_size", "3"], "--micro_batch_size 3 does not divide --batch_size 4"),
        (["--dtype", "float16"], "choose float32 or bfloat16"),
        (["--backend", "torch"], "unknown backend 'torch': choose numpy or jax"),
        (["--init_from", "3M"], "--n_layer has no effect: --init_from decides"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999 is out of range: 0 to 4294967295"),
        (["--micro_batch_size", "0"], "--micro_batch_size 0 does not divide"),
        (["--resume"], "has no run to resume"),
        (["--steps", "3"], "unknown flag --steps"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, start, tmp_path):
    status, out, err = start(*flags)
    assert (status, out) == (2, "")
    assert err.count("\n") <= 2, "the device, and the mistake"
    assert words in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_other_data_of_the_same_length_is_noticed(whole, ids, start, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.copytree(ids, tmp_path / "ids")
    shuffled = np.sort(np.fromfile(ids / "train.bin", "<u2"))
    shuffled.tofile(tmp_path / "ids" / "train.bin")
    status, _, err = start("--resume", folder=tmp_path / "ids")
    assert (status, "checksum of train.bin" in err) == (2, True)


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), MemoryError("1 byte")])
def test_too_little_memory_names_the_flag(error, start, monkeypatch):
    def full(run):
        raise error

    monkeypatch.setattr(train.Run, "begin", full)
    status, _, err = start()
    assert (status, err.splitlines()[-1][:18]) == (1, "not enough memory:")
    assert "--micro_batch_size" in err


def test_a_full_disk_met_by_the_metrics(start, tmp_path, monkeypatch):
    def full(run, line):
        run.folder = tmp_path / "nowhere"
        return log(run, line)

    log = train.Run.log
    monkeypatch.setattr(train.Run, "log", full)
    status, _, err = start()
    assert status == 1
    assert "metrics.jsonl: No such file or directory; what was saved before is unchanged" in err.splitlines()[-1]


def test_a_second_run_into_the_same_folder_is_refused(ids, start, tmp_path):
    """Whether it begins or resumes; the first goes on, and leaves no lock behind."""
    with locked(tmp_path / "run"):
        for flags in ([], ["--resume"]):
            status, out, err = start(*flags)
            assert (status, out) == (1, "")
            assert f"another run is writing into {tmp_path / 'run'}" in err.splitlines()[-1]
    with locked(tmp_path / "data"), pytest.raises(OSError, match="another run is writing"):
        data.main(str(ids.parent / "text.txt"), out=str(tmp_path / "data"), n_vocab=257)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("main", [train.main, data.main])
def test_nothing_named_is_one_line(main, command):
    status, out, err = command(main=main)
    assert (status, out, err.count("\n"), err[:5]) == (2, "", 1, "name ")


def test_another_tokenizer_than_the_models(command, ids, tmp_path):
    arguments = [str(ids), "--out", str(tmp_path / "run"), "--init_from", "3M"]
    status, _, err = command(*arguments, main=train.main)
    assert status == 2
    assert "make it with --encoder 3M" in err


def test_resuming_with_other_settings_and_starting_over(whole, start, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    for flags, words in [
        (["--n_embd", "8"], "this run had n_embd 16, not 8: resume"),
        (["--seed", "1", "--n_ctx", "8"], "this run had seed 5, not 1; n_ctx 16, not 8: resume it"),
        (["--dropout", "0.3"], "this run had dropout 0.2, not 0.3"),
    ]:
        status, _, err = start(*flags, "--resume")
        assert (status, words in err) == (2, True)
    status, _, err = start()
    assert (status, "--resume goes on with its run" in err) == (2, True)
    assert losses(tmp_path / "run") == losses(whole[0])
    (tmp_path / "run" / "training-9.npz").write_bytes(b"PK\x03\x04 no zip")
    status, _, err = start("--resume")
    assert (status, "training-9.npz: no saved run, or a damaged one" in err) == (1, True)


def test_a_broken_model_to_start_from_is_one_line(command, ids, tmp_path, golden):
    model = tmp_path / "broken"
    shutil.copytree(GOLDEN, model)
    params = tree_map(lambda array: array * np.float32("nan"), golden["params"])
    saves.save_model(model, golden["hparams"], params, ["tf"])
    arguments = [str(ids), "--out", str(tmp_path / "run"), "--init_from", str(model)]
    status, out, err = command(*arguments, main=train.main)
    assert (status, out) == (1, "")
    assert "broken: the loss on train.bin is nan before the first step" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_no_file_of_training_imports_jax(ids, tmp_path):
    """With it missing, all but --backend jax works, in a process of its own."""
    code = "import sys; sys.modules['jax'] = sys.modules['optax'] = sys.modules['tokenizers'] = None\n"
    code += "from training import data, evaluate, loss, model, optimizer, saves, step, train\n"
    code += f"train.main({str(ids)!r}, out={str(tmp_path / 'run')!r}, n_steps=1, n_embd=6, n_ctx=8, batch_size=2)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])["step"] == 1


def test_train_only_changes_what_its_pattern_matches_and_resumes(command, ids, tmp_path, monkeypatch):
    """The file of the run has averages for what is trained, and no others."""
    monkeypatch.setattr(train.Run, "draw_losses", lambda run: None)
    flags = ["--init_from", str(GOLDEN), "--train_only", r"blocks.[1-2].mlp|ln_f.*", "--backend", "numpy"]
    flags += ["--n_ctx", "16", "--batch_size", "2", "--eval_every", "2", "--learning_rate", "0.01", "--warmup", "0"]

    def run(name, *more):
        status, _, err = command(str(ids), "--out", str(tmp_path / name), *flags, *more, main=train.main)
        assert status == 0, err
        return err

    assert "37,440 of 110,256 parameters are trained" in run("made", "--n_steps", "2")
    run("made", "--n_steps", "4", "--resume")
    assert [step for step, _, loss in losses(tmp_path / "made") if loss is not None] == [0, 2, 4]
    base = {path: np.array(array) for path, array in flatten(utils.load_folder(GOLDEN)[2]).items()}
    made = params_of(tmp_path / "made")
    changed = {path for path in made if path != ("wpe",) and not np.array_equal(made[path], base[path])}
    assert changed == {path for path in base if "ln_f" in path or ("mlp" in path and path[1] > 0)}
    with np.load(tmp_path / "made" / "training-4.npz") as file:
        kept = {name.partition(".")[2] for name in file.files if "." in name}
    assert kept == {".".join(map(str, path)) for path in changed}
    status, _, err = command(str(ids), "--out", str(tmp_path / "new"), "--train_only", "ln_f", main=train.main)
    assert (status, "name those to start from with --init_from" in err) == (2, True)
