"""A GGUF file: a whole model in one file, its configuration, its tokenizer and its weights, most of them in 4 to 8 bits
a number. llama.cpp and the programs around it use this format.

    config = read_config("model.gguf")
    params = load_llama_params("model.gguf", config)      # float32, as variants/llama.py wants them

The file holds, all numbers little-endian, a text as its length (8 bytes) and its UTF-8:

    "GGUF"            4 bytes, then the version (4 bytes), the numbers of tensors and of fields (8 bytes each)
    fields            each a name, the number of its type, and a value, which may be a list:
                      llama.block_count 30, tokenizer.ggml.tokens ["<|endoftext|>", ...]
    tensors           each a name, the sizes of its axes (the last axis first), its number type, where its data begins
    data              of one tensor after the other; each begins at a multiple of general.alignment, or of 32

Quantization: neighbouring numbers of a row form a block. The 32 numbers w of a block of the type Q4_1 are replaced by
numbers that lie evenly between the lowest and the highest one, 16 of them, so that 4 bits say which one is meant:

    w = d * q + m      q is a whole number from 0 to 15

    bytes 0 and 1      d, the step, a float16
    bytes 2 and 3      m, the lowest number, a float16
    bytes 4 to 19      q: the lower halves of the 16 bytes are those of numbers 0 to 15, the upper halves 16 to 31

That is 20 bytes for 32 numbers, 5 bits each instead of 32. For 32 numbers that rise evenly from -1 to 1, d is 2 / 15 =
0.1333 and m is -1. The second number, -0.9355, has q = 0 and comes back as -1; the third, -0.8710, has q = 1 and comes
back as -0.8667. No error is larger than d / 2. docs/models.md has the code that prints this.

The `gguf` package knows some thirty such types and undoes them (gguf.quants.dequantize). Its reader is not used: it
makes three arrays of each text, which takes longer than everything else (there are 98,000 texts in the tokenizer of
SmolLM2), and may count on for ever in a damaged file.

Source: the specification of the format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import functools
import math
import os
import struct
from typing import NamedTuple

import numpy as np

from weights.files import map_file, map_part
from weights.llama import check_heads, number
from weights.params import assemble, check_sizes, empty, llama_shapes, replace_leaves

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # type -> struct's
TEXT, LIST = 8, 9  # the other two types
SIZES = {
    "n_ctx": "llama.context_length",
    "n_embd": "llama.embedding_length",
    "n_head": "llama.attention.head_count",
    "n_head_kv": "llama.attention.head_count_kv",
    "d_head": "llama.attention.key_length",
    "n_layer": "llama.block_count",
    "n_ffn": "llama.feed_forward_length",
}
WORDS = {
    "wte": "token_embd",
    "lm_head": "output",
    "blocks": "blk",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "c_q": "attn_q",
    "c_k": "attn_k",
    "c_v": "attn_v",
    "c_proj": "attn_output",
    "c_gate": "ffn_gate",
    "c_up": "ffn_up",
    "c_down": "ffn_down",
}
ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>")
N_CHUNK = 2**16  # bytes that are dequantized at once: the numbers that they become stay in a processor's cache


class Tensor(NamedTuple):
    shape: tuple  # the last axis last, as NumPy has it
    kind: int  # the number of its type
    offset: int  # of its data, in the file


class Place(NamedTuple):
    kind: object  # gguf's name for the type
    row_size: int  # bytes of a row
    size: int  # bytes of the tensor


class Header(NamedTuple):
    fields: dict  # {name: value}
    tensors: dict  # {name: Tensor}


def gguf_name(path):
    """("blocks", 0, "attn", "c_q", "w") -> "blk.0.attn_q.weight" """
    words = [WORDS.get(part, str(part)) for part in path if part not in ("attn", "mlp", "w", "g")]
    return ".".join([*words, "weight"])


# ---- The header ----


def read_header(path):
    """The Header of a GGUF file. Raises OSError naming the file if it is damaged or of another format."""
    stamp = os.stat(path)
    return _read_header(path, stamp.st_mtime_ns, stamp.st_size)


@functools.lru_cache(maxsize=1)  # the configuration, the tokenizer, the weights and the end ids are asked for in turn
def _read_header(path, *_stamp):
    data = memoryview(map_file(path))
    if data[:4] != b"GGUF":
        raise OSError(f"{path}: no GGUF file, it does not begin with the letters GGUF")
    try:
        version, n_tensors, n_fields = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):
            raise ValueError(f"version {version}; 2 and 3 are read here")
        fields, at = read_entries(data, 24, n_fields, read_value)
        tensors, at = read_entries(data, at, n_tensors, read_tensor)
        step = fields.get("general.alignment", 32)
        start = -(-at // step) * step
    except (struct.error, ValueError, KeyError, TypeError, ZeroDivisionError, MemoryError, OverflowError) as error:
        raise OSError(f"{path}: a GGUF file that is damaged or cut short ({error})") from None
    return Header(fields, {name: tensor._replace(offset=start + tensor.offset) for name, tensor in tensors.items()})


def read_entries(data, at, n, read):
    """({name: value} of n entries from byte `at` on, where they end)."""
    entries = {}
    for _ in range(n):
        (name,), at = read_texts(data, at, 1)
        if name in entries:
            raise ValueError(f"{name!r:.60} is in it twice")
        entries[name], at = read(data, at)
    return entries, at


def read_texts(data, at, n):
    """(list of n texts from byte `at` on, where they end)."""
    texts, unpack = [], struct.Struct("<Q").unpack_from
    for _ in range(n):
        begin = at + 8
        at = begin + unpack(data, at)[0]
        texts.append(str(data[begin:at], "utf-8"))
    if at > len(data):
        raise ValueError(f"a text goes to byte {at}, the file has {len(data)}")
    return texts, at


def read_value(data, at):
    """(the value of a field, where it ends)."""
    (kind,) = struct.unpack_from("<I", data, at)
    if kind == LIST:
        kind, n = struct.unpack_from("<IQ", data, at + 4)
        return read_list(data, at + 16, kind, n)
    (value,), at = read_list(data, at + 4, kind, 1)
    return value, at


def read_list(data, at, kind, n):
    if n > len(data):  # before a loop tries
        raise ValueError(f"a list of {n} values, the file has {len(data)} bytes")
    if kind == TEXT:
        return read_texts(data, at, n)
    layout = f"<{n}{SCALARS[kind]}"
    return list(struct.unpack_from(layout, data, at)), at + struct.calcsize(layout)


def read_tensor(data, at):
    """(Tensor, where its entry ends). The offset is counted from the beginning of all data."""
    (n_axes,) = struct.unpack_from("<I", data, at)
    if not 1 <= n_axes <= 4:
        raise ValueError(f"a tensor with {n_axes} axes")
    *shape, kind, offset = struct.unpack_from(f"<{n_axes}QIQ", data, at + 4)
    return Tensor(tuple(shape[::-1]), kind, offset), at + 4 + 8 * n_axes + 12


# ---- The configuration ----


def read_config(path):
    """The config of a LLaMA, as variants/llama.py describes it. Raises OSError for another architecture, for sizes that
    are none, and for what is not computed here."""
    fields, tensors = read_header(path)
    if (name := fields.get("general.architecture")) != "llama":
        raise OSError(f"{path}: the architecture {name!r:.40} is not computed here: of GGUF files only llama is")
    if "rope_freqs.weight" in tensors or fields.get("llama.rope.scaling.type", "none") != "none":
        raise OSError(f"{path}: scaled rotary positions are not read from GGUF files: load the Hugging Face folder")
    n_embd, n_head = (check_sizes(path, fields, {name: SIZES[name]})[name] for name in ("n_embd", "n_head"))
    if SIZES["d_head"] not in fields and n_embd % n_head:
        raise OSError(f"{path}: vectors of {n_embd} numbers cannot be shared among {n_head} heads")
    found = {SIZES["n_head_kv"]: n_head, SIZES["d_head"]: n_embd // n_head} | fields
    found["the rows of token_embd.weight"] = (
        tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 0
    )
    config = check_sizes(path, found, {"n_vocab": "the rows of token_embd.weight"} | SIZES)
    check_heads(path, config)
    if (n := fields.get("llama.rope.dimension_count", config["d_head"])) != config["d_head"]:
        raise OSError(f"{path}: rotary positions of {n!r:.40} of {config['d_head']} numbers are not computed here")
    for ours, theirs in ("eps", "llama.attention.layer_norm_rms_epsilon"), ("rope_base", "llama.rope.freq_base"):
        config[ours] = number(path, theirs, fields.get(theirs, 10000.0 if ours == "rope_base" else None))
    return config | {"rope_scaling": None, "tied": "output.weight" not in tensors}


def end_ids(path, special):
    """The ids of the tokens that end a text or a turn of a conversation, by the file and by their names among
    `special`, {text: id}. A file names one of them, mostly the end of a turn."""
    fields = read_header(path).fields
    found = [fields[name] for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if name in fields]
    return found + [special[text] for text in ENDS if text in special and special[text] not in found]


# ---- The weights ----


def load_llama_params(path, config):
    """The params of a GGUF file in float32. Raises OSError naming the file and the tensor if one is missing, of
    another shape, not inside the file, or of a type that gguf cannot dequantize."""
    from concurrent.futures import (
        ThreadPoolExecutor,
    )  # here, as this takes a while, and most programs need no GGUF file

    tensors = read_header(path).tensors
    found = {name: tensor.shape for name, tensor in tensors.items()}
    shapes = {place: shape[::-1] if place[-1] == "w" else shape for place, shape in llama_shapes(config).items()}
    orders = {"attn_q": row_order(config["n_head"], config["d_head"])}
    orders["attn_k"] = row_order(config["n_head_kv"], config["d_head"])
    data = map_file(path)

    def read(name):
        rows = map_part(path, data, tensors[name].offset, places[name].size).reshape(-1, places[name].row_size)
        order = orders.get(name.split(".")[-2])
        return dequantize(rows if order is None else rows[order], places[name].kind, tensors[name].shape[-1], pool)

    with ThreadPoolExecutor(2) as pool:
        places = locate(path, tensors, len(data))
        try:
            params = assemble(path, shapes, found, gguf_name, read)
        except NotImplementedError as error:
            raise OSError(f"{path}: {error}: gguf cannot undo this quantization") from None
    return replace_leaves(lambda place, array: array.T if place[-1] == "w" else array, params)


def locate(path, tensors, n_data):
    """{name: Place} of the tensors. Raises OSError unless they lie inside the file and do not overlap."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ModuleNotFoundError:
        raise ValueError(f"{path} needs the package gguf: python3 -m pip install gguf") from None
    places, end, last = {}, 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        try:
            kind = GGMLQuantizationType(tensor.kind)
        except ValueError:
            raise OSError(f"{path}: {name} has the number type {tensor.kind}, which gguf does not know") from None
        n_block, block_size = GGML_QUANT_SIZES[kind]
        if tensor.shape[-1] % n_block:
            raise OSError(f"{path}: {name} has rows of {tensor.shape[-1]} numbers, {kind.name} blocks have {n_block}")
        row_size = tensor.shape[-1] // n_block * block_size
        places[name] = Place(kind, row_size, row_size * math.prod(tensor.shape[:-1]))
        if tensor.offset < end:
            raise OSError(f"{path}: damaged: {name} begins before {last} ends")
        end, last = tensor.offset + places[name].size, name
        if end > n_data:
            raise OSError(f"{path}: {name} ends at byte {end}, the file has {n_data}: it is damaged or was cut short")
    return places


