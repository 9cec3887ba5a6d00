"""The checkpoint reader against TensorFlow's, and damage of every kind."""

import json
import math
import shutil
import struct
import time
import tracemalloc
import weakref

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, oracle, random_params

import utils
from tools import models
from weights import tensorflow as checkpoint
from weights.params import flatten, param_shapes, replace_leaves

SMALL = {"n_vocab": 11, "n_ctx": 8, "n_embd": 6, "n_head": 2, "n_layer": 12}


def flat(params):
    return {checkpoint.tf_name(path): array for path, array in flatten(params).items()}


def write_with_tensorflow(prefix, tensors):
    tf = oracle("tensorflow").compat.v1
    with tf.Graph().as_default(), tf.Session() as session:
        variables = {name: tf.Variable(array) for name, array in tensors.items()}
        session.run(tf.global_variables_initializer())
        tf.train.Saver(variables).save(session, str(prefix), write_meta_graph=False)


def as_openai_stores_it(params):
    return {name: array[None] if name.endswith("/w") else array for name, array in flat(params).items()}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "model", ignore=shutil.ignore_patterns("golden*"))


def load(folder):
    return utils.load_encoder_hparams_and_params(folder.name, folder.parent)


@pytest.mark.parametrize("model", [GOLDEN, ROOT / "models" / "3M"], ids=["golden", "3M"])
def test_every_tensor_equals_tensorflows(model):
    tf = oracle("tensorflow")
    reader = tf.train.load_checkpoint(str(model / "model.ckpt"))
    ours = flat(load(model)[2])
    shapes = reader.get_variable_to_shape_map()
    assert ours.keys() == shapes.keys()
    for name, array in ours.items():
        assert array.dtype == np.float32
        assert type(array) is np.ndarray
        assert np.array_equal(array, reader.get_tensor(name).reshape(array.shape)), name


def test_a_checkpoint_with_more_than_ten_layers_and_an_optimizer(tmp_path):
    params = random_params(**SMALL)
    extra = {"global_step": np.int64(7), "adam/m": np.ones(5, np.float32)}
    write_with_tensorflow(tmp_path / "model.ckpt", {**as_openai_stores_it(params), **extra})
    loaded = checkpoint.load_gpt2_params_from_tf_ckpt(tmp_path / "model.ckpt", SMALL)
    for name, array in flat(params).items():
        assert np.array_equal(flat(loaded)[name], array), name


def test_a_table_of_many_blocks(tmp_path):
    """4 kB fill a block of the index; 48 layers take several."""
    hparams = {"n_vocab": 3, "n_ctx": 2, "n_embd": 2, "n_head": 1, "n_layer": 48}
    params = random_params(**hparams)
    write_with_tensorflow(tmp_path / "model.ckpt", as_openai_stores_it(params))
    assert (tmp_path / "model.ckpt.index").stat().st_size > 8192
    loaded = checkpoint.load_gpt2_params_from_tf_ckpt(tmp_path / "model.ckpt", hparams)
    assert all(np.array_equal(array, flat(loaded)[name]) for name, array in flat(params).items())


def test_tensorflow_reads_what_we_write_and_so_do_we(tmp_path):
    tf = oracle("tensorflow")
    params = random_params(**SMALL)
    checkpoint.save_gpt2_params_to_tf_ckpt(tmp_path / "model.ckpt", params)
    reader = tf.train.load_checkpoint(str(tmp_path))
    for name, array in as_openai_stores_it(params).items():
        assert np.array_equal(reader.get_tensor(name), array), name
    assert reader.get_variable_to_shape_map().keys() == flat(params).keys()
    loaded = checkpoint.load_gpt2_params_from_tf_ckpt(tmp_path / "model.ckpt", SMALL)
    assert all(np.array_equal(array, flat(loaded)[name]) for name, array in flat(params).items())
    assert list(checkpoint.file_damages(tmp_path / "model.ckpt.index", tmp_path / utils.DATA)) == []


def test_hugging_face_folders_load_the_same():
    _, hparams, params = load(GOLDEN)
    encoder_hf, hparams_hf, params_hf = load(GOLDEN / "hf")
    assert hparams == hparams_hf
    assert encoder_hf.encode("Once upon a time") == [404, 425, 258, 378]
    for name, array in flat(params).items():
        assert np.array_equal(flat(params_hf)[name], array), name


