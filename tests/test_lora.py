"""LoRA and adapters: against products of matrices, peft, and each sequence alone."""

import json

import numpy as np
import pytest
from conftest import GOLDEN, cast, model_of, oracle, random_params

import backends
import gpt2
import utils
from inference import batching
from inference.generate import Sequence, generate
from training import lora, optimizer
from training import step as steps
from training.model import forward_of
from variants import llama
from weights import peft
from weights.params import from_names, llama_shapes, named_leaves, unflatten

SIZES = {"n_vocab": 31, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}
CONFIG = {"n_vocab": 31, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_head_kv": 1, "d_head": 4, "n_layer": 2, "n_ffn": 24,
          "eps": 1e-5, "rope_base": 10000.0, "rope_scaling": None, "tied": True}  # fmt: skip
IDS = np.array([3, 1, 4, 1, 5, 9, 2])


def llama_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = llama_shapes(CONFIG).items()
    return unflatten({path: rng.normal(scale=0.3, size=shape).astype(np.float32) for path, shape in shapes})


PARAMS = {"gpt2": random_params(**SIZES), "llama": llama_params()}
HPARAMS = {"gpt2": SIZES, "llama": CONFIG}


def logits(name, params, ids=IDS):
    if name == "llama":
        return llama.llama(ids, **params, config=CONFIG)
    return gpt2.gpt2(ids, **params, n_head=2)


def trained(params, seed=1, size=0.1):
    """params with random numbers in all leaves of LoRA and of adapters, as after training."""
    rng, leaves = np.random.default_rng(seed), named_leaves(params)
    new = {k: rng.normal(scale=size, size=x.shape).astype(x.dtype) for k, x in leaves.items() if is_new(k)}
    return from_names(leaves | new)


def is_new(name):
    return "lora_" in name or ".adapter." in name


@pytest.fixture(params=PARAMS)
def name(request):
    return request.param


@pytest.mark.parametrize("backend", backends.NAMES)
def test_at_the_start_the_model_is_bit_equal_to_its_base(name, backend):
    library = backends.get(backend)
    run = library.jit(lambda params: logits(name, lora.apply(params, 2.0)))
    base = library.to_numpy(run(library.asarray(PARAMS[name])))
    for changed in (lora.add_lora(PARAMS[name], "c_", 3, 0), lora.add_adapters(PARAMS[name], 4, 0)):
        assert sum(map(is_new, named_leaves(changed))) >= 8
        np.testing.assert_array_equal(library.to_numpy(run(library.asarray(changed))), base)


def test_merged_equals_unmerged_and_a_sum_of_products(name):
    params = trained(lora.add_lora(PARAMS[name], "attn", 3, 0))
    merged, leaves = lora.merge(params, 1.5), named_leaves(params)
    assert named_leaves(merged).keys() == named_leaves(PARAMS[name]).keys()
    for layer, w in named_leaves(PARAMS[name]).items():
        a, b = (leaves.get(f"{layer[:-1]}lora_{part}") for part in "ab")
        expected = w if a is None or not layer.endswith(".w") else w + 1.5 * a @ b
        np.testing.assert_allclose(named_leaves(merged)[layer], expected, atol=1e-6)
    different = np.abs(logits(name, merged) - logits(name, PARAMS[name])).max()
    assert different > 1e-2
    assert np.abs(logits(name, lora.apply(params, 1.5)) - logits(name, merged)).max() <= 1e-5


def test_an_adapter_is_what_houlsby_draw():
    """After attention and after the feed-forward network, before the addition: y + up(gelu(down(y)))."""
    params = trained(lora.add_adapters(PARAMS["gpt2"], 4, 0))

    def adapted(y, parts):
        hidden = gpt2.gelu(y @ parts["down"]["w"] + parts["down"]["b"])
        return y + hidden @ parts["up"]["w"] + parts["up"]["b"]

    x = gpt2.embed(IDS, params["wte"], params["wpe"])
    for block in params["blocks"]:
        attn, mlp = ({k: {**v} for k, v in block[part].items()} for part in ("attn", "mlp"))
        # The adapter's input is the product before the bias is added: lora.py says why that makes no difference.
        first, second = attn["c_proj"].pop("adapter"), mlp["c_proj"].pop("adapter")
        biases = [layer["c_proj"].pop("b") for layer in (attn, mlp)]
        attn["c_proj"]["b"] = mlp["c_proj"]["b"] = np.zeros(8, np.float32)
        x = x + adapted(gpt2.mha(gpt2.layer_norm(x, **block["ln_1"]), **attn, n_head=2), first) + biases[0]
        x = x + adapted(gpt2.ffn(gpt2.layer_norm(x, **block["ln_2"]), **mlp), second) + biases[1]
    expected = gpt2.unembed(gpt2.layer_norm(x, **params["ln_f"]), params["wte"])
    np.testing.assert_allclose(logits("gpt2", lora.apply(params)), expected, atol=1e-4)


