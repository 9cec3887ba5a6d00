"""Files: nothing of the user's is deleted, one writer at a time, and nothing that hangs is opened."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import GOLDEN, ROOT

import utils
from tools import models
from weights import files

HOLD = "import sys, time; from weights.files import locked\n"
HOLD += "with locked(sys.argv[1]): print('in', flush=True); time.sleep(60)"


def hold(folder):
    """A process that is inside locked(folder)."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    return process


def stop(process, how=signal.SIGKILL):
    process.send_signal(how)
    process.wait()
    process.stdout.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- Nothing of the user's is deleted ----


def test_what_is_named_part_stays(tmp_path, command):
    for name in ("mine.part", ".mine.part", ".mine.00000000.part-of-me"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    arguments = ["3M", str(tmp_path / "mine"), "--layout", "hf"]
    assert command(*arguments, main=models.convert)[0] == 0
    for name in ("mine.part", ".mine.part", ".mine.00000000.part-of-me"):
        assert (tmp_path / name / "thesis.txt").read_text() == "years of work"
    assert len(names(tmp_path)) == 4


def test_a_file_named_part_stays(tmp_path):
    (tmp_path / "config.json.part").write_text("mine")
    files.write_text(tmp_path / "config.json", "new")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "config.json") as part:
        part.write_text(f"newer {1 // 0}")
    assert (tmp_path / "config.json.part").read_text() == "mine"
    assert names(tmp_path) == ["config.json", "config.json.part"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_new_files_and_folders_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").write_text("")
    with files.new_folder(tmp_path / "new") as folder:
        files.write_text(folder / "file", "")
    for name in (".", "file"):
        assert (tmp_path / "new" / name).stat().st_mode == (tmp_path / "usual" / name).stat().st_mode


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    def make():
        with files.new_folder(tmp_path / "new") as folder:
            (folder / "file").write_text("ours")
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "file").write_text("theirs")

    with pytest.raises(OSError, match=r"cannot make .*new"):
        make()
    assert (tmp_path / "new" / "file").read_text() == "theirs"
    assert names(tmp_path) == ["new"]


def test_an_interrupted_folder_leaves_nothing(tmp_path):
    def make():
        with files.new_folder(tmp_path / "deep" / "new") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make()
    assert names(tmp_path / "deep") == []


# ---- One writer at a time ----


def test_a_second_writer_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    first = hold(tmp_path / "run")
    try:
        with pytest.raises(OSError, match=r"is writing into .*run: wait"), files.locked(tmp_path / "run"):
            pass
        with files.locked(tmp_path / "other"):
            pass
    finally:
        stop(first)
    with files.locked(tmp_path / "run"), pytest.raises(OSError, match="another run"), files.locked(tmp_path / "run"):
        pass
    assert set(names(tmp_path)) <= {".run.lock"}  # the file of the one that was killed may stay, and is empty


def test_a_writer_that_ends_by_itself_leaves_no_lock_file(tmp_path):
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path / "new" / "run"):
        raise ZeroDivisionError
    assert names(tmp_path / "new") == []


def test_a_lock_file_that_was_there_before_stays(tmp_path):
    (tmp_path / ".run.lock").write_text("mine")
    with files.locked(tmp_path / "run"):
        pass
    assert (tmp_path / ".run.lock").read_text() == "mine"


def test_a_lock_file_that_is_removed_while_another_waits_is_no_lock(tmp_path, monkeypatch):
    """The first run removes its lock file between the second's opening and locking it."""
    genuine = files.lock

    def late(file):
        (tmp_path / ".run.lock").unlink()
        genuine(file)

    monkeypatch.setattr(files, "lock", late)
    with pytest.raises(OSError, match="another run"), files.locked(tmp_path / "run"):
        pass


def test_relative_and_absolute_names_are_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = hold(tmp_path / "run")
    try:
        for name in ("run", "./run", "x/../run"):
            with pytest.raises(OSError, match="another run"), files.locked(name):
                pass
    finally:
        stop(first)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    """Both kinds: a folder in the making, and a file that was being replaced in a folder."""
    code = (
        "import os, pathlib, signal, sys; from weights import files; out = pathlib.Path(sys.argv[1])\n"
        "with files.locked(out), {} as part: print(part); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "run").mkdir()
    for block in ("files.new_folder(out)", "files.replacing(out / 'a.npz')"):
        subprocess.run([sys.executable, "-c", code.format(block), str(tmp_path / "run")], cwd=ROOT)
    left = [path for path in tmp_path.rglob("*.part") if path.is_dir()]
    assert [path.parent.name for path in left] in ([tmp_path.name, "run"], ["run", tmp_path.name], ["run"])
    (tmp_path / ".running.abcdefgh.part").mkdir()
    with files.locked(tmp_path / "run"):
        assert not any(path.exists() for path in left)
    assert (tmp_path / ".running.abcdefgh.part").exists(), "another run's"


def test_two_conversions_into_one_folder(tmp_path, command):
    first = hold(tmp_path / "out")
    try:
        status, out, err = command("3M", str(tmp_path / "out"), "--layout", "hf", main=models.convert)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert "another run is writing into" in err
    finally:
        stop(first)
    assert command("3M", str(tmp_path / "out"), "--layout", "hf", main=models.convert)[0] == 0


def test_two_downloads_into_one_folder(tmp_path, command):
    first = hold(tmp_path / "124M")
    arguments = ["x", "--model_size", "124M", "--models_dir", str(tmp_path), "--base_url", "http://127.0.0.1:1"]
    try:
        status, out, err = command(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert "another run is writing into" in err
    finally:
        stop(first)


# ---- Nothing that hangs is opened ----


@pytest.fixture
def ten_seconds():
    """Ends a test that hangs."""

    def too_long(*_):
        raise AssertionError("took more than ten seconds")

    if not hasattr(signal, "SIGALRM"):
        pytest.skip("needs signal.alarm")
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


TF = ("hparams.json", "encoder.json", "vocab.bpe", "checkpoint", utils.INDEX, utils.DATA)
HF = ("config.json", "generation_config.json", "vocab.json", "merges.txt", "model.safetensors")
MORE = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
REPLACEMENTS = {
    "pipe": (os.mkfifo if hasattr(os, "mkfifo") else None, "a pipe or a device, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a pipe or a device, not a file"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "endless": (lambda path: path.touch() or os.truncate(path, 2**33), ""),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n" + 99 * "0"), "git-lfs"),
}


@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize(("layout", "name"), [*(("tf", name) for name in TF), *(("hf", name) for name in HF + MORE)])
def test_a_file_that_is_none_is_named(tmp_path, command, ten_seconds, layout, name, kind):
    folder = shutil.copytree(GOLDEN / ("" if layout == "tf" else layout), tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    replace, reason = REPLACEMENTS[kind]
    replace(folder / name)
    status, out, err = command("Once", "--model_size", str(folder))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert name in err
    assert reason in err
    assert command(str(folder), main=models.verify)[0] == 1


@pytest.mark.parametrize("content", ["[" * 10**6, "[" + "[]," * 2_500_000 + "0]", '{"a": ' + "9" * 4000 + "}"])
def test_json_made_to_cost_time(tmp_path, content, ten_seconds):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(OSError, match=r"x\.json"):
        utils.tensorflow.read_hparams(tmp_path / "x.json")
