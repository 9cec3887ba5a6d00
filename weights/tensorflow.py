"""A TensorFlow checkpoint, the format of OpenAI's weights, read and written without TensorFlow.

The format is simpler than the 1.3 GB package that usually reads it. Two files:

    model.ckpt.data-00000-of-00001   the numbers of all tensors, little-endian, one after the other, and nothing else
    model.ckpt.index                 a sorted table: tensor name -> number type, shape, offset, size, checksum

The table, a few kB, is parsed. The numbers are memory-mapped: the operating system reads a page of the file when it is
first used, so loading makes no copy. Files up to 100 MB are read once on load, to compare their checksums.

Sources: LevelDB's doc/table_format.md (the index), TensorFlow's tensor_bundle.proto (its values), Protocol Buffers,
"Encoding" (how these are written).
"""

import itertools
import math
import re
import struct
from collections import namedtuple
from pathlib import Path

import numpy as np

from weights.files import check_regular, map_file, map_part, read_json, read_text, replacing, write_text
from weights.params import assemble, check_hparams, flatten, param_shapes

MAGIC = bytes.fromhex("57fb808b247547db")  # the last 8 bytes of every LevelDB table
MAX_CHECKED = 10**8  # bytes: checksums of a data file up to this size are computed on load, in 20 ms at most
MAX_INDEX = 2**20  # bytes: a model of 1000 layers has an index of 0.7 MB
MAX_KEY, MAX_DIMENSIONS = 255, 8  # of an entry of the index
Entry = namedtuple("Entry", "dtype shape offset size crc32c")  # one tensor: its number type, and where its bytes are


def tf_name(path):
    """("blocks", 0, "attn", "c_attn", "w") -> "model/h0/attn/c_attn/w" """
    return "model/" + "/".join(map(str, path)).replace("blocks/", "h")


# ---- Reading ----


def read_hparams(path):
    """{n_vocab, n_ctx, n_embd, n_head, n_layer} of an hparams.json. Raises OSError for a file that is damaged."""
    return check_hparams(path, read_json(path))


def latest_checkpoint(path):
    """The path, without endings, of the checkpoint that the file `checkpoint` names. Raises OSError if it names none.

    TensorFlow writes the full path of where the checkpoint was saved. Only its last part counts here, as the folder may
    have been moved since.
    """
    if not (match := re.match(r'model_checkpoint_path: "([^"\0]+)"', read_text(path, is_small=True))):
        raise OSError(f"{path}: does not begin with a model_checkpoint_path")
    return path.parent / Path(match[1]).name


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """The params in tf_ckpt_path + ".index" and ".data-00000-of-00001": float32, memory-mapped, not copied. Changing an
    array changes memory, never the file.

    Raises OSError naming the file and the tensor if one is missing, lies outside the file, has another shape, or does
    not have the checksum that the index has (in a file of up to MAX_CHECKED bytes; `file_damages` checks any).
    """
    entries, path = read_index(f"{tf_ckpt_path}.index"), f"{tf_ckpt_path}.data-00000-of-00001"
    data = map_file(path)
    # Only tensors of the model are checked: a checkpoint may hold those of an optimizer too.
    if damage := next(damages(entries, data, prefix="model/", checksums=len(data) <= MAX_CHECKED), None):
        raise OSError(f"{path}: {damage}")
    found = {name: entry.shape for name, entry in entries.items() if name.startswith("model/")}

    def read(name):
        return map_part(path, data, entries[name].offset, entries[name].size).view("<f4")

    return assemble(path, param_shapes(**hparams), found, tf_name, read)


def file_damages(index_path, data_path):
    """Yields a line for each damage of a data file, whatever its size, and checks every tensor's checksum."""
    yield from (f"{data_path}: {line}" for line in damages(read_index(index_path), map_file(data_path)))


