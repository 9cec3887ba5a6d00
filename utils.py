"""Files: from the name of a model to its tokenizer, hyperparameters and params, downloaded if need be.

A model folder has OpenAI's layout (TF_FILES: a TensorFlow checkpoint and its tokenizer) or Hugging Face's (HF_FILES).
Both end as the same `params`: checkpoint.py reads them.

    python utils.py verify 124M                              reads every tensor again and compares its checksum
    python utils.py convert models/3M out --layout hf        writes a model in the other layout: see save.py
"""

if __name__ == "__main__":  # run as a program: find the other files even under python -P, and take care of Ctrl-C
    import sys

    sys.path.insert(0, __file__.removesuffix("utils.py"))
    import cli

    cli.leave_on_ctrl_c()

import base64
import contextlib
import difflib
import hashlib
import os
import re
import sys
from pathlib import Path

from checkpoint import damages, load_gpt2_params_from_hf, load_gpt2_params_from_tf_ckpt, read_index
from cli import one_line, run
from encoder import END_OF_TEXT, get_encoder, read_json, read_text

MODELS_DIR = Path(__file__).resolve().parent / "models"
BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
SIZES = ("124M", "355M", "774M", "1558M")  # published by OpenAI
EMBEDDED = "3M"  # comes with this repository
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
TF_FILES = ("hparams.json", "encoder.json", "vocab.bpe", "checkpoint", INDEX, DATA)  # in the order of fetching
HF_FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
SHA256 = {  # of the tokenizer that OpenAI's four sizes share (source: tiktoken_ext/openai_public.py)
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# ---- A model by its name ----


def load_encoder_hparams_and_params(model_size, models_dir=None, base_url=None):
    """(Encoder, hparams, params) of one of SIZES, fetched if need be, or of the folder models_dir/model_size, or of
    the folder model_size. hparams has n_vocab, n_ctx, n_embd, n_head, n_layer.

    Raises ValueError for a name that is neither, OSError for what cannot be fetched, is missing or damaged.
    """
    return load_folder(find_model(model_size, models_dir, base_url))


def load_folder(folder):
    """The same from a model folder, whose files are there."""
    encoder, hparams = get_encoder(folder.name, folder.parent), read_hparams(folder)
    if max(encoder.spellings) >= hparams["n_vocab"]:
        raise OSError(
            f"{folder}: the tokenizer has ids up to {max(encoder.spellings)}, n_vocab is {hparams['n_vocab']}"
        )
    if is_hf_folder(folder):
        return encoder, hparams, load_gpt2_params_from_hf(folder / "model.safetensors", hparams)
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(latest_checkpoint(folder / "checkpoint"), hparams)


def load_model(model_size="", models_dir=None, base_url=None):
    """What the loader above returns, for the front doors: where no size is named and 124M is neither on disk nor within
    reach, the embedded model stands in, and a line on stderr says so."""
    try:
        find_model(model_size or SIZES[0], models_dir, base_url)
    except OSError as error:
        if model_size:
            raise
        print(f"{EMBEDDED} (embedded) answers instead of {SIZES[0]}: {error}", file=sys.stderr)
        return load_encoder_hparams_and_params(EMBEDDED)
    return load_encoder_hparams_and_params(model_size or SIZES[0], models_dir)


def find_model(model_size, models_dir=None, base_url=None):
    """The folder of a model; what it lacks is fetched if it is one of SIZES. Raises as the loader above."""
    folder = model_folder(model_size, models_dir)
    if model_size in SIZES and not is_hf_folder(folder):
        download_gpt2_files(model_size, folder, base_url)
    return folder


def model_folder(model_size, models_dir=None):
    """Where the files of a model are, or will be for one of SIZES. Raises ValueError for any other that is nowhere."""
    models_dir = Path(models_dir or MODELS_DIR)
    candidates = [models_dir / model_size, Path(model_size), MODELS_DIR / model_size]
    with contextlib.suppress(OSError):  # a name too long for a folder
        folder = next((folder for folder in candidates if folder.is_dir()), candidates[0])
        if model_size and (model_size in SIZES or folder.is_dir()):
            return folder
    names = [*SIZES, *sorted({EMBEDDED, *(path.name for path in models_dir.glob("*/"))} - {*SIZES})]
    guess = "".join(f"did you mean {n}? " for n in difflib.get_close_matches(model_size.upper(), names, 1, 0.4))
    raise ValueError(f"no model {model_size!r:.80}; {guess}Choose from {', '.join(names)}, or name a model folder")


def is_hf_folder(folder):
    return (folder / "config.json").exists() and not (folder / "hparams.json").exists()


def read_hparams(folder):
    """{n_vocab, n_ctx, n_embd, n_head, n_layer} from hparams.json or config.json, each a whole number above 0."""
    return parse_hparams(folder / ("config.json" if is_hf_folder(folder) else "hparams.json"))


def parse_hparams(path):
    found = read_json(path)
    if path.name == "config.json":
        found = {"n_vocab": found.get("vocab_size"), "n_ctx": found.get("n_positions")} | found
    hparams = {name: found.get(name) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}
    for name, value in hparams.items():
        limit = 1000 if name == "n_layer" else 2**24  # far above what there is, far below what would hang the loader
        if type(value) is not int or not 1 <= value <= limit:
            raise OSError(f"{path}: {name} must be a whole number from 1 to {limit}, not {value!r:.40}")
    if hparams["n_embd"] % hparams["n_head"]:
        raise OSError(f"{path}: n_embd {hparams['n_embd']} cannot be shared among n_head {hparams['n_head']} heads")
    if path.name == "config.json":
        check_hf_config(path, found)
    return hparams


def check_hf_config(path, config):
    """Raises OSError if config.json describes something that gpt2.py would compute differently."""
    ours = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None}
    ours |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    for name, value in ours.items():
        if config.get(name, value) not in (value, 4 * config.get("n_embd", 0) if name == "n_inner" else value):
            raise OSError(f"{path}: {name} is {config[name]!r}; GPT-2 has {value!r}")


