"""Downloading OpenAI's models: resumed after an interruption, checked before use.

A file is received as NAME.part and gets its name when it is complete and correct: the tokenizer by its SHA-256, each
tensor of the weights by the CRC-32C that the index stores. An interrupted download continues where it ended.
"""

import base64
import os
from pathlib import Path

from weights.files import check_regular, locked
from weights.tensorflow import file_damages, latest_checkpoint, read_hparams, read_index

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
TF_FILES = ("hparams.json", "encoder.json", "vocab.bpe", "checkpoint", INDEX, DATA)  # in the order of fetching
SHA256 = {  # of the tokenizer that OpenAI's four sizes share (source: tiktoken_ext/openai_public.py)
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def download_gpt2_files(model_size, model_dir, base_url=None):
    """Downloads those of TF_FILES that model_dir lacks. If it has them all, the network is not used.

    base_url, else the environment's GPT2_BASE_URL, else OpenAI's address, is where the folders of SIZES are.
    Raises OSError with the reason and the way out. What was received so far stays, in a .part, for the next try.
    """
    base_url = base_url or os.environ.get("GPT2_BASE_URL") or BASE_URL
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url {base_url!r} must begin with http:// or https://")
    if not missing_files(model_dir):
        return
    with locked(model_dir):
        discard_damaged_index(Path(model_dir))
        for name in missing_files(model_dir):
            try:
                fetch(f"{base_url.rstrip('/')}/{model_size}/{name}", Path(model_dir) / name)
            except OSError as error:
                raise OSError(
                    f"{error}. Run again once that is mended, or name a mirror with --base_url, or put OpenAI's "
                    f"{len(TF_FILES)} files into {model_dir} yourself (docs/models.md, Downloading)"
                ) from None


def missing_files(model_dir):
    """The names of TF_FILES that model_dir lacks, in the order of fetching."""
    return [name for name in TF_FILES if not (Path(model_dir) / name).is_file()]


def discard_damaged_index(model_dir):
    """Removes an index that cannot be read, if the data file is not there yet. The data is checked against the index
    after its download, and would be refused."""
    if (model_dir / INDEX).is_file() and not (model_dir / DATA).is_file():
        try:
            read_index(model_dir / INDEX)
        except OSError:
            (model_dir / INDEX).unlink()


def fetch(url, path):
    """Downloads one file to path + ".part", continuing an earlier try, and renames it when it is complete and correct.
    Raises OSError. The .part stays for the next try if the connection broke, and is removed if its content is wrong."""
    import requests

    part = path.with_name(path.name + ".part")
    if part.exists():
        check_regular(part)
    start = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=(5, 30)) as response:
            if response.status_code == 416 and response.headers.get("Content-Range") != f"bytes */{start}":
                part.unlink()  # it is longer than the file
                return fetch(url, path)
            md5 = None
            if response.status_code != 416:  # 416: an earlier try received all of it
                response.raise_for_status()
                md5 = receive(response, part, start if response.status_code == 206 else 0)
        check_file(part, path.name, md5)
    except requests.HTTPError as error:
        raise OSError(f"cannot fetch {url}: HTTP {error.response.status_code} {error.response.reason}") from None
    except requests.RequestException as error:
        if isinstance(error, ValueError):  # InvalidURL and others
            raise ValueError(f"base_url leads to {url}, and that is no address: {error}") from None
        reason = "no answer in time" if isinstance(error, requests.Timeout) else "no connection, or it broke off"
        raise OSError(f"cannot fetch {url}: {reason}") from None
    os.replace(part, path)


def receive(response, part, start):
    """Writes the body to `part` from byte `start` on, and waits until it is on the disk. Returns the MD5 sum of the
    whole file in base64 if the server names one (with part of a file, Azure's has another name), else None."""
    from tqdm import tqdm

    if "text/html" in response.headers.get("Content-Type", ""):
        raise OSError(f"{response.url} answers with a web page, not with a file")
    total = start + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
    part.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None)
    with open(part, "ab" if start else "wb") as file, bar:
        for chunk in response.iter_content(2**16):
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total not in (None, part.stat().st_size):
        raise OSError(f"{response.url} announced {total} bytes and sent {part.stat().st_size}")
    return response.headers.get("x-ms-blob-content-md5" if start else "Content-MD5")


def check_file(part, name, md5=None):
    """Removes a finished download and raises OSError if a checksum or the format of the file `name` is wrong."""
    try:
        if md5 and md5 != (found := base64.b64encode(digest(part, "md5")).decode()):
            raise OSError(f"{name}: MD5 is {found}, by the server {md5}")
        if name in SHA256 and SHA256[name] != (found := digest(part, "sha256").hex()):
            raise OSError(f"{name}: SHA-256 is {found}, OpenAI's {SHA256[name]}")
        if name == "hparams.json":
            read_hparams(part)
        elif name == "checkpoint":
            latest_checkpoint(part)
        elif name == INDEX:
            read_index(part)
        elif name == DATA and (damage := next(file_damages(part.with_name(INDEX), part), None)):
            raise OSError(f"{name}: {damage}")
    except OSError:
        part.unlink()
        raise


def digest(path, algorithm):
    import hashlib  # here, as only downloads and checks need it

    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).digest()
