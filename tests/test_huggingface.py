"""Hugging Face folders: 40 kinds made by transformers (skipped where it is missing), and some made by hand."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from conftest import GOLDEN, random_params

import encoder
import gpt2
import utils
from tools import models
from weights import huggingface
from weights.params import flatten

SIZES = {"vocab_size": 512, "n_positions": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}
PROMPT = "Once upon a time"


def edit_json(path, edit):
    found = json.loads(path.read_text(encoding="utf-8"))
    edit(found)
    path.write_text(json.dumps(found), encoding="utf-8")


def edit_tensors(folder, edit):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def files_of(tokenizer, folder):
    """Writes a tokenizer as transformers did before its version 5 where no fast one was used."""
    tokenizer.backend_tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()


# ---- Made by transformers ----


def golden_tokenizer(**arguments):
    from transformers import GPT2Tokenizer

    return GPT2Tokenizer(str(GOLDEN / "encoder.json"), str(GOLDEN / "vocab.bpe"), **arguments)


def make(folder, kind="GPT2LMHeadModel", tokenizer=None, dtype="float32", shards=None, **config):
    """A folder with a random model, large enough numbers for the layers to matter, and the golden tokenizer. Returns
    (the model, the tokenizer)."""
    import torch
    import transformers

    torch.manual_seed(0)
    ends = {"bos_token_id": 511, "eos_token_id": 511}
    model = getattr(transformers, kind)(transformers.GPT2Config(**SIZES | ends | {"initializer_range": 0.3} | config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    tokenizer = tokenizer or golden_tokenizer()
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **{"max_shard_size": shards} if shards else {})
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def resized(folder, n_vocab, **tokenizer):
    model, tokenizer = make(folder, tokenizer=golden_tokenizer(**tokenizer))
    model.resize_token_embeddings(n_vocab)
    model.save_pretrained(folder)
    return tokenizer


def with_older_files(folder, **tokenizer):
    tokenizer = resized(folder, 520, **tokenizer)
    files_of(tokenizer, folder)
    added = {text: i for text, i in tokenizer.get_added_vocab().items() if i > 511}
    (folder / "added_tokens.json").write_text(json.dumps(added))


def edited(name, edit, **arguments):
    """A function that makes a folder and then changes one of its JSON files."""

    def change(folder):
        make(folder, **arguments)
        edit_json(folder / name, edit)

    return change


def with_tensors(edit, **arguments):
    def change(folder):
        make(folder, **arguments)
        edit_tensors(folder, edit)

    return change


def with_stranger(tensors):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1


def with_head_alone(tensors):
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")


def with_head(tensors):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()


def with_buffers(tensors):
    tensors["transformer.h.0.attn.bias"] = np.tri(32, dtype=bool)[None, None]
    tensors["transformer.h.0.attn.masked_bias"] = np.full((), -1e4, np.float32)


def as_pickle(folder):
    import torch

    model, _ = make(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_pointer(folder):
    make(folder)
    (folder / "model.safetensors").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548105171\n"
    )


def without(name, **arguments):
    def change(folder):
        make(folder, **arguments)
        (folder / name).unlink()

    return change


def a_shard_less(folder):
    make(folder, shards="20KB")
    next(folder.glob("model-00002-of-*")).unlink()


def with_two_end_ids(folder):
    make(folder)
    edit_json(folder / "generation_config.json", lambda c: c.update(eos_token_id=[511, 198]))


def with_another_tokenizer(folder):
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    make(folder)
    vocabulary = {"[UNK]": 0, "Once": 1, "##s": 2}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(kinds.WordPiece(vocabulary))).save_pretrained(folder)


def with_digits_apart(folder):
    """As smollm's: byte-level BPE that first splits each digit off."""
    make(folder)

    def edit(found):
        parts = [{"type": "Digits", "individual_digits": True}, found["pre_tokenizer"]]
        found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}

    edit_json(folder / "tokenizer.json", edit)


def with_an_ordinary_token(folder):
    model, tokenizer = make(folder)
    tokenizer.add_tokens(["upon"])
    model.resize_token_embeddings(513)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def as_strings(found):
    found["model"]["merges"] = [" ".join(pair) for pair in found["model"]["merges"]]