def latest_checkpoint(path):
    """The file `checkpoint` -> the path of what it names, without endings, for load_gpt2_params_from_tf_ckpt."""
    if not (match := re.match(r'model_checkpoint_path: "([^"\0]+)"', read_text(path))):
        raise OSError(f"{path}: does not begin with a model_checkpoint_path")
    return path.parent / Path(match[1]).name  # TensorFlow writes where it was once saved; it may have moved


def is_openai(hparams):
    """OpenAI's models write on past <|endoftext|>, in some other document; for a small model the story ends there."""
    return hparams["n_vocab"] == 50257


def first_ids(encoder, prompt):
    """The prompt's ids; for an empty prompt, that of <|endoftext|>, after which a model begins a text of its own."""
    if not prompt and encoder.end_of_text is None:
        raise ValueError(f"this model knows no {END_OF_TEXT} to start from: give a prompt")
    return encoder.encode(prompt) or [encoder.end_of_text]


# ---- Download ----


def download_gpt2_files(model_size, model_dir, base_url=None):
    """Fetches those of TF_FILES that model_dir lacks; asks the network for nothing if it has them all.

    base_url, else the environment's GPT2_BASE_URL, else OpenAI's address, is where the folders of SIZES are.
    Raises OSError with the reason and the way out. What was received so far stays, in a .part, for the next try.
    """
    base_url = base_url or os.environ.get("GPT2_BASE_URL") or BASE_URL
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url {base_url!r} must begin with http:// or https://")
    discard_damaged_index(Path(model_dir))
    for name in TF_FILES:
        if not (path := Path(model_dir) / name).is_file():
            try:
                fetch(f"{base_url.rstrip('/')}/{model_size}/{name}", path)
            except OSError as error:
                raise OSError(
                    f"{error}. Run again once that is mended, or name a mirror with --base_url, or put OpenAI's "
                    f"{len(TF_FILES)} files into {model_dir} yourself (README, GPT-2 124M)"
                ) from None


