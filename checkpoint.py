"""A checkpoint file -> params, the nested dict of arrays that gpt2.py computes with. Two layouts, one result.

A TensorFlow checkpoint is simpler than TensorFlow, and reading it needs none of the latter's 1.3 GB:

    model.ckpt.data-00000-of-00001   the numbers of all tensors, little-endian, end to end, and nothing else
    model.ckpt.index                 a sorted table: name -> number type, shape, offset, size, checksum

The table, a few kB, is parsed; the numbers are mapped into memory where they lie, and no byte is copied.

Hugging Face's model.safetensors is read with the library of that name.
"""

import math
import os
import re
import struct
from collections import namedtuple
from pathlib import Path

import numpy as np

# ---- params: names and shapes ----


def param_shapes(n_vocab, n_ctx, n_embd, n_head, n_layer):
    """The nest of params with a shape in place of each array."""

    def linear(n_in, n_out):
        return {"w": (n_in, n_out), "b": (n_out,)}

    norm = {"g": (n_embd,), "b": (n_embd,)}
    attn = {"c_attn": linear(n_embd, 3 * n_embd), "c_proj": linear(n_embd, n_embd)}
    mlp = {"c_fc": linear(n_embd, 4 * n_embd), "c_proj": linear(4 * n_embd, n_embd)}
    blocks = [{"ln_1": norm, "attn": attn, "ln_2": norm, "mlp": mlp} for _ in range(n_layer)]
    return {"wte": (n_vocab, n_embd), "wpe": (n_ctx, n_embd), "blocks": blocks, "ln_f": norm}


def map_params(f, nest, path=()):
    """The same nest with f(path, leaf) for each leaf; a path is such as ("blocks", 0, "attn", "c_attn", "w")."""
    if isinstance(nest, dict):
        return {key: map_params(f, value, (*path, key)) for key, value in nest.items()}
    if isinstance(nest, list):
        return [map_params(f, value, (*path, i)) for i, value in enumerate(nest)]
    return f(path, nest)


def replace_params(f, nest, path=()):
    """map_params in place: each array is let go once f has made another of it."""
    for key in nest if isinstance(nest, dict) else range(len(nest)):
        place, value = (*path, key), nest[key]
        nest[key] = replace_params(f, value, place) if isinstance(value, (dict, list)) else f(place, value)
    return nest


DTYPES = ("float32", "bfloat16", "float64")


def cast(params, dtype):
    """params in one of DTYPES; those that have it already are not copied. Raises ValueError for any other dtype."""
    dtype = find_dtype(dtype)
    return map_params(lambda _, array: array.astype(dtype, copy=False), params)