def row_order(n_head, d_head):
    """The rows of a query or key matrix of a GGUF file, in the order in which they are wanted here, [n_head * d_head].

    Rotary positions turn pairs of numbers of a head. In GGUF files of LLaMAs the two of a pair are neighbours; here and
    at Hugging Face the first ones of all pairs come first: rows 0, 2, 4, ... of each head, then 1, 3, 5, ...
    """
    rows = np.arange(n_head * d_head).reshape(n_head, d_head // 2, 2)
    return rows.swapaxes(1, 2).ravel()


def dequantize(rows, kind, n_in, pool):
    """gguf.quants.dequantize for rows of bytes, n_in numbers each, in chunks and by the threads of `pool`,
    so that memory holds few numbers twice. Raises NotImplementedError for a type that it does not undo."""
    import gguf

    if kind.name == "F32":
        return rows.view(np.float32)
    n, numbers = max(1, N_CHUNK // rows.shape[1]), empty((len(rows), n_in), np.float32)

    def convert(start):
        with np.errstate(all="ignore"):  # damage may lead to NaN, of which the program that computes with it will speak
            numbers[start : start + n] = gguf.quants.dequantize(rows[start : start + n], kind)

    list(pool.map(convert, range(0, len(rows), n)))  # a list, so that errors are raised here
    return numbers