@pytest.mark.parametrize("pattern", ["nothing", "("])
def test_a_pattern_that_chooses_nothing_is_refused(pattern):
    with pytest.raises(ValueError, match=r"attn\.c_attn, attn\.c_proj|no regular expression"):
        lora.add_lora(PARAMS["gpt2"], pattern, 3, 0)
    with pytest.raises(ValueError, match=r"matches no parameter: names are like wte|no regular expression"):
        steps.split(PARAMS["gpt2"], pattern)


# ---- Training ----


def ten_steps(name, backend, params, pattern, n=10):
    library = backends.get(backend)
    trainable, frozen = steps.split(params, pattern)

    def forward(params, inputs, drop):
        return forward_of(HPARAMS[name])(lora.apply(params, 2.0), inputs, drop=drop)

    step = steps.make_step(library, steps.make_loss(library, forward, 0.1), 2, seed=3)
    state = optimizer.init_state(library.asarray(backends.get("numpy").to_numpy(trainable)))
    batches, losses = np.random.default_rng(5).integers(0, 31, (n, 4, 9)).astype(np.int32), []
    for i, batch in enumerate(batches):
        state, loss = step(state, batch, i, 1e-2, library.asarray(frozen))
        losses.append(float(loss))
    return losses, library.to_numpy(state), trainable


def test_ten_steps_on_numpy_are_those_on_jax(name):
    params = lora.add_lora(PARAMS[name], "c_", 3, 0)
    found = {backend: ten_steps(name, backend, params, r"lora_[ab]$") for backend in backends.NAMES}
    (numpys, state, start), (jaxs, _, _) = found["numpy"], found["jax"]
    np.testing.assert_allclose(numpys, jaxs, atol=1e-5)
    assert state["params"].keys() == state["mean"].keys() == state["square"].keys() == start.keys()
    assert set(map(is_new, start)) == {True}, "no state for what is frozen"
    assert all(np.abs(state["params"][k] - x).max() > 0 for k, x in start.items())


def test_only_what_the_pattern_matches_is_trained():
    _, state, start = ten_steps("gpt2", "numpy", PARAMS["gpt2"], r"blocks\.1\..*|ln_f", n=2)
    expected = {k for k in named_leaves(PARAMS["gpt2"]) if k.startswith(("blocks.1.", "ln_f"))}
    assert state["params"].keys() == start.keys() == expected


# ---- peft's folders ----


def save(folder, params, base, alpha=6, base_name="base"):
    folder.mkdir()
    peft.save_lora(folder, lora.lora_leaves(params), alpha, base_name, base)
    return folder


def test_saved_and_loaded_again(name, tmp_path):
    params = trained(lora.add_lora(PARAMS[name], "c_", 3, 0))
    found = lora.load(save(tmp_path / "a", params, PARAMS[name]), PARAMS[name])
    expected = lora.lora_leaves(params, scale=2.0)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[k], expected[k]) for k in expected)


def test_another_base_is_refused(tmp_path):
    params, base = trained(lora.add_lora(PARAMS["gpt2"], "c_", 3, 0)), PARAMS["gpt2"]
    folder = save(tmp_path / "a", params, base)
    with pytest.raises(ValueError, match=r"for another base: its weights have checksum"):
        lora.load(folder, random_params(**SIZES, seed=1))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.c_attn is \[8, 24\] there, \[12, 36\] here"):
        lora.load(folder, random_params(**SIZES | {"n_embd": 12}))
    with pytest.raises(ValueError, match=r"for another base: this model has no layer"):
        lora.load(folder, random_params(**SIZES | {"n_layer": 1}))
    with pytest.raises(ValueError, match=r"for another base: this model has no layer"):
        lora.load(folder, PARAMS["llama"])
    with pytest.raises(ValueError, match="no adapter folder"):
        lora.load(tmp_path / "b", base)


@pytest.mark.parametrize(
    "change", [{"peft_type": "IA3"}, {"use_dora": True}, {"r": 0}, {"lora_alpha": "x"}, {"rank_pattern": {"c": 1}}]
)
def test_other_configurations_are_refused(change, tmp_path):
    folder = save(tmp_path / "a", lora.add_lora(PARAMS["gpt2"], "c_", 3, 0), PARAMS["gpt2"])
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(OSError, match=next(iter(change))):
        lora.load(folder, PARAMS["gpt2"])


def test_a_damaged_file_is_named(tmp_path):
    folder = save(tmp_path / "a", lora.add_lora(PARAMS["gpt2"], "c_", 3, 0), PARAMS["gpt2"])
    data = (folder / peft.TENSORS).read_bytes()
    (folder / peft.TENSORS).write_bytes(data[:-5])
    with pytest.raises(OSError, match="adapter_model"):
        lora.load(folder, PARAMS["gpt2"])
    (folder / peft.TENSORS).write_bytes(data.replace(b"h.0.attn.c_attn.lora_B", b"h.0.attn.c_attn.lora_C"))
    with pytest.raises(OSError, match="is no matrix of a LoRA"):
        lora.load(folder, PARAMS["gpt2"])


