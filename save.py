"""params -> a model folder: the way back of checkpoint.py, in the same two layouts.

    python utils.py convert models/3M models/3M-hf --layout hf       # OpenAI's layout to Hugging Face's
    python utils.py convert models/3M-hf models/3M-tf --layout tf    # and back, each number as it was

No file gets its name before all of it is on disk: whoever loads the folder meanwhile, or after the power has failed,
finds the old file or the new one, never half of one.
"""

import contextlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np

from checkpoint import MAGIC, hf_name, map_params, masked_crc32c, tf_name
from encoder import END_OF_TEXT, get_encoder, read_json

LAYOUTS = ("tf", "hf")


@contextlib.contextmanager
def replacing(path):
    """Lends the name of a file to write. At the end it takes the place of `path`; after an error it is gone, and what
    was at `path` is still there. Raises OSError naming the file, for a full disk too."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was there before still is") from None
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(out):
    """Lends the name of a folder to fill. At the end it becomes `out`; after an error it is gone."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---- A model folder ----


def save_tokenizer(source, folder, layouts=LAYOUTS):
    """Copies the two files of a tokenizer from the folder `source`, under the names of each layout: the same bytes.
    Raises OSError if one is missing or damaged."""
    get_encoder(Path(source).name, Path(source).parent)
    pairs = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
    for tf, hf in pairs.items():
        data = next(Path(source, name) for name in (hf, tf) if Path(source, name).exists()).read_bytes()
        for layout in layouts:
            with replacing(Path(folder, tf if layout == "tf" else hf)) as part:
                part.write_bytes(data)


def save_model(folder, hparams, params, layouts=LAYOUTS, name="model.ckpt"):
    """Writes hyperparameters and params; a folder may have both layouts. The params get their names last, so the folder
    loads at any moment. `name` is of the TensorFlow checkpoint."""
    folder = Path(folder)
    if "hf" in layouts:
        vocab = folder / "vocab.json"
        end_of_text = read_json(vocab).get(END_OF_TEXT) if vocab.exists() else None
        write_text(folder / "config.json", json.dumps(hf_config(hparams, end_of_text), indent=1) + "\n")
        save_gpt2_params_to_hf(folder / "model.safetensors", params)
    if "tf" in layouts:
        write_text(folder / "hparams.json", json.dumps(hparams))
        save_gpt2_params_to_tf_ckpt(folder / name, params)


def convert(model: str = "", out: str = "", *, layout: str = "", models_dir: str = ""):
    """Writes a model in OpenAI's layout or Hugging Face's, each number as it is.

    Args:
        model: 124M, 355M, 774M, 1558M, 3M or a model folder
        out: the folder to make
        layout: tf (OpenAI's, a TensorFlow checkpoint) or hf (Hugging Face's, safetensors)
        models_dir: where the folders of models are; left out: models/ beside this file
    """
    import utils  # which imports this file to offer this command

    if layout not in LAYOUTS:
        raise ValueError(f"--layout {layout!r}: choose {' or '.join(LAYOUTS)}")
    if not out or Path(out).exists():
        raise ValueError(f"{out} is there already: name a folder to make" if out else "name a folder to make")
    source = utils.find_model(model, models_dir)
    _, hparams, params = utils.load_folder(source)
    if layout == "tf" and params["wte"].dtype.itemsize > 4:
        raise ValueError(f"{source} has numbers of {params['wte'].dtype}: OpenAI's layout holds float32 alone")
    with new_folder(Path(out)) as part:
        save_tokenizer(source, part, [layout])
        save_model(part, hparams, params, [layout])
    print(f"{out}: {model} in the layout {layout}")


def hf_config(hparams, end_of_text):
    """What transformers needs to know, spelled as it spells it; end_of_text is an id, or None."""
    names = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
    fixed = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    fixed |= {"layer_norm_epsilon": 1e-5, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return fixed | {names.get(name, name): value for name, value in hparams.items()}


def save_gpt2_params_to_hf(path, params):
    """Writes params as a model.safetensors, each number as it is (bfloat16, which NumPy lacks, as float32)."""
    import safetensors.numpy

    tensors = {}
    map_params(lambda place, array: tensors.update({hf_name(place): np.ascontiguousarray(array)}), params)
    tensors = {name: t.astype("<f4") if t.dtype.itemsize == 2 else t for name, t in tensors.items()}
    with replacing(path) as part:
        part.write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))  # transformers asks for this word


# ---- A TensorFlow checkpoint, without TensorFlow ----


def save_gpt2_params_to_tf_ckpt(tf_ckpt_path, params):
    """Writes params, as float32, as what checkpoint.py and TensorFlow read; last the file `checkpoint`, which names it:
    of several in a folder, that is the one to load."""
    tensors, entries, offset, path = {}, [(b"", b"\x08\x01\x1a\x02\x08\x01")], 0, Path(tf_ckpt_path)  # header: 1 shard
    map_params(lambda place, array: tensors.update({tf_name(place): array}), params)
    with replacing(f"{path}.data-00000-of-00001") as part, open(part, "wb") as file:
        for name, array in sorted(tensors.items()):
            shape = (1, *array.shape) if name.endswith("/w") else array.shape
            data = np.ascontiguousarray(array, "<f4").tobytes()
            file.write(data)
            entries.append((name.encode(), entry_bytes(shape, offset, data)))
            offset += len(data)
    with replacing(f"{path}.index") as part:
        part.write_bytes(table(entries))
    write_text(path.with_name("checkpoint"), f'model_checkpoint_path: "{path.name}"\n')


def entry_bytes(shape, offset, data):
    """Undoes checkpoint.read_entry."""
    dims = b"".join(b"\x12" + sized(b"\x08" + varint(n)) for n in shape)
    where = b"\x20" + varint(offset) + b"\x28" + varint(len(data))
    return b"\x08\x01\x12" + sized(dims) + where + b"\x35" + struct.pack("<I", masked_crc32c(data))


def table(entries):
    """The bytes of a string table with the sorted (key, value) pairs `entries`: one block of them, an empty one, and
    one that says where the first is; then a footer of 48 bytes that says where the latter two are."""
    written, handles = b"", []
    for pairs in (entries, [], None):
        pairs = [(entries[-1][0], handles[0])] if pairs is None else pairs
        block = b"".join(b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs)
        block += struct.pack("<II", 0, 1)  # one restart point, the beginning: no key leaves anything out
        handles.append(varint(len(written)) + varint(len(block)))
        written += block + b"\0" + struct.pack("<I", masked_crc32c(block + b"\0"))
    return written + (handles[1] + handles[2]).ljust(40, b"\0") + MAGIC


def varint(n):
    """Undoes read_varint."""
    return bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80]) + varint(n >> 7)


def sized(data):
    return varint(len(data)) + data