def damages(entries, data, prefix="", checksums=True):
    """Yields a line if `data`, the bytes of a data file, does not end with the last tensor of the index `entries`, and
    one for each tensor whose name begins with `prefix` and that is misplaced or has the wrong checksum."""
    if (n_surplus := len(data) - max(entry.offset + entry.size for entry in entries.values())) > 0:
        yield f"a surplus of {n_surplus} bytes after the last tensor"
    for name, entry in entries.items():
        if not name.startswith(prefix):
            continue
        if fault := misplacement(name, entry, len(data)) or (checksums and wrong_checksum(entry, data)):
            yield f"{name} {fault}"


def misplacement(name, entry, n_bytes):
    """What is wrong with an entry of the index, as text, or None: a tensor must lie inside the data file of n_bytes,
    and a parameter must be the float32 numbers of its shape."""
    if name.startswith("model/") and entry.dtype != 1:  # DT_FLOAT in TensorFlow's types.proto
        return f"holds numbers of TensorFlow's type {entry.dtype}, not float32 (1)"
    if entry.dtype == 1 and entry.size != 4 * math.prod(entry.shape):
        return f"takes {entry.size} bytes, its shape {entry.shape} {4 * math.prod(entry.shape)}"
    if entry.offset + entry.size > n_bytes:
        return f"ends at byte {entry.offset + entry.size}, the file at {n_bytes}: it was cut short"
    return None


def wrong_checksum(entry, data):
    """What is wrong with the bytes of a tensor, as text, or None: they must have the checksum that the index has."""
    found = masked_crc32c(data[entry.offset : entry.offset + entry.size])
    if found != entry.crc32c:
        return f"has checksum {found:08x}, by the index {entry.crc32c:08x}: download or copy the file again"
    return None


def read_index(path):
    """{tensor name: Entry} of an .index file. Raises OSError naming the file if it is damaged, or built to take very
    long: its size, and that of each part, is limited, and no block may be listed twice."""
    check_regular(path, MAX_INDEX)
    data = Path(path).read_bytes()
    try:
        if data[-8:] != MAGIC:
            raise ValueError("its last 8 bytes are not those of a table")
        _, i = read_handle(data, len(data) - 48)  # the footer names two blocks; the first is not needed,
        blocks, _ = read_handle(data, i)  # the second lists the blocks that hold the entries
        handles = [read_handle(value, 0)[0] for _, value in read_block(data, *blocks)]
        if any(after[0] <= sum(before) for before, after in itertools.pairwise(handles)):
            raise ValueError("its blocks overlap")
        values = {key.decode(): value for handle in handles for key, value in read_block(data, *handle)}
        values.pop("", None)  # the header
        if not values:
            raise ValueError("no tensor is in it")
        return {name: read_entry(value) for name, value in values.items()}
    except (ValueError, IndexError, TypeError, OverflowError, struct.error) as error:
        raise OSError(f"{path}: no index of a TensorFlow checkpoint, or a damaged one ({error})") from None


def read_block(data, offset, size):
    """The (key, value) pairs of a block. Keys are sorted; each is stored without the prefix that it shares with the one
    before it."""
    kind, checksum = struct.unpack_from("<BI", data, offset + size)
    if kind != 0 or masked_crc32c(data[offset : offset + size + 1]) != checksum:
        raise ValueError("a block is compressed, or its checksum is wrong")
    (n_restarts,) = struct.unpack_from("<I", data, offset + size - 4)  # a block ends with offsets for binary search
    end, i, key = offset + size - 4 - 4 * n_restarts, offset, b""
    while i < end:
        n_shared, i = read_varint(data, i)
        n_fresh, i = read_varint(data, i)
        n_value, i = read_varint(data, i)
        key = key[:n_shared] + data[i : i + n_fresh]
        if len(key) > MAX_KEY:
            raise ValueError(f"a name of more than {MAX_KEY} bytes")
        yield key, data[i + n_fresh : i + n_fresh + n_value]
        i += n_fresh + n_value


