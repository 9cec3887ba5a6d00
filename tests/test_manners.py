"""What every program here does with flags, Ctrl-C and Python's own options."""

import ast
import contextlib
import functools
import importlib
import inspect
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, oracle

import backends
import cli
import utils
from inference.__main__ import main as front_door
from training import data, saves

STORY = ["--model_size", "3M", "--n_tokens_to_generate", "3"]
ENDLESS = ["--model_size", "3M", "--n_tokens_to_generate", "1000000", "--nostop_at_eos", "--overflow", "slide"]
SOURCES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")).body
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[!t.]*/*.py"), *ROOT.glob("t[!e]*/*.py"))
}
GUARD = "if __name__ == '__main__':"
PROGRAMS = [path for path, body in SOURCES.items() if body and "cli.run(" in ast.unparse(body[-1])]


# ---- Flags ----


def parsed(*arguments):
    """The arguments that main would be called with."""
    found, signature = {}, inspect.signature(front_door)

    def stand_in(*texts, **flags):
        found.update(signature.bind(*texts, **flags).arguments)

    stand_in.__signature__ = signature
    cli.call(stand_in, "program", arguments)
    return found


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--json", "Once"], True),
        (["--nojson", "Once"], False),
        (["Once", "--json"], True),
        (["--json", "true", "Once"], True),
        (["--json", "True", "Once"], True),
        (["--json", "false", "Once"], False),
        (["Once", "--json", "False"], False),
        (["--json=true", "Once"], True),
        (["--json=FALSE", "Once"], False),
    ],
)
@pytest.mark.parametrize("flag", ["json", "stop_at_eos", "batch"])
def test_a_boolean_flag_may_stand_before_the_prompt(words, value, flag):
    assert parsed(*(word.replace("json", flag) for word in words)) == {"prompt": "Once", flag: value}


def test_flags_may_stand_in_any_order_and_spelling():
    """Each way to write a flag, in 500 random mixtures of flags and prompt."""
    rng = random.Random(0)
    ways = {
        "json": [(["--json"], True), (["--json", "false"], False), (["--nojson"], False), (["--json=true"], True)],
        "stop_at_eos": [(["--stop-at-eos"], True), (["--nostop_at_eos"], False), (["--stop_at_eos", "True"], True)],
        "seed": [(["--seed", "7"], 7), (["--seed=0"], 0)],
        "temperature": [(["--temperature", "1e-1"], 0.1), (["--temperature=2"], 2.0)],
        "length_penalty": [(["--length_penalty", "-1"], -1.0)],
        "stop": [(["--stop", "true", "--stop=--json"], ["true", "--json"]), (["--stop", "a b"], ["a b"])],
        "model_size": [(["--model_size", "-"], "-"), (["--model-size=3M"], "3M")],
        "prompt": [(["2019"], "2019"), (["-"], "-"), (["C# is"], "C# is"), (["--prompt=--json"], "--json"), ([""], "")],
    }
    for _ in range(500):
        chosen = {name: rng.choice(ways[name]) for name in rng.sample(sorted(ways), rng.randint(1, len(ways)))}
        arguments = itertools.chain.from_iterable(words for words, _ in chosen.values())
        assert parsed(*arguments) == {"prompt": ""} | {name: value for name, (_, value) in chosen.items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-json"], ["unknown flag -json", "--json"]),
        (["--nojson=true"], ["unknown flag --nojson"]),
        (["--notemperature"], ["unknown flag --notemperature"]),
        (["--json=perhaps"], ["--json must be True or False, not 'perhaps'"]),
        (["--json", "perhaps", "Once"], ["'Once' is one argument too many"]),
        (["--prompt=Once", "upon"], ["'upon' is one argument too many"]),
        (["--top_k", "--json"], ["--top_k needs a value"]),
    ],
)
def test_flags_that_are_mistaken(arguments, words):
    with pytest.raises(ValueError, match=r"--|many") as error:
        parsed(*arguments)
    assert all(word in str(error.value) for word in words), error.value


# ---- Help ----


def mains(path):
    """The functions that a program hands to cli.run, the last statement of its __main__ guard."""
    *before, last = SOURCES[path][-1].body
    namespace = {**vars(importlib.import_module(path.removesuffix(".py").replace("/", ".")))}
    exec(ast.unparse([node for node in before if isinstance(node, (ast.Import, ast.ImportFrom))]), namespace)
    found = eval(ast.unparse(last.value.args[0]), namespace)
    return found.values() if isinstance(found, dict) else [found]


@pytest.mark.parametrize("path", PROGRAMS)
def test_help_has_a_line_for_each_flag(path):
    """A docstring with two flags on one line would lose the second one."""
    for main in mains(path):
        flags = [*inspect.signature(main).parameters]
        shown = re.findall(r"^  --(\w+) (.*)$", cli.help_text(main, path), flags=re.MULTILINE)
        assert [name for name, _ in shown] == flags
        if main.__doc__:  # gpt2_pico.py has no text for its flags
            explained = re.findall(r"^ +(\w+): (\S.*)$", main.__doc__.partition("Args:\n")[2], flags=re.MULTILINE)
            assert [name for name, _ in explained] == flags
            assert all(line.endswith(text) for (_, line), (_, text) in zip(shown, explained, strict=True))