def at_550(found):
    for token in found["added_tokens"]:
        token["id"] = 550 if token["content"] == "[PAD]" else token["id"]
    found["model"]["vocab"].pop("[PAD]", None)


def with_a_gap(folder):
    resized(folder, 600, pad_token="[PAD]")
    edit_json(folder / "tokenizer.json", at_550)


LOADED = {
    "float32": make,
    "float16": lambda f: make(f, dtype="float16"),
    "bfloat16": lambda f: make(f, dtype="bfloat16"),
    "float64": lambda f: make(f, dtype="float64"),
    "sharded": lambda f: make(f, shards="20KB"),
    "sharded bfloat16": lambda f: make(f, shards="9KB", dtype="bfloat16"),
    "gelu_pytorch_tanh": lambda f: make(f, activation_function="gelu_pytorch_tanh"),
    "gelu_fast": lambda f: make(f, activation_function="gelu_fast"),
    "gelu_accurate": lambda f: make(f, activation_function="gelu_accurate"),
    "gelu_python_tanh": lambda f: make(f, activation_function="gelu_python_tanh"),
    "without a head": lambda f: make(f, kind="GPT2Model"),
    "the head alone": with_tensors(with_head_alone),
    "the head twice": with_tensors(with_head),
    "buffers": with_tensors(with_buffers),
    "padded to a round number": lambda f: resized(f, 640),
    "[PAD]": lambda f: resized(f, 513, pad_token="[PAD]"),
    "chat": lambda f: resized(f, 520, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]),
    "a special token in Chinese": lambda f: resized(f, 520, additional_special_tokens=["<|用户|>"]),
    "a gap in the ids": with_a_gap,
    "merges as strings": edited("tokenizer.json", as_strings),
    "vocab.json": lambda f: files_of(make(f)[1], f),
    "added_tokens.json": lambda f: with_older_files(f, pad_token="<|pad|>"),
    "no generation_config.json": without("generation_config.json"),
    "two end ids": with_two_end_ids,
    "no end id": lambda f: make(f, eos_token_id=None, bos_token_id=None),
    "an end id out of range": lambda f: make(f, eos_token_id=50256, bos_token_id=50256),
    "n_ctx": edited("config.json", lambda c: c.update(n_ctx=16)),
    "n_inner": lambda f: make(f, n_inner=64),
    "no dropout": lambda f: make(f, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "reorder_and_upcast_attn": lambda f: make(f, reorder_and_upcast_attn=True),
    "one layer of one head": lambda f: make(f, n_layer=1, n_head=1),
    "twelve layers": lambda f: make(f, n_layer=12),
}
REFUSED = {
    "gelu": (lambda f: make(f, activation_function="gelu"), "activation_function is 'gelu'"),
    "relu": (lambda f: make(f, activation_function="relu"), "activation_function is 'relu'"),
    "epsilon": (lambda f: make(f, layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
    "n_inner of 32": (lambda f: make(f, n_inner=32), "n_inner is 32, .* = 64"),
    "by layer": (lambda f: make(f, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    "unscaled": (lambda f: make(f, scale_attn_weights=False), "scale_attn_weights is False"),
    "crossed": (lambda f: make(f, add_cross_attention=True), "add_cross_attention is True"),
    "untied": (lambda f: make(f, tie_word_embeddings=False), "tie_word_embeddings is False"),
    "another head": (with_tensors(with_stranger), "lm_head.weight differs from wte.weight"),
    "a classifier": (lambda f: make(f, "GPT2ForSequenceClassification", pad_token_id=0), "score.weight has no place"),
    "a pickle": (as_pickle, r"pytorch_model.bin cannot be read here.*AutoModelForCausalLM.from_pretrained\('"),
    "git-lfs": (as_pointer, "a pointer of git-lfs, not the file itself: run `git lfs pull`"),
    "a shard less": (a_shard_less, "model-00002-of-.*No such file"),
    "no weights": (without("model.safetensors"), "model.safetensors: No such file"),
    "no tokenizer": (without("tokenizer.json"), "vocab.bpe: No such file"),
    "a space before": (lambda f: make(f, tokenizer=golden_tokenizer(add_prefix_space=True)), "add_prefix_space is"),
    "a token before": (lambda f: make(f, tokenizer=golden_tokenizer(add_bos_token=True)), "adds tokens to each text"),
    "WordPiece": (with_another_tokenizer, "tokenizer.json: .* no other kind of tokenizer is supported; choose"),
    "digits apart": (with_digits_apart, "pre_tokenizer.type is 'Sequence', GPT-2's is 'ByteLevel'"),
    "lower case": (edited("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})), "normalizer is"),
    "another token": (with_an_ordinary_token, "the added token 'upon' is no special token"),
    "too many tokens": (edited("config.json", lambda c: c.update(vocab_size=511)), "ids up to 511, n_vocab is 511"),
    "another model": (edited("config.json", lambda c: c.update(model_type="gpt_neo")), "model_type is 'gpt_neo'"),
    "int8": (edited("config.json", lambda c: c.update(quantization_config={"bits": 8})), "quantization_config is"),
}


@pytest.fixture
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    pytest.importorskip("torch")
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def greedy(model, tokenizer, ids, unused):
    """What transformers generates, without the id that ends it."""
    import torch

    masked = {"suppress_tokens": [*unused]} if unused else {}
    new = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False, **masked
    )[0, len(ids) :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return new[:-1] if new[-1] in ends else new


@pytest.mark.parametrize("kind", LOADED)
def test_the_same_logits_and_greedy_ids_as_transformers(transformers, tmp_path, kind, command):
    import torch

    LOADED[kind](tmp_path)
    ours, hparams, params = utils.load_encoder_hparams_and_params(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    dtype = torch.float64 if kind == "float64" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ids = ours.encode(PROMPT)
    assert theirs(PROMPT).input_ids == ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    logits = gpt2.gpt2(ids, **params, n_head=hparams["n_head"])
    assert np.abs(logits - expected).max() < 2e-5 * max(1, np.abs(expected).max())
    arguments = [PROMPT, "--model_size", str(tmp_path), "--n_tokens_to_generate", "12", "--json"]
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    unused = utils.ids_without_token(ours, hparams["n_vocab"])
    assert json.loads(out)["token_ids"] == greedy(model, theirs, ids, unused)
    assert command(str(tmp_path), main=models.verify)[0] == 0


@pytest.mark.parametrize("kind", REFUSED)
def test_one_line_with_the_reason(transformers, tmp_path, kind, command, capsys):
    make_folder, reason = REFUSED[kind]
    make_folder(tmp_path)
    capsys.readouterr()
    status, out, err = command(PROMPT, "--model_size", str(tmp_path))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert re.search(reason, err), err
    assert command(str(tmp_path), main=models.verify)[0] == 1


def test_there_are_thirty_kinds_and_more():
    assert min(len(LOADED), len(LOADED) + len(REFUSED)) >= 30


# ---- Made by hand, so that this much is tested without transformers ----


def newer(folder, **edits):
    """The golden Hugging Face folder with a tokenizer.json in place of vocab.json and merges.txt."""
    shutil.copytree(GOLDEN / "hf", folder)
    write_tokenizer_json(folder, **edits)
    return folder


def write_tokenizer_json(folder, **edits):
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    found = {
        "added_tokens": [{"id": 511, "content": encoder.END_OF_TEXT, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": ids, "merges": [line.split(" ") for line in lines]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(found | edits), encoding="utf-8")
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def split_into_shards(folder):
    """model.safetensors -> three files and an index."""
    from safetensors.numpy import load_file, save_file

    tensors, places = load_file(folder / "model.safetensors"), {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        part = {name: array for n, (name, array) in enumerate(tensors.items()) if n % 3 == i}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def load(folder):
    return utils.load_encoder_hparams_and_params(str(folder))


def test_tokenizer_json_and_shards_load_the_same(tmp_path, golden):
    folder = newer(tmp_path / "hf")
    split_into_shards(folder)
    ours, hparams, params = load(folder)
    assert (ours.ids, ours.ranks, hparams) == (golden["encoder"].ids, golden["encoder"].ranks, golden["hparams"])
    for name, array in flatten(params).items():
        assert np.array_equal(array, flatten(golden["params"])[name]), name


def test_the_numbers_are_mapped_and_the_file_stays_as_it_is(tmp_path):
    folder = newer(tmp_path / "hf")
    before = (folder / "model.safetensors").read_bytes()
    params = load(folder)[2]
    for array in flatten(params).values():
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert type(base.base).__name__ == "mmap"
        array[...] = 7
    assert (folder / "model.safetensors").read_bytes() == before


def test_numbers_at_an_odd_place_are_copied(tmp_path, golden):
    """safetensors pads its header to a multiple of eight; others need not."""
    folder = newer(tmp_path / "hf")
    data = (folder / "model.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + n].rstrip()
    header += b" " * (1 + -len(header) % 4)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + n :])
    for name, array in flatten(load(folder)[2]).items():
        assert array.flags.aligned
        assert np.array_equal(array, flatten(golden["params"])[name]), name


def damage_places(edit):
    def change(folder):
        split_into_shards(folder)
        edit_json(folder / "model.safetensors.index.json", lambda found: edit(found["weight_map"]))

    return change


def damage_header(edit):
    """The same tensors behind another header, of the same length."""

    def change(folder):
        data = (folder / "model.safetensors").read_bytes()
        n = int.from_bytes(data[:8], "little")
        header = edit(json.loads(data[8 : 8 + n]))
        header = (header if isinstance(header, bytes) else json.dumps(header).encode()).ljust(n)
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + n :])

    return change


def twice(header):
    return {"wte.weight": header["transformer.wte.weight"], **header}


def other_type(header):
    header["transformer.ln_f.bias"] |= {"dtype": "I32"}
    return header


def with_config(**values):
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


def with_edited_tensors(edit):
    return lambda folder: edit_tensors(folder, edit)


SAME = {  # changes that leave the model the same
    "the head alone": with_edited_tensors(with_head_alone),
    "the head twice": with_edited_tensors(with_head),
    "the mask": with_edited_tensors(with_buffers),
    "n_ctx": with_config(n_ctx=16),
    "n_inner": with_config(n_inner=192),
    "gelu_pytorch_tanh": with_config(activation_function="gelu_pytorch_tanh"),
    "gelu_fast": with_config(activation_function="gelu_fast"),
    "merges as strings": lambda folder: edit_json(folder / "tokenizer.json", as_strings),
}


@pytest.mark.parametrize("kind", SAME)
def test_changes_that_leave_the_model_the_same(tmp_path, kind, golden):
    SAME[kind](newer(tmp_path / "hf"))
    ours, hparams, params = load(tmp_path / "hf")
    assert (ours.ranks, hparams) == (golden["encoder"].ranks, golden["hparams"])
    for name, array in flatten(params).items():
        assert np.array_equal(array, flatten(golden["params"])[name]), name


WTE = "transformer.wte.weight"
DAMAGES = {
    "a path out of the folder": (damage_places(lambda p: p.update({WTE: "../x"})), "weight_map must say"),
    "a number for a file": (damage_places(lambda p: p.update({WTE: 5})), "weight_map must say"),
    "the wrong shard": (
        damage_places(lambda p: p.update({WTE: "model-00002-of-00003.safetensors"})),
        "wte.* is missing",
    ),
    "a place less": (damage_places(lambda p: p.pop(WTE)), "wte.weight is missing"),
    "no places": (
        lambda f: (split_into_shards(f), (f / "model.safetensors.index.json").write_text("{}")),
        "weight_map",
    ),
    "a header of nothing": (damage_header(lambda header: b"{"), "no safetensors file, or a damaged one"),
    "a header of lists": (damage_header(lambda header: b"[]"), "no safetensors file, or a damaged one"),
    "overlapping": (damage_header(twice), "no safetensors file, or a damaged one"),
    "integers": (damage_header(other_type), r"ln_f.bias \(I32\) is of a number type"),
    "a huge header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 5 + b"\0" * 900),
        "no safetensors file",
    ),
    "another head": (with_edited_tensors(with_stranger), "lm_head.weight differs from wte.weight"),
    "gelu with erf": (with_config(activation_function="gelu"), "activation_function is 'gelu', GPT-2's is 'gelu_new'"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"AutoModelForCausalLM.from_pretrained",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "HDF5": (lambda f: (f / "model.safetensors").rename(f / "tf_model.h5"), "tf_model.h5 cannot be read here"),
    "no config value": (lambda f: edit_json(f / "config.json", lambda c: c.pop("n_positions")), "n_positions must be"),
    "tokens before": (
        lambda f: edit_json(
            f / "tokenizer.json",
            lambda t: t.update(post_processor={"type": "Sequence", "processors": [{"type": "RobertaProcessing"}]}),
        ),
        "post_processor adds tokens",
    ),
    "no vocabulary": (lambda f: edit_json(f / "tokenizer.json", lambda t: t["model"].pop("vocab")), "no tokenizer, or"),
    "numbers for merges": (
        lambda f: edit_json(f / "tokenizer.json", lambda t: t["model"]["merges"].append(5)),
        "tokeni",
    ),
    "a merge of three": (
        lambda f: edit_json(f / "tokenizer.json", lambda t: t["model"]["merges"].append("a b c")),
        "the merge .* is not two symbols",
    ),
    "an added number": (
        lambda f: edit_json(f / "tokenizer.json", lambda t: t["added_tokens"].append(5)),
        "no tokenizer",
    ),
    "an added list": (
        lambda f: edit_json(f / "tokenizer.json", lambda t: t["added_tokens"][0].update(content=5)),
        "no tokenizer",
    ),
    "fewer merges": (
        lambda f: edit_json(f / "tokenizer.json", lambda t: t["model"]["merges"].pop()),
        "tokenizer.json: no merge leads to",
    ),
    "a prefix elsewhere": (
        lambda f: (f / "tokenizer_config.json").write_text('{"add_prefix_space": true}'),
        "tokenizer_config.json: add_prefix_space is on",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_one_line(tmp_path, kind, command):
    damage, reason = DAMAGES[kind]
    damage(newer(tmp_path / "hf"))
    status, out, err = command(PROMPT, "--model_size", str(tmp_path / "hf"))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert re.search(reason, err), err
    assert command(str(tmp_path / "hf"), main=models.verify)[0] == 1


@pytest.mark.parametrize("spelling", ["list", "number", "none"])
def test_end_ids_of_generation_config(tmp_path, spelling):
    folder = newer(tmp_path / "hf")
    eos = {"list": [5, 6], "number": 5, "none": None}[spelling]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    ours, hparams, _ = load(folder)
    expected = {"list": ((5, 6), True), "number": ((5,), True), "none": ((511,), False)}[spelling]
    assert utils.read_ending(folder, ours, hparams) == expected


@pytest.mark.parametrize(("name", "size"), [*zip(utils.HF_NAMES, utils.SIZES, strict=True)])
def test_the_names_of_hugging_face_mean_the_same_models(tmp_path, name, size):
    (tmp_path / size).mkdir()
    assert utils.model_folder(name, tmp_path) == utils.model_folder(size, tmp_path) == tmp_path / size
    assert next(iter(utils.HF_NAMES.items())) == ("gpt2", "124M")


def test_converting_a_folder_with_tokenizer_json_and_back(tmp_path, command):
    added = [
        {"id": 511, "content": encoder.END_OF_TEXT, "special": True},
        {"id": 513, "content": "<|日|>", "special": True},
    ]
    folder = newer(tmp_path / "hf", added_tokens=added)
    edit_json(folder / "config.json", lambda c: c.update(vocab_size=600))
    sizes = {"n_vocab": 600, "n_ctx": 96, "n_embd": 48, "n_head": 4, "n_layer": 3} | load_sizes(GOLDEN / "hf")
    params = random_params(**sizes | {"n_vocab": 600})
    huggingface.write_tensors(folder / "model.safetensors", huggingface.hf_tensors(sizes, params))
    expected = load(folder)
    for source, layout in (("hf", "tf"), ("tf", "hf2")):
        assert (
            command(str(tmp_path / source), str(tmp_path / layout), "--layout", layout[:2], main=models.convert)[0] == 0
        )
        ours, hparams, params = load(tmp_path / layout)
        assert (ours.ids, ours.ranks, hparams) == (expected[0].ids, expected[0].ranks, expected[1])
        assert np.array_equal(params["wte"], expected[2]["wte"])
    assert expected[0].decode([513]) == "<|日|>"


def load_sizes(folder):
    return {name: n for name, n in huggingface.read_hparams(folder / "config.json").items() if name != "n_vocab"}
