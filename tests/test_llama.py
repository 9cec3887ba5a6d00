"""LLaMA: the golden models, each part against loops written from its paper, folders good and bad, training."""

import json
import math
import re

import numpy as np
import pytest
from conftest import (
    GOLDEN,
    LLAMAS,
    STORIES,
    Subject,
    llama_config,
    oracle,
    random_llama,
)  # fmt: skip

import backends
import gpt2
import utils
from encoder import get_encoder
from inference import batching
from inference.generate import Sequence
from inference.model import greedy, load
from tools import diff, inspect_params, models
from training import data, evaluate, train
from training.model import HPARAMS, forward_of, n_params
from variants import llama
from weights.params import cast, flatten

jax = oracle("jax")
BOTH = pytest.mark.parametrize("backend", backends.NAMES)


@pytest.fixture
def exact():
    """JAX with 64 bits."""
    with jax.enable_x64(True):
        yield


# ---- The golden models ----


@pytest.fixture(scope="module", params=["tied_gqa", "untied_mha", "llama3_rope"])
def folder(request):
    return LLAMAS / request.param


def cases_of(folder):
    return json.loads((folder / "golden.json").read_text(encoding="utf-8"))["cases"]


@BOTH
@pytest.mark.parametrize(("dtype", "file", "limit"), [("float32", "golden", 2e-5), ("float64", "float64", 1e-12)])
def test_golden_logits(folder, backend, dtype, file, limit, exact):
    """golden.npz has RMSNorm and the angles computed in float32, float64.npz has not: see the README there."""
    tokenizer, config, params = llama.load(folder, dtype)
    assert tokenizer is None
    arrays, params = np.load(folder / f"{file}.npz"), backends.get(backend).asarray(params)
    for i, case in enumerate(cases_of(folder)):
        logits = llama.llama(np.array(case["ids"]), **params, config=config)
        assert logits.dtype == dtype
        assert np.abs(np.asarray(logits) - arrays[f"logits_{i}"]).max() <= limit


@BOTH
def test_golden_continuations_cached_uncached_and_batched(folder, backend):
    _, config, params = llama.load(folder)
    subject, words = Subject(config, params), get_encoder(GOLDEN.name, GOLDEN.parent)
    model, cases = subject.model(backend), cases_of(folder)
    for case in cases:
        assert list(greedy(model, case["ids"], 16)) == subject.greedy(case["ids"], 16) == case["greedy_16"]
    rows = [Sequence(words, case["ids"], 16) for case in cases]
    batching.generate_batch(model, rows)
    assert [row.new_ids for row in rows] == [case["greedy_16"] for case in cases]


# ---- Each part against its paper ----


def test_functions_of_a_vector_are_those_of_the_papers():
    rng = np.random.default_rng(0)
    x, g, w1, w2, w3 = (rng.normal(size=shape) for shape in ((3, 4), (4,), (4, 5), (4, 5), (5, 4)))
    for row, normed in zip(x, llama.rms_norm(x, g, 1e-3), strict=True):
        size = math.sqrt(sum(v * v for v in row) / 4 + 1e-3)
        assert normed == pytest.approx([v / size * gain for v, gain in zip(row, g, strict=True)], rel=1e-14)
    silu = [v / (1 + math.exp(-v)) for v in (x @ w1).ravel()]
    assert llama.silu((x @ w1).ravel()) == pytest.approx(silu, rel=1e-13)
    expected = (np.reshape(silu, (3, 5)) * (x @ w2)) @ w3
    assert np.allclose(llama.swiglu(x, {"w": w1}, {"w": w2}, {"w": w3}), expected, rtol=1e-13)


def test_silu_overflows_nowhere():
    with np.errstate(all="raise"):
        assert llama.silu(np.float32([-1e30, -100, 0, 100, 1e30])).tolist() == [0, 0, 0, 100, np.float32(1e30)]