def hf_model(name, folder):
    """transformers' model with the params, saved by us and loaded by it."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    utils.save_model(folder, HPARAMS[name], PARAMS[name], ["hf"])
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_peft_loads_our_folder(name, tmp_path):
    theirs, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    params = trained(lora.add_lora(PARAMS[name], "c_", 3, 0))
    folder = save(tmp_path / "a", params, PARAMS[name], base_name=tmp_path / "base")
    model = theirs.PeftModel.from_pretrained(hf_model(name, tmp_path / "base"), str(folder)).eval()
    found = model(torch.tensor(IDS)[None]).logits[0].detach().numpy()
    assert np.abs(found - logits(name, PARAMS[name])).max() > 1e-2
    np.testing.assert_allclose(found, logits(name, lora.apply(params, 2.0)), atol=1e-4)


def test_we_load_pefts_folder(name, tmp_path):
    theirs, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    targets = ["c_attn", "mlp.c_proj"] if name == "gpt2" else ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = theirs.LoraConfig(
        r=4, lora_alpha=10, target_modules=targets, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM"
    )
    model = theirs.get_peft_model(hf_model(name, tmp_path / "base"), config).eval()
    torch.manual_seed(0)
    for key, tensor in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(tensor.data, std=0.2)
    model.save_pretrained(tmp_path / "a")
    expected = model(torch.tensor(IDS)[None]).logits[0].detach().numpy()
    found = logits(name, lora.merge_folder(PARAMS[name], tmp_path / "a"))
    assert np.abs(found - logits(name, PARAMS[name])).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-4)


# ---- Several in one batch, and at the front door ----


@pytest.fixture(scope="module")
def golden_adapters(golden):
    """Four adapters for the golden model, of different ranks and layers: {name: leaves}."""
    settings = {"a": ("c_attn", 2), "b": ("c_", 3), "c": (r"blocks\.1\.mlp", 4), "d": ("c_proj", 1)}
    return {
        key: lora.lora_leaves(trained(lora.add_lora(golden["params"], pattern, rank, 0), seed=rank, size=0.3))
        for key, (pattern, rank) in settings.items()
    }


def sequences(golden, n_new=12):
    chosen = [None, "a", "b", "c", "d", "a", None, "c"]
    return [
        Sequence(golden["encoder"], [7 * i + j for j in range(1 + 2 * i)], n_new, adapter=adapter)
        for i, adapter in enumerate(chosen)
    ]


@pytest.mark.parametrize("backend", backends.NAMES)
def test_each_sequence_of_a_batch_has_its_own_adapter(golden, golden_adapters, backend):
    n_head, together = golden["hparams"]["n_head"], sequences(golden)
    batching.generate_batch(model_of(golden["params"], n_head, backend), together, golden_adapters)
    models = {None: model_of(golden["params"], n_head, backend)}
    for key, leaves in golden_adapters.items():
        merged = lora.merge(from_names(named_leaves(golden["params"]) | leaves))
        models[key] = model_of(merged, n_head, backend)
    for found, alone in zip(together, sequences(golden), strict=True):
        list(generate(models[alone.adapter], alone))
        assert found.new_ids == alone.new_ids
    assert len({tuple(sequence.new_ids) for sequence in together}) == len(together)


def test_an_adapter_that_a_batch_does_not_have(golden, golden_adapters):
    batch = batching.Batch(model_of(golden["params"], 4), 1, 20, adapters=golden_adapters)
    with pytest.raises(ValueError, match="no adapter 'e': choose from a, b, c, d"):
        batch.add(Sequence(golden["encoder"], [1], 2, adapter="e"))


def test_adapter_at_the_front_door(command, golden, golden_adapters, tmp_path):
    params = golden["params"]
    (tmp_path / "a").mkdir()
    peft.save_lora(tmp_path / "a", golden_adapters["b"], 3, "golden", params)
    flags = ["--model_size", str(GOLDEN), "--n_tokens_to_generate", "8", "--nostop_at_eos"]
    status, text, err = command("Tom", *flags, "--adapter", str(tmp_path / "a"))
    assert (status, err) == (0, "")
    ids = golden["encoder"].encode("Tom")
    merged = lora.merge(from_names(named_leaves(params) | golden_adapters["b"]))
    assert text.rstrip("\n") == golden["encoder"].decode(gpt2.generate(ids, merged, 4, 8)).rstrip("\n")
    assert text != command("Tom", *flags)[1]
    status, _, err = command("Tom", "--model_size", "3M", "--adapter", str(tmp_path / "a"))
    assert status == 2
    assert err.count("\n") == 1
    assert "is for another base" in err
    assert command("Tom", *flags, "--adapter", str(tmp_path / "none"))[0] == 2


def test_float64_stays_float64():
    params = cast(trained(lora.add_lora(PARAMS["gpt2"], "c_", 3, 0)), "float64")
    assert logits("gpt2", lora.apply(params, 2.0)).dtype == lora.merge(params, 2.0)["wte"].dtype == "float64"


oracle("jax")
