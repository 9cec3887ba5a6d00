"""Damaged model folders by the hundred: a random change of a random file, then the front door or `verify`.

    python -m pytest -m trial tests/test_trials.py      1,000 of them; the ordinary suite has a sample
    python tests/test_trials.py 40 7                    40 of them with seed 7, a JSON line for each that went wrong

Each case runs in a process of its own, forked from one that has everything imported, with limits on time and memory.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "gpt2_random"
MAX_SECONDS, MAX_BYTES = 10, 500 * 2**20
CHECKED = {"model.ckpt.index", "model.ckpt.data-00000-of-00001"}  # the files whose bytes have checksums
ODD = (
    None,
    True,
    -1,
    0,
    1,
    7,
    511,
    512,
    2**31,
    2**70,
    0.5,
    1e400,
    -1e400,
    float("nan"),
    "",
    "x",
    "ÿ\0",
    [],
    {},
    [0] * 9,
)


# ---- Damage ----


def flip(data, rng):
    for _ in range(rng.choice([1, 1, 1, 20])):
        i = rng.randrange(len(data))
        data = data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]
    return data


def truncate(data, rng):
    return data[: rng.choice([0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data))])]


def cut_at_a_line(data, rng):
    lines = data.splitlines(keepends=True)
    return b"".join(lines[: rng.randrange(len(lines))])


def swap(data, rng):
    a, b, c, d = sorted(rng.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def insert(data, rng):
    i, n = rng.randrange(len(data) + 1), rng.choice([1, 4, 100, 5000])
    return data[:i] + rng.choice([rng.randbytes(n), b"\0" * n, b"\xff" * n, data[:n]]) + data[i:]


def remove(data, rng):
    i = rng.randrange(len(data))
    return data[:i] + data[i + rng.choice([1, 4, 100]) :]


def overwrite(data, rng):
    i, n = rng.randrange(len(data)), rng.choice([1, 4, 100, 5000])
    return (data[:i] + rng.choice([rng.randbytes(n), b"\0" * n, b"\xff" * n]) + data[i + n :])[: len(data)]


def edit_json(data, rng):
    """Replaces, removes, doubles or renames one value, however deep, in a JSON text or a safetensors header."""
    header = int.from_bytes(data[:8], "little") if data[8:9] == b"{" else None
    try:
        tree = json.loads(data if header is None else data[8 : 8 + header])
    except ValueError:
        return flip(data, rng)
    parent = tree
    while True:
        key = rng.choice([*parent] if isinstance(parent, dict) else range(len(parent)))
        if not (isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.8):
            break
        parent = parent[key]
    how = rng.randrange(4)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "x", "日", "\ud800", "<x>", "wte.weight"])] = parent.pop(key)
    elif how == 2:
        parent[key] = [parent[key]] * 2
    else:
        parent[key] = rng.choice(ODD)
    text = json.dumps(tree).encode()
    return text if header is None else len(text).to_bytes(8, "little") + text + data[8 + header :]


DAMAGES = (flip, truncate, cut_at_a_line, swap, insert, remove, overwrite, edit_json, edit_json)


def damage(folder, rng):
    """Changes a file of the folder. Returns (its name, what was done)."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    how = rng.choice([*DAMAGES, "delete", "replace"][: -2 if path.suffix == ".gguf" else None])
    if how == "delete":
        path.unlink()
    elif how == "replace":
        shutil.copy(rng.choice(sorted(folder.iterdir())), folder / "copy")
        os.replace(folder / "copy", path)
    else:
        path.write_bytes(how(path.read_bytes(), rng))
    return path.name, how if isinstance(how, str) else how.__name__


# ---- The folders ----


def make_folders(parent):
    """A folder in OpenAI's layout, two in Hugging Face's (an older one, and one as transformers 5 writes it), and one
    with a GGUF file."""
    for name, source in (("tf", GOLDEN), ("older", GOLDEN / "hf"), ("newer", GOLDEN / "hf")):
        shutil.copytree(source, parent / name, ignore=shutil.ignore_patterns("golden*", "hf"))
    from test_huggingface import split_into_shards, write_tokenizer_json
    from tiny_gguf import write_gguf

    (parent / "gguf").mkdir()
    write_gguf(parent / "gguf" / "tiny.gguf", kind="Q4_1")
    write_tokenizer_json(parent / "newer")
    split_into_shards(parent / "newer")