def turned(x, position, config):
    return llama.rotary(x, *llama.rotations(np.array([position]), 1000, config, x.dtype))


def test_rotary_is_a_rotation_of_each_pair():
    """By position * base^(-2i/d) for pair i: Su et al., equation 34, where pairs are (i, i + d/2) as in LLaMA."""
    config, x = llama_config(d_head=6, rope_base=50.0), np.random.default_rng(0).normal(size=(1, 6))
    (y,) = turned(x, 7, config)
    for i in range(3):
        expected = complex(x[0, i], x[0, i + 3]) * np.exp(1j * 7 * 50.0 ** (-2 * i / 6))
        assert complex(y[i], y[i + 3]) == pytest.approx(expected, rel=1e-13)
    assert np.array_equal(turned(x, 0, config), x), "position 0 turns nothing"


@pytest.mark.parametrize("offset", [1, 2, 17, 100, 800])
def test_scores_depend_on_distance_only(offset):
    rng, config = np.random.default_rng(1), llama_config(d_head=8, rope_base=10000.0)
    q, k = rng.normal(size=(2, 1, 8))
    scores = [(turned(q, p, config) @ turned(k, p + offset, config).T).item() for p in (0, 1, 50, 199)]
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-12)
    assert abs(scores[0] - (q @ k.T).item()) > 1e-3


def test_llama3_scaling_has_three_parts():
    """As Meta's code has it: by the wavelength, in positions, of each pair."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "n_ctx_original": 64}
    plain = llama.frequencies(llama_config(d_head=32, rope_base=1000.0))
    found, kinds = llama.frequencies(llama_config(d_head=32, rope_base=1000.0, rope_scaling=scaling)), set()
    for before, after in zip(plain, found, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 64 / 4:
            kinds, expected = kinds | {"kept"}, before
        elif wavelength > 64 / 1:
            kinds, expected = kinds | {"divided"}, before / 8
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            kinds, expected = kinds | {"between"}, (1 - smooth) * before / 8 + smooth * before
        assert after == pytest.approx(expected, rel=1e-14)
    assert kinds == {"kept", "divided", "between"}


@BOTH
def test_grouped_queries_with_equal_heads_are_multi_head_attention(backend, exact):
    rng = np.random.default_rng(0)
    q, k, v = backends.get(backend).asarray(tuple(rng.normal(size=(3, 6, 70, 4))))
    mask = np.tri(70, dtype=bool)
    assert np.allclose(llama.grouped_attention(q, k, v, mask), gpt2.attention(q, k, v, mask), atol=1e-13)
    shared = llama.grouped_attention(q, k[:2], v[:2], mask)  # heads 0 to 2 share the first, 3 to 5 the second
    k, v = (backends.np.concatenate([part[:1]] * 3 + [part[1:2]] * 3) for part in (k, v))
    assert np.allclose(shared, gpt2.attention(q, k, v, mask), atol=1e-13)


# ---- The transforms of both backends ----


def test_gradients_and_batches_agree_between_backends(exact):
    """value_and_grad of a mean over vmap, in float64, by NumPy's own rules and by JAX."""
    config = llama_config(tied=False)
    params, found = cast(random_llama(config), "float64"), []
    rows = np.random.default_rng(1).integers(0, config["n_vocab"], (3, 6))
    for name in backends.NAMES:
        library = backends.get(name)

        def loss(params, library=library):
            logits = library.vmap(forward_of(config), in_axes=(None, 0))(params, rows)
            return (logits * logits).mean()

        found.append(library.to_numpy(library.value_and_grad(loss)(library.asarray(params))))
    (a, grad_a), (b, grad_b) = found
    assert a == pytest.approx(b, rel=1e-12)
    assert a == pytest.approx(np.mean([llama.llama(row, **params, config=config) ** 2 for row in rows]), rel=1e-12)
    for path, leaf in flatten(grad_a).items():
        assert np.abs(leaf).max() > 0, path
        assert np.allclose(leaf, flatten(grad_b)[path], rtol=1e-10, atol=1e-12), path


