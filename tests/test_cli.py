"""The front door, as a user meets it: text on stdout, everything else on stderr, one line for a mistake."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, random_params

import backends
import cli
import gpt2
import gpt2_pico
import utils
from inference.__main__ import main as front_door
from tools import models
from weights.params import DTYPES

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
        (["--n_tokens_to_generate"], ["--n_tokens_to_generate needs a value"]),
        (["--n_tokens", "5"], ["unknown flag --n_tokens", "--n_tokens_to_generate"]),
        (["--whatever"], ["unknown flag --whatever", "--help"]),
        (["--=3"], ["unknown flag --"]),
        (["-x"], ["unknown flag -x"]),
        (["--prompt_file"], ["--prompt_file needs a value"]),
        (["--stop", "--json"], ["--stop needs a value"]),
        (["--stop", ""], ["empty --stop"]),
        (["--bad_words", " "], ["--bad_words is empty"]),
        (["--temperature", "-1"], ["temperature -1.0", "0 "]),
        (["--temperature", "warm"], ["--temperature must be a number", "'warm'"]),
        (["--temperature", "nan"], ["temperature nan"]),
        (["--top_k", "40"], ["top_k 40 has no effect at temperature 0"]),
        (["--top_p", "0.9"], ["top_p 0.9 has no effect at temperature 0"]),
        (["--seed", "1"], ["--seed has no effect at --temperature 0"]),
        (["--temperature", "1", "--top_k", "-1"], ["--top_k", "0 or more"]),
        (["--temperature", "1", "--top_p", "1.5"], ["top_p 1.5"]),
        (["--temperature", "1", "--seed", "-1"], ["--seed", "0 or more"]),
        (["--repetition_penalty", "0"], ["repetition_penalty 0.0"]),
        (["--min_new_tokens", "41"], ["--min_new_tokens 41", "40"]),
        (["--overflow", "wrap"], ["--overflow 'wrap'", "slide"]),
        (["--num_samples", "0"], ["--num_samples 0"]),
        (["--num_samples", "3"], ["all the same at --temperature 0"]),
        (["--num_beams", "0"], ["--num_beams 0"]),
        (["--num_beams", "3", "--temperature", "1"], ["--num_beams", "--temperature"]),
        (["--num_beams", "3", "--top_k", "5"], ["--num_beams", "--top_k"]),
        (["--num_beams", "3", "--stop", "x"], ["--num_beams", "--stop"]),
        (["--num_beams", "3", "--trace", "5"], ["--trace", "beams"]),
        (["--num_beams", "3", "--num_samples", "2"], ["--num_beams is for one prompt", "--num_samples"]),
        (["--length_penalty", "2"], ["no effect without --num_beams"]),
        (["--early_stopping", "true"], ["no effect without --num_beams"]),
        (["--num_beams", "3", "--early_stopping", "maybe"], ["--early_stopping 'maybe'"]),
        (["--num_beams", "3", "--length_penalty", "inf"], ["--length_penalty inf"]),
        (["--num_beams", "3", "--length_penalty=-1000"], ["--length_penalty -1000.0", "-10 to 10"]),
        (["--num_beams", "1000000"], ["--num_beams 1000000", "1024"]),
        (["--num_samples", "99999999999", "--temperature", "1"], ["--num_samples", "1024"]),
        (["--trace", "1000000000"], ["--trace 1000000000", "20"]),
        (["--repetition_penalty", "1e-320"], ["repetition_penalty", "0.01 to 100"]),
        (["--base_url", "nonsense"], ["--base_url 'nonsense'"]),
        (["--model_size", "x" * 5000], ["no model 'xxx", "Choose from"]),
        (["--batch"], ["--batch", "--prompt_file"]),
        (["--num_samples", "2", "--temperature", "1", "--overflow", "slide"], ["--overflow", "one text"]),
        (["--stop_at_eos", "perhaps"], ["'perhaps'"]),
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


@pytest.mark.parametrize(("content", "word"), [(b"", "no lines"), (b"a\n\xff\n", "no UTF-8"), (b"\n", "no lines")])
def test_prompt_files_that_are_no_batch(content, word, command, tmp_path):
    (tmp_path / "prompts").write_bytes(content)
    status, out, err = command("--prompt_file", str(tmp_path / "prompts"), "--batch", *STORY)
    assert (status, out, err.count("\n"), word in err) == (2, "", 1, True)


def test_a_batch_is_each_prompt_alone_in_their_order(command, tmp_path):
    prompts = ["Once upon a time", "The cat", "", "Lily and Ben went to the park. They"]
    (tmp_path / "prompts").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    alone = [command(prompt, *STORY)[1].removesuffix("\n") for prompt in prompts]
    flags = ["--prompt_file", str(tmp_path / "prompts"), "--batch", *STORY]
    assert command(*flags) == (0, "\n---\n".join(alone) + "\n", "")
    lines = [json.loads(line) for line in command(*flags, "--json")[1].splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    assert [line["text"] for line in lines] == alone
    keys = {"prompt", "text", "token_ids", "log_probabilities", "stop_reason", "seconds"}
    assert all(set(line) == keys for line in lines)
    assert all(len(line["token_ids"]) == len(line["log_probabilities"]) == 12 for line in lines)
    assert lines[0]["stop_reason"] == "length"


def test_sample_i_has_seed_plus_i(command):
    warm = ["Once upon a time", *STORY, "--temperature", "0.9", "--top_k", "40", "--top_p", "0.95"]
    alone = [command(*warm, "--seed", str(seed))[1].removesuffix("\n") for seed in (5, 6, 7)]
    assert len(set(alone)) == 3
    assert command(*warm, "--seed", "5", "--num_samples", "3")[1] == "\n---\n".join(alone) + "\n"


def test_beams(command):
    flags = ["Once upon a time", *STORY, "--num_beams", "4"]
    lines = [json.loads(line) for line in command(*flags, "--json")[1].splitlines()]
    assert len(lines) == 4
    assert [line["score"] for line in lines] == sorted((line["score"] for line in lines), reverse=True)
    assert command(*flags) == (0, lines[0]["text"] + "\n", "")


def test_stop_and_bad_words_may_be_given_several_times(command):
    assert command("Once upon a time", *STORY, "--stop", "girl", "--stop", " little")[1] == ", there was a\n"
    out = command("Once upon a time", *STORY, "--bad_words", "little", "--bad_words=girl")[1]
    assert "little" not in out
    assert "girl" not in out


def test_min_new_tokens_and_stop_at_eos(command):
    flags = ["Once upon a time", "--model_size", "3M", "--n_tokens_to_generate", "200", "--json"]
    stopped = json.loads(command(*flags)[1])
    assert stopped["stop_reason"] == "end_of_text"
    longer = json.loads(command(*flags, "--min_new_tokens", str(len(stopped["token_ids"]) + 5))[1])
    assert len(longer["token_ids"]) > len(stopped["token_ids"]) + 4
    assert "<|endoftext|>" in json.loads(command(*flags, "--nostop_at_eos")[1])["text"]


def test_sliding_goes_on_and_says_so_once(command):
    flags = ["Once upon a time", "--model_size", "3M", "--n_tokens_to_generate", "600", "--nostop_at_eos", "--json"]
    status, out, err = command(*flags, "--overflow", "slide")
    assert (status, len(json.loads(out)["token_ids"]), err.count("\n")) == (0, 600, 1)
    assert "n_ctx" in err


def test_trace_is_an_aligned_table_on_stderr(command):
    status, out, err = command("Once upon a time", *STORY, "--trace", "5")
    assert (status, out) == command("Once upon a time", *STORY)[:2]
    lines = err.splitlines()
    assert len(lines) == 1 + 12
    assert len({len(line.rstrip()) for line in lines[1:]}) == 1
    assert "\033" not in err
    assert lines[1].split()[:2] == ["1", ","]
    assert lines[3].split()[1] == ",␣there"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_fits_a_screen_and_explains_every_flag(flag, command):
    status, out, err = command(flag)
    assert status == 0
    text = out + err
    for name in front_door.__kwdefaults__:
        assert f"--{name} " in text
    assert text.count("\n") < 40
    assert max(map(len, text.splitlines())) <= 128
    assert "surplus" not in text.lower(), "what strict adds is not for the user"


@pytest.mark.parametrize("arguments", [[], ["verfy"], ["-x"]])
def test_a_command_that_is_none(arguments, command):
    status, out, err = command(*arguments, main={"verify": models.verify})
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "verify" in err


def test_pico_runs_the_same_way(command):
    status, out, _ = command("Once upon a time", *STORY, main=gpt2_pico.main)
    assert (status, out) == command("Once upon a time", *STORY)[:2]
    long = ["Once upon a time", "--model_size", "3M", "--n_tokens_to_generate", "230"]
    assert command(*long, main=gpt2_pico.main)[:2] == command(*long)[:2]
    assert command("Once", "--model_size", "3M", "--n_tokens_to_generate", "300", main=gpt2_pico.main)[0] == 2


def test_the_front_door_from_python(capsys):
    gpt2.main("Once upon a time", model_size="3M", n_tokens_to_generate=3)
    assert capsys.readouterr().out == ", there was\n"


def test_booleans_and_floats():
    assert cli.convert("x", bool, "True") is True
    assert cli.convert("x", bool, "False") is False
    assert cli.convert("x", float, "1e-3") == 0.001
    for kind, text in [(bool, "yes"), (float, "a")]:
        with pytest.raises(ValueError, match=text):
            cli.convert("x", kind, text)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (">&-", (0, "", "")),
        ("2>&-", (0, " upon a\n", "")),
        ("--trace 2 2>&-", (0, " upon a\n", "")),
        ("--top_k 3 2>&-", (2, "", "")),
    ],
)
def test_a_stream_that_is_closed(flags, expected):
    line = f"exec '{sys.executable}' gpt2.py Once --model_size 3M --n_tokens_to_generate 2 {flags}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == expected


@pytest.mark.parametrize(
    "mistake", [["--model_size", "nope"], ["--n_tokens_to_generate", "999"], ["--prompt_file", "x"]]
)
def test_mistakes_are_one_line_on_jax_too(mistake, command):
    flags = mistake if "--model_size" in mistake else [*mistake, "--model_size", "3M"]
    status, out, err = command("Once", "--backend", "jax", *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_batch_names_the_line_that_is_too_long(command, tmp_path):
    (tmp_path / "prompts").write_text("a\n" + "b " * 300 + "\n", encoding="utf-8")
    status, out, err = command("--prompt_file", str(tmp_path / "prompts"), "--batch", *STORY)
    assert (status, out, err.count("\n"), err.startswith("line 2: prompt ")) == (2, "", 1, True)


def test_lines_end_at_newlines_only_and_a_mark_of_windows_is_no_text(command, tmp_path):
    (tmp_path / "prompts").write_bytes("\ufeffOne\u2028two\x0cthree\r\nfour\n".encode())
    out = command("--prompt_file", str(tmp_path / "prompts"), "--batch", "--json", *STORY)[1]
    assert [json.loads(line)["prompt"] for line in out.strip().split("\n")] == ["One\u2028two\x0cthree", "four"]


def test_trace_of_the_end_and_of_what_cannot_be_printed(command):
    err = command("Once upon a time", "--model_size", "3M", "--n_tokens_to_generate", "250", "--trace", "2")[2]
    assert err.splitlines()[-1].split("(the end)")[1].split()[0] == "1", "the rank"
    wild = ["--temperature", "1000000", "--seed", "3", "--n_tokens_to_generate", "60", "--trace", "5"]
    err = command("Once", "--model_size", "3M", *wild)[2]
    assert all(character.isprintable() for line in err.splitlines() for character in line)


def test_too_little_memory_is_one_line(command, monkeypatch):
    def full(*_):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr("inference.kv_cache.make_model", full)
    assert command("Once", *STORY) == (1, "", "not enough memory: Unable to allocate 9 TiB\n")


def start(*arguments, **options):
    command = [sys.executable, "gpt2.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


ENDLESS = ["--model_size", "3M", "--n_tokens_to_generate", "1000000", "--nostop_at_eos", "--overflow", "slide"]


def test_text_is_streamed_and_ctrl_c_leaves_quietly():
    with start("Once upon a time", *ENDLESS) as process:
        first = process.stdout.read(1)
        assert first == b","
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert b"Traceback" not in err


def test_a_reader_that_has_had_enough():
    with start("Once upon a time", *ENDLESS) as process:
        assert process.stdout.read(1) == b","
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert b"Traceback" not in process.stderr.read()


def test_it_runs_from_any_folder_and_under_any_encoding(tmp_path):
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    with start("🙂 é", *STORY, env=environment) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    command = [sys.executable, str(ROOT / "gpt2.py"), "🙂 é", *STORY]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout == out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model of one layer, and one with two prompts, of different lengths."""
    folder = tmp_path_factory.mktemp("tiny")
    hparams = {"n_vocab": 512, "n_ctx": 32, "n_embd": 8, "n_head": 2, "n_layer": 1}
    utils.save_tokenizer(GOLDEN, folder, ["tf"])
    utils.save_model(folder, hparams, random_params(**hparams), ["tf"])
    (folder / "prompts.txt").write_text("ab\nc\n", encoding="utf-8")
    return folder