def read_handle(data, i):
    """((offset, size) of a block, the index after them): two varints at data[i]."""
    offset, i = read_varint(data, i)
    size, i = read_varint(data, i)
    return (offset, size), i


def read_varint(data, i):
    """(the whole number at data[i], the index after it). Each byte holds 7 bits, the lowest first; its top bit is 1 if
    more bytes follow. A number has 64 bits, so ten bytes, at most."""
    value = 0
    for n in range(10):
        value |= (data[i + n] & 0x7F) << 7 * n
        if data[i + n] < 0x80:
            return value, i + n + 1
    raise ValueError("a number of more than ten bytes")


def read_entry(data):
    """A BundleEntryProto -> Entry. A field that is absent is 0."""
    fields = dict(read_fields(data))
    shape = [dict(read_fields(dim)).get(1, 0) for _, dim in read_fields(fields.get(2, b""))]
    entry = Entry(fields.get(1, 0), shape, fields.get(4, 0), fields.get(5, 0), fields.get(6, 0))
    if len(shape) > MAX_DIMENSIONS or not all(isinstance(n, int) for n in (*shape, *entry[:1], *entry[2:])):
        raise ValueError("an entry is no description of a tensor")
    return entry


def read_fields(data):
    """The (field number, value) pairs of a protocol buffer. A value is a whole number, or the bytes of a nested one."""
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
    """The checksum CRC-32C, rotated and shifted: LevelDB stores it so, since a plain checksum of data that contains its
    own checksums is weak."""
    import google_crc32c

    crc = google_crc32c.value(data if google_crc32c.implementation == "c" else bytes(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---- Writing ----


def save_gpt2_params_to_tf_ckpt(tf_ckpt_path, params):
    """Writes params as float32 in the two files of a checkpoint, and last the file `checkpoint`, which names the one to
    load. TensorFlow reads them too."""
    path, offset = Path(tf_ckpt_path), 0
    entries = [(b"", b"\x08\x01\x1a\x02\x08\x01")]  # the header: one data file, version 1
    tensors = {tf_name(place): array for place, array in flatten(params).items()}
    with replacing(f"{path}.data-00000-of-00001") as part, open(part, "wb") as file:
        for name, array in sorted(tensors.items()):
            shape = (1, *array.shape) if name.endswith("/w") else array.shape
            data = np.ascontiguousarray(array, "<f4").tobytes()
            file.write(data)
            entries.append((name.encode(), entry_bytes(shape, offset, data)))
            offset += len(data)
    with replacing(f"{path}.index") as part:
        part.write_bytes(table_bytes(entries))
    write_text(path.with_name("checkpoint"), f'model_checkpoint_path: "{path.name}"\n')


def entry_bytes(shape, offset, data):
    """The inverse of read_entry."""
    dims = b"".join(b"\x12" + sized(b"\x08" + varint(n)) for n in shape)
    where = b"\x20" + varint(offset) + b"\x28" + varint(len(data))
    return b"\x08\x01\x12" + sized(dims) + where + b"\x35" + struct.pack("<I", masked_crc32c(data))


def table_bytes(entries):
    """The inverse of read_index: a table with the sorted (key, value) pairs `entries`. One block holds them, an empty
    one follows, then one that lists the first; the footer of 48 bytes says where the second and third are."""
    written, handles = b"", []
    for pairs in (entries, [], None):
        pairs = [(entries[-1][0], handles[0])] if pairs is None else pairs
        block = b"".join(b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs)
        block += struct.pack("<II", 0, 1)  # one restart point, the beginning: no key leaves anything out
        handles.append(varint(len(written)) + varint(len(block)))
        written += block + b"\0" + struct.pack("<I", masked_crc32c(block + b"\0"))
    return written + (handles[1] + handles[2]).ljust(40, b"\0") + MAGIC


def varint(n):
    """The inverse of read_varint."""
    return bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80]) + varint(n >> 7)


def sized(data):
    return varint(len(data)) + data