# ---- python -OO, -P and PYTHONSAFEPATH ----


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.parametrize("arguments", [["gpt2.py", "--help"], ["utils.py", "--help"], ["-m", "training.train", "-h"]])
def test_help_without_docstrings_is_one_line(arguments):
    done = python("-OO", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "-OO" in done.stderr


@pytest.mark.parametrize("program", [["gpt2.py", "Once"], ["gpt2_pico.py", "Once"]])
def test_programs_run_under_pythons_options(program):
    expected = python(*program, *STORY)
    for option, environment in (("-OO", {}), ("-P", {}), ("-B", {"PYTHONSAFEPATH": "1"})):
        done = python(option, *program, *STORY, **environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, expected.stdout, ""), (option, environment)


def test_utils_and_modules_without_the_folder_on_the_path():
    assert python("-P", "utils.py", "verify", "3M").returncode == 0
    done = python("-P", "-m", "training.train")
    assert (done.returncode, done.stderr.count("\n"), "No module named 'training'" in done.stderr) == (1, 1, True)


# ---- Ctrl-C ----


@pytest.mark.parametrize("path", PROGRAMS)
def test_each_program_takes_care_of_ctrl_c_before_it_imports_anything(path):
    first = next(node for node in SOURCES[path] if not isinstance(node, ast.Expr))  # after the docstring
    assert ast.unparse(first).startswith(GUARD)
    assert "cli.leave_on_ctrl_c()" in ast.unparse(first)


def test_all_programs_are_found():
    assert {"gpt2.py", "gpt2_pico.py", "utils.py", "training/train.py", "tools/bench.py"} <= set(PROGRAMS)


def start(*arguments, **environment):
    """A program in a process of its own, from the moment on when its first line has run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | environment, bufsize=0,  # so that communicate misses nothing after a read
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + (5 if Path("/proc/self/task").exists() else 0.3)
    while time.monotonic() < deadline and n_threads(process) < 2:  # the second thread is the one that waits for Ctrl-C
        time.sleep(0.001)
    return process


def n_threads(process):
    with contextlib.suppress(OSError):
        return len(list(Path(f"/proc/{process.pid}/task").iterdir()))
    return 0


def interrupt(process, seconds):
    """Sends SIGINT after so many seconds, and asserts how the process ends. Returns its stdout."""
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (seconds, process.returncode, err)
    assert time.monotonic() - started < 2, "at once, but for a busy machine"
    notices = (b"JAX ", b"the text has outgrown n_ctx")
    assert all(line.startswith(notices) for line in err.splitlines()), (seconds, err)
    return out


@functools.cache
def the_endless_text():
    return python("gpt2.py", "Once upon a time", *ENDLESS, "--n_tokens_to_generate", "200").stdout.encode()


def interrupt_at_random(backend, n, rng):
    """At n random moments: in the first 0.3 s, in the next ones, and after text has come. Each time the text must be
    the beginning of the right one."""
    oracle("jax")
    expected = the_endless_text()
    for i in range(n):
        process = start("gpt2.py", "Once upon a time", *ENDLESS, "--backend", backend)
        first = process.stdout.read(1) if i % 3 == 2 else b""
        seconds = rng.uniform(0, (0.3, {"numpy": 1, "jax": 3}[backend], 0.5)[i % 3])
        out = first + interrupt(process, seconds)
        assert out[:200] == expected[: len(out[:200])], (seconds, out)


@pytest.mark.parametrize("backend", backends.NAMES)
def test_ctrl_c_leaves_at_once_at_any_moment(backend):
    interrupt_at_random(backend, 3, random.Random(0))


@pytest.mark.trial
@pytest.mark.parametrize("backend", backends.NAMES)
def test_a_hundred_ctrl_c(backend):
    interrupt_at_random(backend, 100, random.Random())


def test_ctrl_c_while_compiled_code_runs():
    """One product of many seconds: Python's own handler would have to wait for its end."""
    code = "import cli; cli.leave_on_ctrl_c(); import numpy; print('A', end=''); a = numpy.ones((20000, 20000), 'f4')\n"
    interrupted = interrupt(start("-c", code + "a @ a"), 2)
    assert interrupted == b"A", "what was printed is written out"


def test_ctrl_c_where_it_is_ignored_stays_ignored():
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import cli; cli.leave_on_ctrl_c()\n"
    done = python("-c", code + "import os; os.kill(os.getpid(), signal.SIGINT); print('still here')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "still here\n", "")


def test_programs_with_temporary_folders_remove_them(tmp_path):
    process = start("-m", "tools.bench", "3M", "--rounds", "1000", TMPDIR=str(tmp_path))
    while not list(tmp_path.glob("*/model.ckpt.index")):
        time.sleep(0.01)
    interrupt(process, 0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n", [1, pytest.param(20, marks=pytest.mark.trial)])
def test_an_interrupted_training_run_leaves_a_model_that_loads_and_goes_on(n, tmp_path):
    (tmp_path / "text.txt").write_text("Tom has a red ball.\n<|endoftext|>" * 60, encoding="utf-8")
    data.main(str(tmp_path / "text.txt"), out=str(tmp_path / "ids"), encoder=str(GOLDEN))
    command = ["-m", "training.train", str(tmp_path / "ids"), "--out", str(tmp_path / "run"), "--n_ctx", "8"]
    command += ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--batch_size", "2", "--eval_every", "1"]
    rng, resume = random.Random(0), []
    for _ in range(n):
        process = start(*command, *resume)
        process.stdout.readline()  # step 0 is saved
        out = interrupt(process, rng.uniform(0, 1)).decode()
        steps = [int(line.split()[1]) for line in out.splitlines() if line.startswith("step ")]
        _, counters = saves.load_run(tmp_path / "run")
        assert counters["step"] >= (steps[-1] if steps else 0), "what was reported as saved is there"
        utils.load_encoder_hparams_and_params(str(tmp_path / "run"))
        resume = ["--resume"]