def find_dtype(name):
    """The name of one of DTYPES -> what NumPy calls it. Raises ValueError for any other, or if bfloat16 is missing."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose {', '.join(DTYPES)}")
    if name != "bfloat16":
        return name
    try:
        from ml_dtypes import bfloat16  # NumPy has no such number of its own
    except ModuleNotFoundError:
        raise ValueError("bfloat16 needs ml_dtypes: python3 -m pip install ml_dtypes") from None
    return bfloat16


def tf_name(path):
    """("blocks", 0, "attn", "c_attn", "w") -> "model/h0/attn/c_attn/w" """
    return "model/" + "/".join(map(str, path)).replace("blocks/", "h")


def hf_name(path):
    """("blocks", 0, "attn", "c_attn", "w") -> "h.0.attn.c_attn.weight" """
    words = {"blocks": "h", "w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    return ".".join(words.get(part, str(part)) for part in path)


def assemble(path, shapes, found, name_of, read):
    """params from a file at `path` that holds {name: shape} `found`, each tensor read(name).

    Before anything is read, raises OSError with the names that are missing, of another shape, or of no use.
    """
    expected = {}
    map_params(lambda place, shape: expected.update({name_of(place): shape}), shapes)
    wrong = [f"{name} is missing" for name in expected if name not in found]
    for name, shape in found.items():
        if name not in expected:
            wrong.append(f"{name} has no place in a model of these hyperparameters")
        elif tuple(shape) not in (expected[name], (1, *expected[name])):  # OpenAI stores each w as [1, n_in, n_out]
            wrong.append(f"{name} is {list(shape)}, by the hyperparameters {list(expected[name])}")
    if wrong:
        raise OSError(f"{path}: {'; '.join(wrong[:3])}{f' (and {len(wrong) - 3} more)' if len(wrong) > 3 else ''}")
    return map_params(lambda place, shape: read(name_of(place)).reshape(shape), shapes)


# ---- OpenAI's layout: a TensorFlow checkpoint, without TensorFlow ----

MAGIC = bytes.fromhex("57fb808b247547db")  # how a string table ends
Entry = namedtuple("Entry", "dtype shape offset size crc32c")  # one tensor: as what, and where in the data file


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """params from tf_ckpt_path + ".index" and ".data-00000-of-00001", float32, mapped and not copied: a change to an
    array stays in memory. Raises OSError naming file and tensor if anything is missing, misplaced or misshapen."""
    entries, path = read_index(f"{tf_ckpt_path}.index"), f"{tf_ckpt_path}.data-00000-of-00001"
    entries = {name: entry for name, entry in entries.items() if name.startswith("model/")}  # no optimizer's
    data = map_file(path)
    for name, entry in entries.items():
        if line := misplacement(name, entry, len(data)):
            raise OSError(f"{path}: {line}")

    def read(name):
        entry, is_matrix = entries[name], len(entries[name].shape) > 1
        # A matrix's own mapping ends with it, and its memory is free. Each keeps a file open, so vectors share one.
        numbers = map_file(path, entry.offset, entry.size) if is_matrix else tensor_bytes(data, entry)
        return numbers.view("<f4")

    found = {name: entry.shape for name, entry in entries.items()}
    return assemble(path, param_shapes(**hparams), found, tf_name, read)


def map_file(path, offset=0, size=None):
    """The bytes of a file, or of a part of it, as an array, read when they are first looked at ("c": changes stay in
    memory)."""
    if os.path.getsize(path) == 0:
        raise OSError(f"{path}: empty")
    return np.asarray(np.memmap(path, np.uint8, "c", offset, size))


def tensor_bytes(data, entry):
    return data[entry.offset : entry.offset + entry.size]


def misplacement(name, entry, n_bytes):
    """What is wrong if a tensor is not the float32 numbers of its shape inside a file of n_bytes, else None."""
    if entry.dtype != 1:  # DT_FLOAT in TensorFlow's types.proto
        return f"{name} holds numbers of TensorFlow's type {entry.dtype}, not float32 (1)"
    if entry.size != 4 * math.prod(entry.shape):
        return f"{name} takes {entry.size} bytes, its shape {entry.shape} {4 * math.prod(entry.shape)}"
    if entry.offset + entry.size > n_bytes:
        return f"{name} ends at byte {entry.offset + entry.size}, the file at {n_bytes}: it was cut short"
    return None


def damages(index_path, data_path):
    """One line for each tensor that is misplaced, or whose bytes do not have the checksum that the index has, and one
    for bytes at the end that belong to none."""
    data, entries = map_file(data_path), read_index(index_path)
    if surplus := max(0, len(data) - max(entry.offset + entry.size for entry in entries.values())):
        yield f"{data_path}: a surplus of {surplus} bytes after the last tensor"
    for name, entry in entries.items():
        if line := misplacement(name, entry, len(data)):
            yield f"{data_path}: {line}"
        elif (crc32c := masked_crc32c(tensor_bytes(data, entry))) != entry.crc32c:
            yield f"{data_path}: {name} has checksum {crc32c:08x}, by the index {entry.crc32c:08x}"


def read_index(path):
    """{name: Entry} from an .index: a table as LevelDB makes them (its doc/table_format.md), the values as TensorFlow's
    tensor_bundle.proto says. Raises OSError naming the file if it is damaged."""
    data = Path(path).read_bytes()
    try:
        if data[-8:] != MAGIC:
            raise ValueError("it has another ending")
        _, i = read_handle(data, len(data) - 48)  # the footer points to two blocks; the first is of no use here,
        blocks, _ = read_handle(data, i)  # the second lists the blocks that hold the entries
        handles = [read_handle(value, 0)[0] for _, value in read_block(data, *blocks)]
        values = {key.decode(): value for handle in handles for key, value in read_block(data, *handle)}
        return {name: read_entry(value) for name, value in values.items() if name}  # the nameless one is a header
    except (ValueError, IndexError, struct.error) as error:
        raise OSError(f"{path}: no index of a TensorFlow checkpoint, or a damaged one ({error})") from None


def read_block(data, offset, size):
    """The (key, value) pairs of a block. Keys are sorted, and each leaves out what it shares with the one before."""
    kind, checksum = struct.unpack_from("<BI", data, offset + size)
    if kind != 0 or masked_crc32c(data[offset : offset + size + 1]) != checksum:
        raise ValueError("a block is compressed, or its checksum is wrong")
    (n_restarts,) = struct.unpack_from("<I", data, offset + size - 4)  # for binary search, with as many offsets before
    end, i, key = offset + size - 4 - 4 * n_restarts, offset, b""
    while i < end:
        n_shared, i = read_varint(data, i)
        n_fresh, i = read_varint(data, i)
        n_value, i = read_varint(data, i)
        key = key[:n_shared] + data[i : i + n_fresh]
        yield key, data[i + n_fresh : i + n_fresh + n_value]
        i += n_fresh + n_value


def read_handle(data, i):
    """The (offset, size) of a block, two varints at data[i], and the place after them."""
    offset, i = read_varint(data, i)
    size, i = read_varint(data, i)
    return (offset, size), i


def read_varint(data, i):
    """The whole number at data[i] and the place after it: 7 bits a byte, lowest first; the top bit says "more follow"
    (Protocol Buffers, "Encoding")."""
    value = shift = 0
    while data[i] >= 0x80:
        value, shift, i = value | (data[i] & 0x7F) << shift, shift + 7, i + 1
    return value | data[i] << shift, i + 1


def read_entry(data):
    """A BundleEntryProto -> Entry. A field that is absent is 0."""
    fields = dict(read_fields(data))
    shape = [dict(read_fields(dim)).get(1, 0) for _, dim in read_fields(fields.get(2, b""))]
    return Entry(fields.get(1, 0), shape, fields.get(4, 0), fields.get(5, 0), fields.get(6, 0))


def read_fields(data):
    """The (number, value) pairs of a protocol buffer: numbers, or bytes for what is nested ("Encoding", again)."""
    i = 0
    while i < len(data):
        tag, i = read_varint(data, i)
        if tag & 7 == 5:  # four bytes
            value, i = struct.unpack_from("<I", data, i)[0], i + 4
        else:
            value, i = read_varint(data, i)
        if tag & 7 == 2:  # that was a length
            value, i = data[i : i + value], i + value
        yield tag >> 3, value


def masked_crc32c(data):
    """CRC-32C, rotated and shifted as LevelDB and TensorFlow store it, to tell it from the data it guards."""
    import google_crc32c

    crc = google_crc32c.value(bytes(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---- Hugging Face's layout ----


HF_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def load_gpt2_params_from_hf(path, hparams):
    """params from a model.safetensors. float32 and float64 stay; narrower numbers become float32."""
    import safetensors

    try:
        tensors = dict(safetensors.deserialize(Path(path).read_bytes()))
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: no safetensors file, or a damaged one ({error})") from None
    # The same model is found with and without this prefix, and with buffers that are no parameters.
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors = {name: t for name, t in tensors.items() if not re.search(r"\.attn\.(masked_)?bias$|^lm_head", name)}
    if odd := [f"{name} ({t['dtype']})" for name, t in tensors.items() if t["dtype"] not in HF_DTYPES]:
        raise OSError(f"{path}: {odd[0]} is of a type that this reader does not know")
    found = {name: tensor["shape"] for name, tensor in tensors.items()}
    return assemble(path, param_shapes(**hparams), found, hf_name, lambda name: widen(tensors[name]))


def widen(tensor):
    """The numbers of a tensor from a safetensors file. bfloat16 is float32 without its lower half."""
    numbers = np.frombuffer(tensor["data"], HF_DTYPES[tensor["dtype"]])
    if tensor["dtype"] == "BF16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.promote_types(numbers.dtype, np.float32))
