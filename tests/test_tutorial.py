"""The code of docs/tutorial.md runs and prints what stands there, and its pictures can be drawn."""

import contextlib
import importlib.util
import io
import re

import pytest
from conftest import ROOT, oracle

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TUTORIAL, flags=re.MULTILINE | re.DOTALL)
QUOTATIONS = [block for block in BLOCKS if re.match(r"# \S+\.py\n", block)]
PROGRAMS = [block for block in BLOCKS if block not in QUOTATIONS]
PROSE = re.sub(r"^```.*?^```$", "", TUTORIAL, flags=re.MULTILINE | re.DOTALL)
PICTURES = re.findall(r"\]\(pictures/(\w+)\.png\)", TUTORIAL)


def outputs(program):
    """(what a program should print, the program without these lines)"""
    lines = program.splitlines()
    expected = [line[2:].removeprefix(" ") for line in lines if line.startswith("#:")]
    return expected, "\n".join(line for line in lines if not line.startswith("#:"))


def test_programs_print_what_stands_below_them(monkeypatch):
    oracle("jax")
    monkeypatch.chdir(ROOT)
    namespace = {}
    for program in PROGRAMS:
        if 'three_functions(backends.get("numpy"))' in program and not importlib.util.find_spec("backends.numpy_grad"):
            continue  # NumPy's own value_and_grad is not there yet
        expected, code = outputs(program)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "docs/tutorial.md", "exec"), namespace)
        assert [line.rstrip() for line in printed.getvalue().splitlines()] == expected, code


@pytest.mark.parametrize("block", QUOTATIONS)
def test_quotations_are_in_the_file_in_this_order(block):
    name, *lines = block.splitlines()
    source = iter([line.strip() for line in (ROOT / name[2:]).read_text(encoding="utf-8").splitlines()])
    for line in lines:
        assert line == "..." or line.strip() in source, line


def test_numbers_in_the_text_stand_in_code_too():
    """Decimal fractions, percentages and numbers of five digits and more."""
    numbers = set(re.findall(r"\b\d+\.\d+%?|\b\d+%|\b\d{1,3}(?:,\d{3})+\b", re.sub(r"\]\(.*?\)", "", PROSE)))
    code = "\n".join(BLOCKS)
    assert {number for number in numbers if number not in code and number.replace(",", "") not in code} == set()


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", TUTORIAL, flags=re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", PROSE):
        assert (
            target in anchors or target.startswith("https://") or (ROOT / "docs" / target.partition("#")[0]).exists()
        ), target


def test_pictures_can_be_drawn(tmp_path):
    """Each picture that the text shows, and no other; the files in docs/pictures/ are small."""
    oracle("matplotlib")
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.main(tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == sorted(PICTURES)
    for name in PICTURES:
        assert 1000 < (ROOT / "docs" / "pictures" / f"{name}.png").stat().st_size < 60_000