def discard_damaged_index(model_dir):
    """An index that cannot be read would make every download of the data, which is checked against it, fail."""
    if (model_dir / INDEX).is_file() and not (model_dir / DATA).is_file():
        try:
            read_index(model_dir / INDEX)
        except OSError:
            (model_dir / INDEX).unlink()


def fetch(url, path):
    """One file, first to path + ".part", from where an earlier try ended; it gets its name when it is whole and right.
    Raises OSError; what came before the connection broke stays for the next try, what is wrong does not."""
    import requests

    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=(5, 30)) as response:
            if response.status_code == 416 and response.headers.get("Content-Range") != f"bytes */{start}":
                part.unlink()  # there is more of it than of the file
                return fetch(url, path)
            md5 = None
            if response.status_code != 416:  # which here means that all of it has come before
                response.raise_for_status()
                md5 = receive(response, part, start if response.status_code == 206 else 0)
        check_file(part, path.name, md5)
    except requests.HTTPError as error:
        raise OSError(f"cannot fetch {url}: HTTP {error.response.status_code} {error.response.reason}") from None
    except requests.RequestException as error:
        if isinstance(error, ValueError):  # InvalidURL and its like
            raise ValueError(f"base_url leads to {url}, and that is no address: {error}") from None
        reason = "no answer in time" if isinstance(error, requests.Timeout) else "no connection, or it broke off"
        raise OSError(f"cannot fetch {url}: {reason}") from None
    os.replace(part, path)


def receive(response, part, start):
    """Writes the body to `part` from byte `start` on, to the disk itself. Returns the MD5 sum of the whole file in
    base64 if the server names one (with part of a file, Azure's has another name), else None."""
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
    """Removes a finished download and raises OSError unless it is what its name says, down to each tensor's sum."""
    try:
        if md5 and md5 != (found := base64.b64encode(digest(part, "md5")).decode()):
            raise OSError(f"{name}: MD5 is {found}, by the server {md5}")
        if name in SHA256 and SHA256[name] != (found := digest(part, "sha256").hex()):
            raise OSError(f"{name}: SHA-256 is {found}, OpenAI's {SHA256[name]}")
        if name == "hparams.json":
            parse_hparams(part)
        elif name == "checkpoint":
            latest_checkpoint(part)
        elif name == INDEX:
            read_index(part)
        elif name == DATA and (damage := next(damages(part.with_name(INDEX), part), None)):
            raise OSError(f"{name}: {damage}")
    except OSError:
        part.unlink()
        raise


def digest(path, algorithm):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).digest()


# ---- python utils.py ----


def verify(model_size: str = SIZES[0], models_dir: str = ""):
    """Reads a model again from disk: a line for whatever is damaged, and exit status 1 if anything is.

    Args:
        model_size: 124M, 355M, 774M, 1558M, or a model folder
        models_dir: where the folders of models are; left out, models/ beside this file
    """
    folder = model_folder(model_size, models_dir)
    found = list(problems(folder, SHA256 if model_size in SIZES else {}))
    print("\n".join(found) if found else f"{folder}: whole and sound")
    sys.exit(1 if found else 0)


def problems(folder, sha256):
    """One line for each damaged tensor and file of a model folder. safetensors has no checksums, only places."""
    try:
        for name, expected in sha256.items():
            if (folder / name).exists() and digest(folder / name, "sha256").hex() != expected:
                yield f"{folder / name}: not OpenAI's file, its SHA-256 should be {expected}"
        if not is_hf_folder(folder):
            prefix = latest_checkpoint(folder / "checkpoint")
            lines = list(damages(f"{prefix}.index", f"{prefix}.data-00000-of-00001"))
            yield from lines
            if lines:
                return
        load_folder(folder)[0].check()
    except OSError as error:
        yield one_line(error)


if __name__ == "__main__":
    from save import convert

    run({"verify": verify, "convert": convert}, "utils.py")