@BOTH
def test_bfloat16_stays_bfloat16(backend):
    oracle("ml_dtypes")
    config = llama_config()
    params = backends.get(backend).asarray(cast(random_llama(config), "bfloat16"))
    cache = llama.init_cache(params, 8, config=config)
    logits, cache = llama.forward(params, [1, 2, 3], cache, 0, config=config)
    assert {array.dtype.name for array in (logits, *cache[0])} == {"bfloat16"}
    exact = llama.llama([1, 2, 3], **random_llama(config), config=config)
    assert np.abs(np.asarray(logits, np.float32) - exact).max() < 0.1 * np.abs(exact).max()


def test_a_long_text_needs_no_square_of_scores():
    """8,192 positions: all scores of one head at once would be 8,192² numbers, 268 MB."""
    import tracemalloc

    config = llama_config(n_ctx=8192, n_layer=1, n_head=2, n_head_kv=1)
    params = random_llama(config)
    tracemalloc.start()
    llama.llama(np.arange(8192) % 11, **params, config=config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6  # 67 MB of it are the causal mask


# ---- Folders ----

SIZES = {"n_vocab": 512, "n_ctx": 32, "n_embd": 12, "n_head": 4, "n_head_kv": 2, "d_head": 4, "n_ffn": 20}


@pytest.fixture
def saved(tmp_path):
    """Makes a folder in Hugging Face's layout: (its path, config, params)."""

    def make(name="model", **others):
        config = llama_config(**SIZES | others)
        params, path = random_llama(config), tmp_path / name
        path.mkdir()
        utils.save_tokenizer(GOLDEN, path, ["hf"])
        utils.save_model(path, config, params, ending=utils.Ending((511,), True))
        return path, config, params

    return make


SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0, "n_ctx_original": 16}


@pytest.mark.parametrize("others", [{}, {"tied": False}, {"rope_scaling": SCALING}], ids=str)
def test_what_is_saved_is_what_is_loaded(saved, others):
    path, config, params = saved(**others)
    assert sorted(p.name for p in path.iterdir() if "json" not in p.name) == ["merges.txt", "model.safetensors"]
    encoder, found, loaded = llama.load(path)
    assert (found, encoder.end_of_text) == (config, 511)
    leaves, expected = flatten(loaded), flatten(params)
    assert leaves.keys() == expected.keys()
    assert all(np.array_equal(leaves[name], expected[name]) for name in expected)
    assert list(models.problems(path, {})) == []


def edit_config(path, edit):
    found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    edit(found)
    (path / "config.json").write_text(json.dumps(found), encoding="utf-8")