MODES = {
    "one text": (["ab"], 1),
    "batch": (["--batch", "--prompt_file", "prompts.txt"], 2),
    "samples": (["ab", "--num_samples", "3", "--temperature", "1", "--seed", "2"], 3),
    "beams": (["ab", "--num_beams", "2"], 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_every_dtype_on_both_backends(mode, dtype, tiny, command, monkeypatch):
    monkeypatch.chdir(tiny)
    arguments, n_texts = MODES[mode]
    flags = ["--model_size", ".", "--n_tokens_to_generate", "4", "--dtype", dtype, "--json"]
    found = []
    for backend in backends.NAMES:
        status, out, err = command(*arguments, *flags, "--backend", backend)
        assert (status, err.count("\n")) == (0, int(backend == "jax")), err
        found.append([json.loads(line)["token_ids"] for line in out.splitlines()])
    assert [len(texts) for texts in found] == [n_texts] * 2
    assert {len(ids) for texts in found for ids in texts} == {4}
    assert dtype == "bfloat16" or found[0] == found[1]


@pytest.mark.parametrize("text", ["Once upon a time", "Once upon a time\n", "\ufeffOnce upon a time\r\n"])
def test_piped_stdin_is_the_prompt_if_nothing_else_is(text, command):
    expected = command("Once upon a time", *STORY)[1]
    done = subprocess.run(
        [sys.executable, "gpt2.py", *STORY], cwd=ROOT, input=text.encode(), capture_output=True, check=True
    )
    assert (done.stdout.decode(), done.stderr) == (expected, b"")


def test_piped_stdin_is_left_alone_if_there_is_a_prompt(command, monkeypatch, tmp_path):
    """As in `while read line; do python gpt2.py "$line"; done < file`: the rest of the file is the loop's."""
    (tmp_path / "file").write_text("another prompt", encoding="utf-8")
    expected = command("Once upon a time", *STORY)
    with open(tmp_path / "file", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert command("Once upon a time", *STORY) == expected
        assert file.read() == "another prompt"
        file.seek(0)
        assert command(*STORY) == command("another prompt", *STORY)