# ---- Running ----


def run(main, arguments, folder):
    """(status, stdout, stderr, seconds, bytes) of a program in a process of its own; status None: it took too long."""
    paths = [folder.parent / "stdout", folder.parent / "stderr"]
    began = time.monotonic()
    if not (pid := os.fork()):
        run_here(main, arguments, paths)
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        seconds = time.monotonic() - began
        if ended:
            break
        if seconds > 2 * MAX_SECONDS:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    status = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    used = usage.ru_utime + usage.ru_stime  # not the wall's: other processes may be busy
    return status, *(path.read_text("utf-8", "replace") for path in paths), used, usage.ru_maxrss * 1024


def run_here(main, arguments, paths):
    import cli

    for fd, path in zip((1, 2), paths, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.argv = ["program", *arguments]
    status = 99
    with contextlib.suppress(BaseException):
        try:
            cli.run(main, "program")
        except SystemExit as ended:
            status = ended.code
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def what_is_wrong(status, out, err, seconds, n_bytes, file, is_verify, sound):
    """A word for what must not be, or None. `sound`: what the undamaged folder gives."""
    if status is None or seconds > MAX_SECONDS:
        return "time"
    if n_bytes > MAX_BYTES:
        return "memory"
    if status not in (0, 1) or "Traceback" in err:
        return "traceback or status"
    if is_verify:
        return (
            None if err == "" and (status == 1) == (out.count("\n") >= 1 and "whole and sound" not in out) else "verify"
        )
    if status == 1 and (out or err.count("\n") != 1):
        return "lines"
    if status == 0 and file in CHECKED and out != sound:
        return "text in spite of a checksum"
    return None


def model_of(folder):
    """What --model_size names: the folder, or the GGUF file in it."""
    return str(next(folder.glob("*.gguf"), folder))


def trial(n, seed):
    """Yields (case, what is wrong with it or None)."""
    from inference.__main__ import main as front_door
    from tools.models import verify

    for name in ("fire", "google_crc32c", "safetensors", "safetensors.numpy", "tqdm", "gguf", "tokenizers"):
        __import__(name)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        make_folders(place)
        arguments = ["Once upon a time", "--n_tokens_to_generate", "12", "--model_size"]
        kinds = ("tf", "older", "gguf", "newer")
        sound = {name: run(front_door, [*arguments, model_of(place / name)], place / name) for name in kinds}
        for i in range(n):
            kind = kinds[i % 4]
            folder = shutil.copytree(place / kind, place / "damaged")
            file, how = damage(folder, rng)
            is_verify = rng.random() < 0.25
            words = [model_of(folder)] if is_verify else [*arguments, model_of(folder)]
            done = run(verify if is_verify else front_door, words, folder)
            wrong = what_is_wrong(*done, file, is_verify, sound[kind][1])
            if sound[kind][0] != 0:
                wrong = "the undamaged folder"
            case = {"case": i, "folder": kind, "file": file, "how": how, "verify": is_verify, "wrong": wrong}
            yield case | dict(zip(("status", "out", "err", "seconds", "bytes"), done, strict=True))
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    cases = [*trial(int(sys.argv[1]), int(sys.argv[2]))]
    print(*(json.dumps(case) for case in cases if case["wrong"]), sep="\n")
    summary = {str(status): sum(case["status"] == status for case in cases) for status in (0, 1)}
    summary |= {"seconds": max(case["seconds"] for case in cases), "bytes": max(case["bytes"] for case in cases)}
    print(json.dumps(summary))
    sys.exit(0)


# ---- Tests ----

import pytest  # noqa: E402


def check(n, seed):
    """Runs n cases as a program, so that what other tests have imported does not count."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(n), str(seed)], env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    *wrong, summary = done.stdout.splitlines() or [done.stderr]
    assert [line for line in wrong if line] == [], wrong[:3]
    assert json.loads(summary)["1"] > n / 3, "most damage is noticed"
    return summary


def test_forty_damaged_folders():
    check(40, seed=0)


@pytest.mark.trial
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_thousand_damaged_folders(seed):
    print(check(250, seed))
