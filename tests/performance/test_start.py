"""The start of a process: what it imports, and what it leaves to Python's garbage collector."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

A_PROCESS = """
import gc, cli
from inference.__main__ import main as front_door

class Garbage:
    def __del__(self):
        print("found")

def main(prompt: str = ""):
    front_door(prompt, model_size="3M", n_tokens_to_generate=1)
    garbage = Garbage()
    garbage.itself = garbage
    print("searched rarely" if gc.get_threshold()[0] > often else "searched often", gc.get_freeze_count())

often = gc.get_threshold()[0]
"""


@pytest.mark.parametrize(
    ("last_line", "expected"),
    [("cli.run(main, 'x')", ["searched rarely 0"]), ("main('Once')", ["searched often 0", "found"])],
)
def test_only_a_process_of_its_own_is_seldom_searched_for_garbage(last_line, expected):
    """GPT-2's vocabulary is 50,000 objects; Python would look at each several times, and once more at the end. Whoever
    calls main from Python finds the collector as it was."""
    command = [sys.executable, "-c", A_PROCESS + last_line, "Once"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == expected


def test_nothing_that_is_heavy_is_imported_for_a_story():
    code = (
        "import sys, time; sys.argv = ['gpt2.py', 'Once', '--model_size', '3M', '--n_tokens_to_generate', '2']\n"
        "import runpy\n"
        "try: runpy.run_path('gpt2.py', run_name='__main__')\n"
        "except SystemExit: import json; print(json.dumps(sorted(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = json.loads(out.splitlines()[-1])
    assert not {"jax", "tensorflow", "matplotlib", "requests", "safetensors"} & set(loaded)