def shard(path, dtype="F32", lose=False):
    """Splits model.safetensors into two files with an index, its numbers in another dtype; may lose one file."""
    import ml_dtypes
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    types = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    tensors, places = {name: array.astype(types[dtype]) for name, array in tensors.items()}, {}
    for i in range(2):
        file = f"model-{i}.safetensors"
        part = {name: tensors[name] for name in [*tensors][i::2]}
        safetensors.numpy.save_file(part, path / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    (path / "model.safetensors").unlink()
    if lose:
        (path / "model-1.safetensors").unlink()
    return {name: array.astype(np.float32) for name, array in tensors.items()}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_shards_and_narrow_numbers(saved, dtype):
    oracle("ml_dtypes")
    path, _, _ = saved()
    tensors = shard(path, dtype)
    _, _, params = llama.load(path)
    assert np.array_equal(params["wte"], tensors["model.embed_tokens.weight"])
    w = params["blocks"][1]["attn"]["c_k"]["w"]
    assert np.array_equal(w, tensors["model.layers.1.self_attn.k_proj.weight"].T)
    assert w.flags.f_contiguous, "a view, no copy"
    assert {leaf.dtype.name for leaf in flatten(params).values()} == {"float32"}


def newer(config):
    """The form of transformers 5."""
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    del config["rope_scaling"]


def least(config):
    """What old folders leave out."""
    for name in ("rope_parameters", "attention_bias", "mlp_bias", "hidden_act"):
        del config[name]
    config["head_dim"] = None


def test_older_and_newer_configs_are_read(saved):
    path, config, _ = saved(n_embd=16)
    for edit in (newer, least):
        edit_config(path, edit)
        assert utils.read_hparams(path) == config if edit is newer else config | {"rope_base": 10000.0}


def grouped(**others):
    return lambda path: edit_config(path, lambda config: config.update(others))


REFUSED = {
    "another architecture": (grouped(model_type="mistral"), "model_type is 'mistral', which is not supported: gpt2"),
    "a missing shard": (lambda path: shard(path, lose=True), "model-1.safetensors"),
    "heads": (grouped(num_key_value_heads=3), "4 query heads cannot share 3 key/value heads evenly"),
    "odd heads": (grouped(head_dim=3), "heads of 3 numbers"),
    "no head size": (grouped(head_dim=None, num_attention_heads=5), "hidden_size 12 cannot be shared among"),
    "biases": (grouped(attention_bias=True), "attention_bias is True, LLaMA's is False"),
    "more biases": (grouped(mlp_bias=True), "mlp_bias is True"),
    "a window": (grouped(sliding_window=128), "sliding_window is 128"),
    "another nonlinearity": (grouped(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "quantized": (grouped(quantization_config={"bits": 4}), "quantization_config is"),
    "yarn": (grouped(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "type 'yarn' are not computed here"),
    "half": (grouped(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "half, newer": (grouped(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
    "no number": (grouped(rms_norm_eps="1e-5"), "rms_norm_eps must be a number above 0, not '1e-5'"),
    "no base": (grouped(rope_theta=-1), "rope_theta must be a number above 0, not -1"),
    "no factor": (grouped(rope_scaling={"rope_type": "llama3"}), "factor must be a number above 0, not None"),
    "no object": (grouped(rope_scaling=[8]), "rope_scaling must be an object"),
    "no size": (grouped(intermediate_size=None), "intermediate_size must be a whole number"),
    "more layers": (grouped(num_hidden_layers=3), "layers.2.input_layernorm.weight is missing"),
    "untied": (grouped(tie_word_embeddings=False), "lm_head.weight is missing"),
    "another width": (
        grouped(intermediate_size=24),
        r"gate_proj.weight is \[20, 12\], by the hyperparameters \[24, 12\]",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors: No such file"),
    "no tokenizer": (lambda path: (path / "vocab.json").unlink(), "No such file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_computed_is_refused_in_one_line(saved, command, kind):
    damage, message = REFUSED[kind]
    path, _, _ = saved()
    damage(path)
    status, out, err = command("a", "--model_size", str(path))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert re.search(message, err), err


def test_a_prompt_beyond_the_context(saved, command):
    path, _, _ = saved()
    status, _, err = command("a b c d e", "--model_size", str(path), "--n_tokens_to_generate", "40")
    assert (status, err.count("\n")) == (2, 1)
    assert "n_ctx 32" in err


def test_load_of_another_architecture():
    with pytest.raises(ValueError, match="is no LLaMA but a gpt2"):
        llama.load("3M")


def test_transformers_computes_the_same_from_what_is_saved(saved):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for i, others in enumerate([{}, {"tied": False, "rope_scaling": SCALING}]):
        path, config, params = saved(f"model{i}", n_ctx=128, **others)
        theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(path).eval(), [*range(3, 100)]
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        logits = llama.llama(ids, **params, config=config)
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


# ---- The same front door and the same tools ----


@BOTH
def test_the_front_door(saved, command, backend):
    path, config, params = saved()
    expected = Subject(config, params).greedy(load(str(path))[0].encode("Once upon"), 5)
    arguments = ("Once upon", "--n_tokens_to_generate", "5", "--backend", backend, "--stop_at_eos", "false", "--json")
    status, out, _ = command(*arguments, "--model_size", str(path))
    assert (status, json.loads(out)["token_ids"]) == (0, expected)


def test_the_tools_take_a_llama(saved, command, tmp_path):
    path, _, params = saved()
    status, out, _ = command("Once", "--model_size", str(path), main=diff.main)
    assert status == 0
    assert "blocks[1].gqa.grouped_attention.causal_attention.attention.softmax" in out
    assert "blocks[0].swiglu.project(c_gate)" in out
    status, out, _ = command("--model_size", str(path), main=inspect_params.main)
    assert f"{sum(leaf.size for leaf in flatten(params).values()):,}" in out
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat.", encoding="utf-8")
    status, out, _ = command(str(path), str(text), main=evaluate.main)
    assert (status, "perplexity" in out) == (0, True)
    status, _, err = command(str(path), str(tmp_path / "tf"), "--layout", "tf", main=models.convert)
    assert (status, "OpenAI's layout holds a gpt2 alone" in err) == (2, True)
    assert command(str(path), str(tmp_path / "hf"), "--layout", "hf", main=models.convert)[0] == 0
    assert np.array_equal(llama.load(tmp_path / "hf")[2]["wte"], params["wte"])


# ---- Training ----


def test_a_llama_of_the_same_size_has_as_many_parameters():
    sizes = {"n_vocab": 2048, "n_ctx": 256, "n_embd": 192, "n_head": 6, "n_layer": 6}
    for n_head_kv in (None, 2):
        config = HPARAMS["llama"](**sizes, n_head_kv=n_head_kv)
        assert n_params(config) == pytest.approx(n_params(HPARAMS["gpt2"](**sizes)), rel=0.01)
    assert HPARAMS["llama"](**sizes)["n_ffn"] == 528  # 8/3 * 192 is 512


TINY = "--n_layer 1 --n_head 2 --n_embd 16 --n_ctx 16 --batch_size 4 --warmup 2 --eval_every 3 --learning_rate 0.01"
TINY = [*TINY.split(), "--architecture", "llama", "--n_head_kv", "1"]


@BOTH
def test_training_saves_a_llama_and_goes_on(tmp_path, command, backend):
    data.main(str(STORIES), out=str(tmp_path / "data"), encoder=str(GOLDEN))
    flags = [str(tmp_path / "data"), *TINY, "--backend", backend]
    for name, runs in (("whole", [6]), ("parts", [3, 6])):
        for n_steps in runs:
            more = ["--out", str(tmp_path / name), "--n_steps", str(n_steps), *["--resume"] * (n_steps > runs[0])]
            assert command(*flags, *more, main=train.main)[0] == 0
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["validation"] for line in lines if "validation" in line]
    assert losses[-1] < losses[0]
    assert not (tmp_path / "whole" / "hparams.json").exists()
    status, out, _ = command("Once", "--model_size", str(tmp_path / "whole"), "--n_tokens_to_generate", "3")
    assert (status, len(out) > 1) == (0, True)
    _, config, params = llama.load(tmp_path / "whole")
    assert config["n_head_kv"] == 1
    assert flatten(params).keys() == flatten(llama.load(tmp_path / "parts")[2]).keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--architecture", "mamba"], "--architecture 'mamba': choose gpt2 or llama"),
        (["--architecture", "llama", "--n_embd", "18"], "--n_embd 18 / --n_head 6 is odd"),
        (["--architecture", "llama", "--n_head_kv", "4"], "--n_head_kv 4 does not divide --n_head 6"),
        (["--n_head_kv", "2"], "--n_head_kv is for --architecture llama"),
        (["--architecture", "llama", "--init_from", "3M"], "--architecture has no effect: --init_from decides"),
    ],
)
def test_flags_of_training(command, flags, message):
    status, _, err = command("data", *flags, main=train.main)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
