"""How the house is built: lines of code, which module may import which, and the names that users rely on."""

import ast
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

import backends
from inference.__main__ import main as front_door

FILES = {str(path.relative_to(ROOT)): path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))}
FILES = {name: path for name, path in FILES.items() if not name.startswith("docs/")}  # what draws pictures
FILES = {name: path.read_text(encoding="utf-8") for name, path in FILES.items() if not name.startswith("tests/")}
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): code for name, code in FILES.items()}
FOUR = ("gpt2.py", "gpt2_pico.py", "encoder.py", "utils.py")  # the core

# ---- Budgets: lines of code, without blank lines, comments, docstrings and tables of flags ----

BUDGETS = {"gpt2.py": 90, "gpt2_pico.py": 50, "encoder.py": 115, "inference/kv_cache.py": 80, "variants/llama.py": 160}
EACH_OTHER, FUNCTION, FUNCTION_OF_THE_FOUR = 200, 45, 25
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(code):
    """The numbers of the lines that hold code."""
    lines, flags = set(), False
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        flags = token.string == "# fmt: off" or (flags and token.string != "# fmt: on")
        if token.type not in NO_CODE and not flags:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return lines


def functions(code):
    """{name: the number of its lines of code}, the decorators and inner functions included."""
    lines, nodes = code_lines(code), [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef)]
    starts = {n: min(part.lineno for part in (n, *n.decorator_list)) for n in nodes}
    return {n.name: len(lines & {*range(starts[n], n.end_lineno + 1)}) for n in nodes}


SOME_CODE = '''"""A docstring
of two lines."""

import os  # a comment after code


# fmt: off
def f(a=1,
      b=2):
    # fmt: on
    """Another."""
    # a comment

    text = """a string
    of two lines"""
    return (a,

            text)
'''


def test_the_counting():
    assert code_lines(SOME_CODE) == {4, 14, 15, 16, 18}
    assert functions(SOME_CODE) == {"f": 4}


@pytest.mark.parametrize("name", FILES)
def test_budgets_hold(name):
    assert len(code_lines(FILES[name])) <= BUDGETS.get(name, EACH_OTHER)
    limit = FUNCTION_OF_THE_FOUR if name in FOUR else FUNCTION
    assert {f: n for f, n in functions(FILES[name]).items() if n > limit} == {}


def test_the_server_is_small():
    """Without what the page shows, which is the other files of serving/."""
    names = [f"serving/{name}.py" for name in ("__main__", "app", "metrics", "reply")]
    assert sum(len(code_lines(FILES[name])) for name in names) <= 300


def test_the_documents_state_these_budgets():
    """In a table, a row for each: | [gpt2.py](gpt2.py) | 90 | ... |"""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    rows = re.findall(r"^\| \[`?([\w/]+\.py)`?\]\(\S+\) \| (\d+) \|", "".join(texts), flags=re.MULTILINE)
    assert {name: int(n) for name, n in rows}.items() >= BUDGETS.items()
    assert [row for row in rows if int(row[1]) != BUDGETS.get(row[0], EACH_OTHER)] == []


# ---- Imports: the arrows point one way ----

PLAIN = {"weights", "backends", "encoder", "utils", "cli"}
MAY_IMPORT = {  # a module or the folder it is in -> the modules and folders that it may import
    "cli": set(),
    "weights": {"weights"},
    "backends": {"backends", "weights.params"},
    "encoder": {"weights"},
    "utils": {"weights", "encoder"},
    "gpt2": {"backends", "utils"},
    "gpt2_pico": {"utils"},
    "training.lora": {"backends", "gpt2", "weights"},  # arithmetic on params, of which inference knows
    "inference": PLAIN | {"gpt2", "inference", "training.lora"},
    "training": PLAIN | {"gpt2", "inference", "variants", "training"},  # a run shows what its model writes
    "variants": PLAIN | {"gpt2", "inference", "variants"},
    "serving": PLAIN | {"gpt2", "inference", "variants", "serving"},
}


def is_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def statements(node):
    """All statements below a node, those of functions included, but not what stands behind a __main__ guard."""
    for child in ast.iter_child_nodes(node):
        if not is_guard(child):
            yield child
            yield from statements(child)


def imports(code):
    """The names that a module imports: for `from a import b`, which may be a module or not, ("a", "b")."""
    for node in statements(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((word.value, None) for word in node.args if isinstance(word, ast.Constant))


def graph(modules):
    """{module: the modules of this project that it imports}."""
    found = {module: set() for module in modules}
    for module, code in modules.items():
        for name, part in imports(code):
            inner = f"{name}.{part}"
            found[module] |= {inner if inner in modules else name} & modules.keys()
    return found


@pytest.fixture(scope="module")
def arrows():
    return graph(MODULES)


def circle(arrows):
    """Modules that import each other in a circle, or nothing. Those that lead only to others without one drop out."""
    while ends := {module for module, others in arrows.items() if not others & arrows.keys()}:
        arrows = {module: others for module, others in arrows.items() if module not in ends}
    return sorted(arrows)


def test_the_graph_and_its_circles():
    modules = {"a": "import b\nif __name__ == '__main__':\n    import c", "b": "def f():\n    from c import d, e"}
    modules |= {"c": "import sys", "c.d": "importlib.import_module('a')"}
    assert graph(modules) == {"a": {"b"}, "b": {"c", "c.d"}, "c": set(), "c.d": {"a"}}
    assert circle(graph(modules)) == ["a", "b", "c.d"]
    assert circle(graph(modules | {"c.d": ""})) == []


def test_no_modules_import_each_other_in_a_circle(arrows):
    assert len(MODULES) > 30
    assert circle(arrows) == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module, arrows):
    allowed = MAY_IMPORT.get(module) or MAY_IMPORT.get(module.partition(".")[0], {*MODULES})
    assert {m for m in arrows[module] if not {m, m.partition(".")[0]} & allowed} == set()