def test_params_may_be_changed_and_the_file_is_not(folder):
    before = (folder / utils.DATA).read_bytes()
    params = load(folder)[2]
    params["wte"][0] = 7
    params["blocks"][0]["attn"]["c_attn"]["w"] *= 0
    assert (folder / utils.DATA).read_bytes() == before


def test_param_shapes_count_what_openai_published():
    def count(n_embd, n_head, n_layer):
        return sum(map(math.prod, param_shapes(50257, 1024, n_embd, n_head, n_layer).values()))

    assert count(768, 12, 12) == 124_439_808  # times 4: the 497,759,232 bytes of its data file
    assert count(1024, 16, 24) == 354_823_168


def test_replace_leaves_never_keeps_what_it_has_replaced():
    nest, seen = {"a": [np.zeros(3), {"b": np.zeros(2)}, np.zeros(4)], "c": np.zeros(1)}, []

    def name(path, array):
        assert all(earlier() is None for earlier in seen)
        seen.append(weakref.ref(array))
        return "/".join(map(str, path))

    assert replace_leaves(name, nest) is nest
    assert nest == {"a": ["a/0", {"b": "a/1/b"}, "a/2"], "c": "c"}


def damage_data(folder, how):
    data = bytearray((folder / utils.DATA).read_bytes())
    (folder / utils.DATA).write_bytes(how(data))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "truncated data": (lambda f: damage_data(f, lambda d: d[:-10]), [utils.DATA, "model/wte", "cut short"]),
    "empty data": (lambda f: damage_data(f, lambda d: b""), [utils.DATA, "empty"]),
    "surplus data": (lambda f: damage_data(f, lambda d: d + b"x"), [utils.DATA, "surplus of 1 bytes"]),
    "no data": (lambda f: (f / utils.DATA).unlink(), [utils.DATA, "No such file"]),
    "no index": (lambda f: (f / utils.INDEX).unlink(), [utils.INDEX, "No such file"]),
    "no checkpoint": (lambda f: (f / "checkpoint").unlink(), ["checkpoint", "No such file"]),
    "no hparams": (lambda f: (f / "hparams.json").unlink(), ["hparams.json", "No such file"]),
    "wrong shape": (lambda f: edit_json(f / "hparams.json", n_ctx=97), ["model/wpe is [96, 48]", "[97, 48]"]),
    "a layer too few": (lambda f: edit_json(f / "hparams.json", n_layer=2), ["model/h2/", "has no place"]),
    "a layer too many": (lambda f: edit_json(f / "hparams.json", n_layer=4), ["model/h3/", "is missing", "more"]),
    "absurd number": (lambda f: edit_json(f / "hparams.json", n_head=-4), ["hparams.json", "n_head", "-4"]),
    "not a number": (lambda f: edit_json(f / "hparams.json", n_embd="48"), ["hparams.json", "n_embd", "'48'"]),
    "n_head": (lambda f: edit_json(f / "hparams.json", n_head=5), ["n_embd 48", "n_head 5"]),
    "other tokenizer": (lambda f: edit_json(f / "encoder.json", **{"<new>": 512}), ["ids up to 512", "n_vocab is 512"]),
    "endless layers": (lambda f: edit_json(f / "hparams.json", n_layer=10**9), ["hparams.json", "n_layer", "1000"]),
    "endless number": (lambda f: (f / "hparams.json").write_text('{"n_head": ' + "9" * 5000 + "}"), ["hparams.json"]),
    "NUL": (lambda f: (f / "checkpoint").write_bytes(b'model_checkpoint_path: "a\0b"'), ["checkpoint"]),
    "wrong JSON": (lambda f: (f / "hparams.json").write_text("{"), ["hparams.json", "not JSON"]),
    "a web page": (lambda f: (f / utils.INDEX).write_text("<html>" * 20), [utils.INDEX, "no index"]),
    "no name": (lambda f: (f / "checkpoint").write_text("<html>"), ["checkpoint", "model_checkpoint_path"]),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_one_line_that_names_file_and_tensor(folder, kind, command):
    damage, words = DAMAGES[kind]
    damage(folder)
    with pytest.raises(OSError) as raised:
        load(folder)
    assert all(word in str(raised.value) for word in words), raised.value
    status, out, err = command("hello", "--model_size", str(folder))
    assert (status, out, err.count("\n")) == (1, "", 1)


