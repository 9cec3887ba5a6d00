"""Finding and fetching a model, against a server on this machine that misbehaves in every way seen in the wild."""

import base64
import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, openai_tokenizer, random_params
from test_tensorflow import as_openai_stores_it, write_with_tensorflow

import utils
from weights import download


class Server(ThreadingHTTPServer):
    """Serves `files` {name: bytes} as /124M/name. `behave` maps a name to how it is served; `asked` lists requests."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.behave, self.asked, self.delay = dict(files), {}, [], 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body, announced=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for i in range(0, len(body), 2**14):
                self.wfile.write(body[i : i + 2**14])
                time.sleep(self.server.delay)
        self.close_connection = True

    def do_GET(self):
        name, server = self.path.removeprefix("/124M/"), self.server
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        server.asked.append((name, match and int(match[1])))
        body, how = server.files.get(name), server.behave.get(name)
        if body is None:
            self.answer(404, b"<html>gone</html>", Content_Type="text/html")
        elif how in ("html", "html without a type"):
            self.answer(200, b"<html>log in</html>", **({"Content_Type": "text/html"} if how == "html" else {}))
        elif how == "short":
            self.answer(200, body[:-7], announced=len(body))
        elif how == "longer":
            self.answer(200, body + b"surplus")
        elif how == "md5":
            self.answer(200, body, Content_MD5=base64.b64encode(hashlib.md5(b"other").digest()).decode())
        elif how == "flip":
            self.answer(200, body[:1000] + bytes([body[1000] ^ 1]) + body[1001:])
        elif match and how != "no range" and int(match[1]) >= len(body):
            self.answer(416, b"", Content_Range=f"bytes */{len(body)}")
        elif match and how != "no range":
            start = int(match[1])
            self.answer(206, body[start:], Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.answer(200, body, Content_MD5=base64.b64encode(hashlib.md5(body).digest()).decode())


@pytest.fixture
def server(monkeypatch):
    """A server with the golden model as 124M, whose tokenizer files pass for OpenAI's."""
    files = {name: (GOLDEN / name).read_bytes() for name in utils.TF_FILES}
    hashes = {name: hashlib.sha256(files[name]).hexdigest() for name in utils.SHA256}
    monkeypatch.setattr(download, "SHA256", hashes)
    with Server(files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_download_is_complete_and_a_second_one_asks_for_nothing(server, tmp_path):
    utils.download_gpt2_files("124M", tmp_path / "124M", server.url + "/")
    assert contents(tmp_path / "124M") == server.files
    assert [name for name, _ in server.asked] == list(utils.TF_FILES)
    utils.download_gpt2_files("124M", tmp_path / "124M", "http://127.0.0.1:1")
    assert len(server.asked) == len(utils.TF_FILES)


def test_the_environment_names_a_mirror(server, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", server.url)
    utils.download_gpt2_files("124M", tmp_path)
    assert contents(tmp_path) == server.files


@pytest.mark.parametrize("missing", utils.TF_FILES)
def test_a_folder_with_a_file_missing_is_repaired(server, tmp_path, missing):
    utils.download_gpt2_files("124M", tmp_path, server.url)
    (tmp_path / missing).unlink()
    server.asked.clear()
    utils.download_gpt2_files("124M", tmp_path, server.url)
    assert contents(tmp_path) == server.files
    assert server.asked == [(missing, None)]


@pytest.mark.parametrize("ranges", [True, False], ids=["server resumes", "server does not"])
def test_killed_in_the_middle_and_started_again(server, tmp_path, ranges):
    server.delay = 0.1  # 28 pieces, 2.8 s: long enough to be killed in
    code = "import sys; from weights import download; download.SHA256 = {}\n"
    code += "download.download_gpt2_files('124M', *sys.argv[1:])"
    folder, part = tmp_path / "124M", tmp_path / "124M" / (utils.DATA + ".part")
    with subprocess.Popen([sys.executable, "-c", code, str(folder), server.url], cwd=ROOT) as process:
        while not (part.exists() and part.stat().st_size > 100_000):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (folder / utils.DATA).exists()
    kept = part.stat().st_size
    server.delay = 0
    server.behave = {} if ranges else {utils.DATA: "no range"}
    server.asked.clear()
    utils.download_gpt2_files("124M", folder, server.url)
    assert server.asked == [(utils.DATA, kept)]
    assert contents(folder) == server.files


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "vocab.bpe.part").write_bytes(server.files["vocab.bpe"] + b"...")
    utils.download_gpt2_files("124M", tmp_path, server.url)
    assert contents(tmp_path) == server.files


def test_a_whole_part_is_not_fetched_again(server, tmp_path):
    (tmp_path / (utils.DATA + ".part")).write_bytes(server.files[utils.DATA])
    utils.download_gpt2_files("124M", tmp_path, server.url)
    assert contents(tmp_path) == server.files
    assert [name for name, start in server.asked if name == utils.DATA and not start] == []


def test_a_part_of_something_else_is_noticed_and_not_kept(server, tmp_path):
    (tmp_path / (utils.DATA + ".part")).write_bytes(b"x" * 1000)
    with pytest.raises(OSError, match="has checksum"):
        utils.download_gpt2_files("124M", tmp_path, server.url)
    utils.download_gpt2_files("124M", tmp_path, server.url)
    assert contents(tmp_path) == server.files


def test_a_damaged_index_is_fetched_again_before_the_data_is_judged_by_it(server, tmp_path):
    for name in (*utils.TF_FILES[:-2], utils.INDEX):
        (tmp_path / name).write_bytes(server.files[name])
    (tmp_path / utils.INDEX).write_bytes(server.files[utils.INDEX][:-20])
    utils.download_gpt2_files("124M", tmp_path, server.url)
    assert [name for name, _ in server.asked] == [utils.INDEX, utils.DATA]
    assert contents(tmp_path) == server.files


class Answer:
    """What requests.get gives, as far as `fetch` looks; an older urllib3 would not notice that the body is short."""

    status_code, url = 200, "http://somewhere"

    def __init__(self, body, announced):
        self.body, self.headers = body, {"Content-Length": str(announced)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def raise_for_status(self):
        pass

    def iter_content(self, _size):
        yield self.body


def test_a_body_shorter_than_announced_is_noticed_and_every_request_has_a_timeout(tmp_path, monkeypatch):
    def get(_url, timeout, **_):
        assert max(timeout) <= 60
        return Answer(b"x" * 100, 107)

    monkeypatch.setattr("requests.get", get)
    with pytest.raises(OSError, match="announced 107 bytes and sent 100"):
        download.fetch("http://somewhere", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_an_address_that_is_none(tmp_path, command):
    for url in ("http://", "http://a b:99999", "ftp://x"):
        status, out, err = command("x", "--model_size", "124M", "--models_dir", str(tmp_path), "--base_url", url)
        assert (status, out, err.count("\n")) == (2, "", 1), err


FAILURES = [
    ("hparams.json", None, "HTTP 404"),
    (utils.DATA, None, "HTTP 404"),
    ("hparams.json", "html", "answers with a web page"),
    (utils.DATA, "html", "answers with a web page"),
    *((name, "html without a type", name) for name in utils.TF_FILES),
    (utils.DATA, "short", "broke off"),
    (utils.DATA, "flip", "has checksum"),
    ("encoder.json", "flip", "SHA-256"),
    ("vocab.bpe", "longer", "SHA-256"),
    (utils.INDEX, "longer", "no index"),
    (utils.DATA, "longer", "surplus"),
    (utils.DATA, "md5", "MD5"),
]


@pytest.mark.parametrize(("name", "how", "word"), FAILURES, ids=lambda value: str(value)[:24])
def test_a_failure_is_one_line_and_leaves_no_file_behind(server, tmp_path, command, name, how, word):
    if how is None:
        del server.files[name]
    server.behave = {name: how}
    arguments = ["hello", "--model_size", "124M", "--models_dir", str(tmp_path), "--base_url", server.url]
    status, out, err = command(*arguments)
    err = err.splitlines()[-1] if how else err  # progress bars come before
    assert (status, out) == (1, "")
    assert word in err
    assert "--base_url" in err, "the way out"
    assert not (tmp_path / "124M" / name).exists()
    server.behave, server.files[name] = {}, (GOLDEN / name).read_bytes()
    utils.download_gpt2_files("124M", tmp_path / "124M", server.url)
    assert contents(tmp_path / "124M") == server.files


def test_connection_refused(tmp_path, command):
    status, out, err = command(
        "x", "--model_size", "124M", "--models_dir", str(tmp_path), "--base_url", "http://127.0.0.1:1"
    )
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "127.0.0.1:1/124M/hparams.json" in err
    assert list(tmp_path.iterdir()) == [], "not even a folder"


def test_from_the_command_line_to_text_with_openais_tokenizer(tmp_path):
    """A tiny model behind the real tokenizer: the whole way of a first start."""
    tokenizer = openai_tokenizer()
    hparams = {"n_vocab": 50257, "n_ctx": 16, "n_embd": 4, "n_head": 2, "n_layer": 1}
    write_with_tensorflow(tmp_path / "model.ckpt", as_openai_stores_it(random_params(**hparams)))
    files = {name: (tmp_path / name).read_bytes() for name in ("checkpoint", utils.INDEX, utils.DATA)}
    files |= {name: (tokenizer / name).read_bytes() for name in utils.SHA256}
    files["hparams.json"] = str(hparams).replace("'", '"').encode()
    arguments = ["hello world", "--n_tokens_to_generate", "14", "--models_dir", str(tmp_path / "models")]
    with Server(files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"GPT2_BASE_URL": server.url}
        for _ in range(2):
            run = [sys.executable, "gpt2.py", *arguments]
            done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
            assert (done.returncode, done.stderr) == (0, "")
            assert len(done.stdout) > 14
        assert len(server.asked) == len(utils.TF_FILES)
        server.shutdown()


def test_a_folder_is_found_in_models_dir_and_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "here" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert utils.model_folder("mine", "here").samefile(tmp_path / "here" / "mine")
    assert utils.model_folder("here/mine").samefile(tmp_path / "here" / "mine")
    assert utils.model_folder("3M", "here") == ROOT / "models" / "3M"


@pytest.mark.parametrize(("name", "nearest"), [("124", "124M"), ("345M", "355M"), ("1558m", "1558M")])
def test_an_unknown_size_names_the_nearest(name, nearest, command):
    status, out, err = command("hello", "--model_size", name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"did you mean {nearest}?" in err


def test_a_hugging_face_folder_under_a_known_name_is_not_downloaded_over(tmp_path):
    import shutil

    shutil.copytree(GOLDEN / "hf", tmp_path / "124M")
    params = utils.load_encoder_hparams_and_params("124M", tmp_path, "http://127.0.0.1:1")[2]
    assert params["wte"].dtype == np.float32
