"""The front door, as a user meets it: text on stdout, everything else on stderr, one line for a mistake."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import cli
import gpt2
import gpt2_pico
import utils

STORY = ["--model_size", "3M", "--n_tokens_to_generate", "12"]
MANGLED_BY_FIRE = ["2019", "None", "1e5", "hello,world", "Yes, no", "[a]", "{a: 1}", "'quoted'", '"q"', "C# is"]
MANGLED_BY_FIRE += [
    "hello # x",
    "-",
    "--help me",
    "--help",
    "-h",
    "-x",
    "--",
    "-1",
    "a\tb\nc",
    "True",
    "1_000",
    "日本",
    "0x10",
]


@pytest.mark.parametrize("prompt", MANGLED_BY_FIRE)
def test_prompts_reach_the_encoder_unchanged(prompt, command, monkeypatch):
    seen = []
    monkeypatch.setattr("encoder.Encoder.encode", lambda self, text: seen.append(text) or [1])
    words = [f"--prompt={prompt}"] if prompt.startswith("-") else [prompt]
    assert command(*words, *STORY)[0] == 0
    assert seen == [prompt]


def test_the_text_alone_is_on_stdout(command, storyteller):
    encoder, hparams, params = storyteller
    status, out, err = command("Once upon a time", *STORY)
    assert (status, err) == (0, "")
    assert (
        out == encoder.decode(gpt2.generate(encoder.encode("Once upon a time"), params, hparams["n_head"], 12)) + "\n"
    )


def test_without_124m_and_without_network_the_embedded_model_answers(command, offline, tmp_path):
    status, out, err = command("Once upon a time", "--models_dir", str(tmp_path))
    assert (status, err.count("\n")) == (0, 1)
    assert out.startswith(", there was a little")
    assert "3M (embedded) answers instead of 124M" in err
    assert "--base_url" in err
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_was_named_is_never_replaced(command, offline, tmp_path):
    status, out, err = command("Once", "--model_size", "124M", "--models_dir", str(tmp_path))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "cannot fetch https://" in err
    assert "files into" in err, "the offline way"


def test_a_story_ends_at_end_of_text(command, storyteller):
    status, out, _ = command("Once upon a time", "--model_size", "3M", "--n_tokens_to_generate", "250")
    assert status == 0
    assert "<|endoftext|>" not in out
    assert len(storyteller[0].encode(out)) < 240, "this one ends before it must"


def test_an_empty_prompt_starts_from_end_of_text(command, storyteller):
    encoder, hparams, params = storyteller
    expected = encoder.decode(gpt2.generate([encoder.end_of_text], params, hparams["n_head"], 12)) + "\n"
    assert command(*STORY)[1] == command("", *STORY)[1] == expected


def test_prompt_files(command, monkeypatch, tmp_path):
    (tmp_path / "prompt.txt").write_text("Once upon a time", encoding="utf-8")
    expected = command("Once upon a time", *STORY)
    assert command("--prompt_file", str(tmp_path / "prompt.txt"), *STORY) == expected
    for dash in (["--prompt_file", "-"], ["--prompt_file=-"]):
        stdin = io.TextIOWrapper(io.BytesIO(b"Once upon a time"))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert command(*dash, *STORY) == expected


def test_a_prompt_that_ends_in_a_space_gets_a_hint(command):
    status, _, err = command("Once upon a time ", *STORY)
    assert (status, err.count("\n")) == (0, 1)
    assert "ends in a space" in err


def test_the_window_may_be_filled_exactly(command, storyteller):
    n_prompt = len(storyteller[0].encode("Once upon a time"))
    assert command("Once upon a time", "--model_size", "3M", "--n_tokens_to_generate", str(256 - n_prompt))[0] == 0
    status, out, err = command("Once upon a time", "--model_size", "3M", "--n_tokens_to_generate", str(257 - n_prompt))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"prompt {n_prompt} + {257 - n_prompt} new = 257 tokens > n_ctx 256" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n_tokens_to_generate", "-5"], ["n_tokens_to_generate", "-5"]),
        (["--n_tokens_to_generate", "9" * 30], ["9" * 30, "256"]),
        (["--n_tokens_to_generate", "many"], ["--n_tokens_to_generate", "a whole number", "'many'"]),
        (["--n_tokens_to_generate", "2.5"], ["a whole number", "'2.5'"]),
        (["--n_tokens_to_generate"], ["--n_tokens_to_generate", "a whole number"]),
        (["--n_tokens", "5"], ["unknown flag --n_tokens", "--n_tokens_to_generate"]),
        (["--whatever"], ["unknown flag --whatever", "--help"]),
        (["upon", "a"], ["'upon'", "quotes"]),
        (["--", "x"], ["--prompt="]),
        (["--prompt_file", "x"], ["two prompts"]),
        (["--base_url", "ftp://x", "--model_size", "1558M"], ["ftp://x", "http://"]),
        (["--model_size", "LICENSE"], ["LICENSE", "3M"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, words, command):
    status, out, err = command("Once", *(arguments if "--model_size" in arguments else ["--model_size=3M", *arguments]))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("make", "word"), [(Path.mkdir, "Is a directory"), (None, "No such file"), (b"\xff", "no UTF-8")]
)
def test_a_prompt_file_that_cannot_be_read(make, word, command, tmp_path):
    path = tmp_path / "prompt"
    if isinstance(make, bytes):
        path.write_bytes(make)
    elif make:
        make(path)
    status, out, err = command("--prompt_file", str(path), *STORY)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert str(path) in err
    assert word in err


def test_stdin_that_is_no_text(command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    status, out, err = command("--prompt_file=-", *STORY)
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_fits_a_screen_and_explains_every_flag(flag, command):
    status, out, err = command(flag)
    assert status == 0
    text = out + err
    for name in gpt2.main.__kwdefaults__:
        assert f"--{name}=" in text
    assert text.count("\n") < 60
    assert "surplus" not in text.lower(), "what strict adds is not for the user"


@pytest.mark.parametrize("arguments", [[], ["verfy"], ["-x"]])
def test_a_command_that_is_none(arguments, command):
    status, out, err = command(*arguments, main={"verify": utils.verify})
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "verify" in err


def test_pico_runs_the_same_way(command):
    status, out, _ = command("Once upon a time", *STORY, main=gpt2_pico.main)
    assert (status, out) == command("Once upon a time", *STORY)[:2]
    assert command("Once", "--model_size", "3M", "--n_tokens_to_generate", "300", main=gpt2_pico.main)[0] == 2


def test_booleans_and_floats():
    assert cli.convert("x", bool, "True") is True
    assert cli.convert("x", bool, "False") is False
    assert cli.convert("x", float, "1e-3") == 0.001
    for kind, text in [(bool, "yes"), (float, "a")]:
        with pytest.raises(ValueError, match=text):
            cli.convert("x", kind, text)


def start(*arguments, **options):
    command = [sys.executable, "gpt2.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_text_is_streamed_and_ctrl_c_leaves_quietly():
    with start("Once upon a time", "--model_size", "3M", "--n_tokens_to_generate", "250") as process:
        first = process.stdout.read(1)
        assert first == b","
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, b"")
        assert len(rest) < 900, "it was interrupted in the middle"


def test_a_reader_that_has_had_enough():
    with start("Once upon a time", "--model_size", "3M", "--n_tokens_to_generate", "250") as process:
        assert process.stdout.read(1) == b","
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_it_runs_from_any_folder_and_under_any_encoding(tmp_path):
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    with start("🙂 é", *STORY, env=environment) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    command = [sys.executable, str(ROOT / "gpt2.py"), "🙂 é", *STORY]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout == out


def test_nothing_that_is_heavy_is_imported_for_a_story():
    code = (
        "import sys, time; sys.argv = ['gpt2.py', 'Once', '--model_size', '3M', '--n_tokens_to_generate', '2']\n"
        "import gpt2, cli\n"
        "try: cli.run(gpt2.main, 'gpt2.py')\n"
        "except SystemExit: import json; print(json.dumps(sorted(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = json.loads(out.splitlines()[-1])
    assert not {"jax", "tensorflow", "matplotlib", "requests", "safetensors"} & set(loaded)