def test_every_flipped_byte_of_the_index_is_noticed(folder):
    good = (folder / utils.INDEX).read_bytes()
    expected = checkpoint.read_index(folder / utils.INDEX)
    unnoticed = 0
    for i in range(len(good)):
        (folder / utils.INDEX).write_bytes(good[:i] + bytes([good[i] ^ 0x10]) + good[i + 1 :])
        try:
            unnoticed += checkpoint.read_index(folder / utils.INDEX) != expected
        except OSError as error:
            assert utils.INDEX in str(error)
    assert unnoticed == 0


def field(number, value):
    """A field of a protocol buffer: a whole number, or bytes."""
    if isinstance(value, int):
        return checkpoint.varint(number << 3) + checkpoint.varint(value)
    return checkpoint.varint(number << 3 | 2) + checkpoint.sized(value)


def block(pairs):
    """A block of a table; each pair is (number of bytes shared with the name before, the rest of the name, value)."""
    rows = b"".join(checkpoint.varint(s) + checkpoint.varint(len(k)) + checkpoint.varint(len(v)) + k + v
                    for s, k, v in pairs)  # fmt: skip
    rows += struct.pack("<II", 0, 1)
    return rows + b"\0" + struct.pack("<I", checkpoint.masked_crc32c(rows + b"\0"))


def table(entries, n_listed=1):
    """A table with one block of entries, which is listed n_listed times."""
    first = block(entries)
    handle = checkpoint.varint(0) + checkpoint.varint(len(first) - 5)
    second = block([(0, b"z%07d" % i, handle) for i in range(n_listed)])
    footer = checkpoint.varint(0) * 2 + checkpoint.varint(len(first)) + checkpoint.varint(len(second) - 5)
    return first + second + footer.ljust(40, b"\0") + checkpoint.MAGIC