@pytest.mark.parametrize("name", FOUR)
def test_the_core_imports_little_at_module_level(name):
    top = ast.Module([n for n in ast.parse(FILES[name]).body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    found = {module.partition(".")[0] for module, _ in imports(ast.unparse(top))}
    ours = {module.partition(".")[0] for module in MODULES}
    assert found - ours - {*sys.stdlib_module_names} <= {"numpy", "regex"}


def test_importing_the_core_brings_nothing_else_either():
    code = "import sys, numpy, regex; before = set(sys.modules); import gpt2, gpt2_pico, encoder, utils; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(*set(sys.modules) - before)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    ours = {module.partition(".")[0] for module in MODULES}
    assert {name.partition(".")[0] for name in done.stdout.split()} - ours - {*sys.stdlib_module_names} == set()


# ---- Names and arguments that code outside this repository may use ----

SIGNATURES = {
    "gpt2": """
        gelu(x)
        softmax(x)
        layer_norm(x, g, b, eps=1e-05)
        linear(x, w, b)
        ffn(x, c_fc, c_proj)
        attention(q, k, v, mask)
        mha(x, c_attn, c_proj, n_head)
        transformer_block(x, mlp, attn, ln_1, ln_2, n_head)
        gpt2(inputs, wte, wpe, blocks, ln_f, n_head)
        generate(inputs, params, n_head, n_tokens_to_generate)""",
    "encoder": """
        get_encoder(model_size, models_dir)
        Encoder.encode(self, text, allowed_special=())
        Encoder.decode(self, ids)""",
    "utils": """
        download_gpt2_files(model_size, model_dir, base_url=None)
        load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams)
        load_encoder_hparams_and_params(model_size, models_dir=None, base_url=None)""",
    "inference.kv_cache": """
        generate(inputs, params, n_head, n_tokens_to_generate, backend='numpy')""",
    "inference.sampling": """
        repetition_penalty(logits, ids, penalty)
        no_repeat_ngram(logits, ids, size)
        min_new_tokens(logits, n_new, minimum, end_ids)
        bad_words(logits, ids, sequences)
        temperature(logits, t)
        top_k(logits, k)
        top_p(logits, p)
        min_p(logits, p)
        process(logits, ids, n_new, params)
        warp(logits, params)
        sample(logits, coin)
        choose(logits, ids, n_new, params, coin)""",
}
CONTRACT = [(module, line.strip()) for module, lines in SIGNATURES.items() for line in lines.strip().splitlines()]


@pytest.mark.parametrize(("module", "expected"), CONTRACT)
def test_signatures_stay(module, expected):
    found = importlib.import_module(module)
    for part in expected.partition("(")[0].split("."):
        found = getattr(found, part)
    assert f"{found.__qualname__}{inspect.signature(found)}" == expected


FLAGS = {
    "n_tokens_to_generate": 40, "model_size": "", "models_dir": "", "base_url": "", "backend": "numpy",
    "dtype": "float32", "prompt_file": "", "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": None,
    "repetition_penalty": 1.0, "min_new_tokens": 0, "bad_words": (), "stop": (), "stop_at_eos": None,
    "overflow": "error", "num_samples": 1, "batch": False, "num_beams": 1, "length_penalty": 1.0,
    "early_stopping": "false", "json": False, "trace": 0, "min_p": 0.0, "no_repeat_ngram_size": 0, "adapter": "",
}  # fmt: skip


def test_flags_of_the_front_door_stay():
    assert front_door.__kwdefaults__.items() >= FLAGS.items()
    assert next(iter(inspect.signature(front_door).parameters)) == "prompt"


OPERATIONS = ["asarray", "to_numpy", "jit", "vmap", "update", "value_and_grad", "prepare", "setup"]


def test_backends_offer_the_same_operations_in_the_same_order():
    numpy, jax = (ast.parse(FILES[f"backends/{name}_backend.py"]).body for name in ("numpy", "jax"))
    numpy, jax = ([n.name for n in nodes if isinstance(n, ast.FunctionDef)] for nodes in (numpy, jax))
    assert [name for name in numpy if not name.startswith("_")] == [name for name in jax if not name.startswith("_")]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_backends_stay(name):
    there, here = (inspect.signature(getattr(backends.get(b), name)) for b in ("jax", "numpy"))
    assert str(there) == str(here)
