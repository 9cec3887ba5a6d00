"""What the README claims is so."""

import ast
import re
import shlex
import sys

import pytest
from conftest import ROOT, oracle

README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| \[(\S+?)\]\(\S+\) \|", README, flags=re.MULTILINE)
OUTPUTS = re.findall(r"<!-- output of: python3 gpt2.py (.+?) -->\n```\n(.*?)```", README, flags=re.DOTALL)


def test_every_module_is_in_the_table():
    modules = {path.name for path in ROOT.glob("*.py")}
    packages = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")}
    assert modules | packages - {"tests/"} <= {*TABLE}


@pytest.mark.parametrize(("arguments", "text"), OUTPUTS)
def test_shown_output_is_real(arguments, text, command):
    assert command(*shlex.split(arguments)) == (0, text, "")


def test_there_are_two_commands_to_set_up_and_one_output():
    assert len(re.findall(r"^    python3 -m pip install -r", README, flags=re.MULTILINE)) == 2
    assert len(OUTPUTS) >= 1


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_shown_code_runs(code):
    oracle("jax")
    exec(code, {})


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


PACKAGES = {"google_crc32c": "google-crc32c"}  # where a package has another name than its module
OPTIONAL = {"jax", "ml_dtypes", "matplotlib", "tokenizers"}  # the error that names them gives the command
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
    foreign = imported - ours - set(sys.stdlib_module_names) - OPTIONAL - PEERS
    assert {PACKAGES.get(name, name) for name in foreign} == set(required)