ENTRY = field(1, 1) + field(2, field(2, field(1, 6))) + field(5, 24)
HOSTILE = {
    "a number without an end": lambda: table([(0, b"a", b"\xff" * 10**6)]),
    "a number without an end in the footer": lambda: b"\xff" * 10**6 + checkpoint.MAGIC,
    "one block many times": lambda: table([(0, b"a%05d" % i, ENTRY) for i in range(5000)], 30_000),
    "one block many times, all of it": lambda: table([(0, b"a", ENTRY)] * 9000, 9000),
    "long names": lambda: table([(0, b"a" * 500_000, b"")] + [(500_000, b"", b"")] * 100_000),
    "many entries": lambda: table([(0, b"a" * 250, b"")] + [(245, b"%05d" % i, b"") for i in range(30_000)]),
    "many dimensions": lambda: table([(0, b"model/wte", field(1, 1) + field(2, field(2, field(1, 2**63)) * 50_000))]),
    "no tensors": lambda: table([(0, b"", b"")]),
    "nothing": lambda: table([]),
    "bytes for a number": lambda: table([(0, b"model/wte", field(1, 1) + field(4, b"abc"))]),
    "bytes for a checksum": lambda: table([(0, b"model/wte", ENTRY + field(6, b"abc"))]),
    "a number for a shape": lambda: table([(0, b"model/wte", field(1, 1) + field(2, 7))]),
    "a name that is no text": lambda: table([(0, b"\xff", ENTRY)]),
    "a block outside the file": lambda: b"\0" * 4 + checkpoint.varint(2**63) * 2 + b"\0" * 18 + checkpoint.MAGIC,
    "too large": lambda: b"\0" * 2**20 + checkpoint.MAGIC,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_index_made_to_cost_time_or_memory_is_refused(folder, kind, command):
    (folder / utils.INDEX).write_bytes(HOSTILE[kind]())
    began = time.process_time()
    tracemalloc.start()
    status, out, err = command("x", "--model_size", str(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "model.ckpt" in err
    assert time.process_time() - began < 8  # tracemalloc makes it four times slower than it is
    assert peak < 2e8
    assert command(str(folder), main=models.verify)[0] == 1


def test_what_the_limits_let_pass(tmp_path):
    """A model with as many layers as there may be, and with longer names beside its own."""
    hparams = {"n_vocab": 3, "n_ctx": 2, "n_embd": 2, "n_head": 1, "n_layer": 1000}
    checkpoint.save_gpt2_params_to_tf_ckpt(tmp_path / "model.ckpt", random_params(**hparams))
    assert len(flat(checkpoint.load_gpt2_params_from_tf_ckpt(tmp_path / "model.ckpt", hparams))) == 12_004


def test_the_optimizers_tensors_are_no_damage(tmp_path):
    params = random_params(**SMALL)
    extra = {"global_step": np.int64(7), "adam/m": np.ones(5, np.float32)}
    write_with_tensorflow(tmp_path / "model.ckpt", {**as_openai_stores_it(params), **extra})
    assert list(checkpoint.file_damages(tmp_path / "model.ckpt.index", tmp_path / utils.DATA)) == []


@pytest.mark.parametrize("is_large", [False, True])
def test_a_flipped_byte_is_found_and_the_tensor_named(folder, command, monkeypatch, is_large):
    """By `verify`, and, in a file that is read in no time, on load."""
    if is_large:
        monkeypatch.setattr(checkpoint, "MAX_CHECKED", 456383)
    entry = checkpoint.read_index(folder / utils.INDEX)["model/h1/mlp/c_fc/w"]

    def flip(data):
        data[entry.offset + 5] ^= 1
        return data

    assert command("verify", str(folder), main={"verify": models.verify})[0] == 0
    damage_data(folder, flip)
    if is_large:
        load(folder)
    else:
        with pytest.raises(OSError, match="model/h1/mlp/c_fc/w has checksum"):
            load(folder)
        assert command("x", "--model_size", str(folder))[:2] == (1, "")
    status, out, _ = command("verify", str(folder), main={"verify": models.verify})
    assert (status, out.count("\n")) == (1, 1)
    assert utils.DATA in out
    assert "model/h1/mlp/c_fc/w has checksum" in out


def test_verify_lists_each_truncated_tensor(folder, command):
    damage_data(folder, lambda data: data[: len(data) // 2])
    status, out, _ = command("verify", str(folder), main={"verify": models.verify})
    cut = [e for e in checkpoint.read_index(folder / utils.INDEX).values() if e.offset + e.size > 456384 // 2]
    assert (status, out.count("\n")) == (1, len(cut))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_number_types_of_hugging_face_folders(tmp_path, dtype):
    ml_dtypes = oracle("ml_dtypes")
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(GOLDEN / "hf", tmp_path / "hf")
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    tensors = {name: array.astype(dtype) for name, array in load_file(folder / "model.safetensors").items()}
    save_file(
        {name.removeprefix("transformer."): array for name, array in tensors.items()}, folder / "model.safetensors"
    )
    wte = load(folder)[2]["wte"]
    assert wte.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert np.array_equal(wte, tensors["transformer.wte.weight"].astype(wte.dtype))


def test_verify_neither_asks_the_network_nor_writes(tmp_path, command, offline):
    folder = shutil.copytree(GOLDEN, tmp_path / "124M", ignore=shutil.ignore_patterns("golden*"))
    (folder / "encoder.json").unlink()
    status, out, _ = command("verify", str(folder), main={"verify": models.verify})
    assert (status, "encoder.json" in out, "fetch" in out) == (1, True, False)


@pytest.mark.parametrize("damage", ["cut", "missing", "gelu"])
def test_damaged_hugging_face_folders(tmp_path, damage, command):
    folder = shutil.copytree(GOLDEN / "hf", tmp_path / "hf")
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    else:
        edit_json(folder / "config.json", activation_function="gelu")
    if damage == "gelu":
        edit_json(folder / "config.json", n_embd=None)
        with pytest.raises(OSError, match="n_embd must be a whole number"):
            load(folder)
        edit_json(folder / "config.json", n_embd=48)
    with pytest.raises(OSError, match={"gelu": "activation_function is 'gelu'"}.get(damage, "model.safetensors")):
        load(folder)
    status, out, _ = command("verify", str(folder), main={"verify": models.verify})
    assert (status, out.count("\n")) == (1, 1)
