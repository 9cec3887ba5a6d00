"""The model against golden answers, closed forms, and a reference in plain loops written from the papers."""

import inspect
import math

import numpy as np
import pytest
from conftest import cast, oracle, random_params

import gpt2
import gpt2_pico

CASES = range(5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-5), (np.float64, 1e-12)])
def test_logits_equal_the_golden_ones(golden, case, dtype, tolerance):
    params, ids = cast(golden["params"], dtype), golden["cases"][case]["ids"]
    logits = gpt2.gpt2(ids, **params, n_head=golden["hparams"]["n_head"])
    assert logits.dtype == dtype
    assert np.abs(logits - golden["arrays"][f"logits_{case}"]).max() <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_every_block_receives_the_golden_residual_stream(golden, case):
    params = cast(golden["params"], np.float64)
    x = gpt2.embed(golden["cases"][case]["ids"], params["wte"], params["wpe"])
    for layer, block in enumerate(params["blocks"]):
        assert np.abs(x - golden["arrays"][f"hidden_{case}_{layer}"]).max() <= 1e-12
        x = gpt2.transformer_block(x, **block, n_head=golden["hparams"]["n_head"])


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuations_equal_the_golden_ones(golden, case):
    given = golden["cases"][case]
    ids = list(given["ids"])
    assert gpt2.generate(ids, golden["params"], golden["hparams"]["n_head"], 24) == given["greedy_24"]
    assert ids == given["ids"], "generate changed its argument"


def test_gelu_is_the_tanh_form():
    assert gpt2.gelu(np.array([0.0]))[0] == 0
    x = np.linspace(-6, 6, 1201)
    tanh_form = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    exact_form = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert np.abs(gpt2.gelu(x) - tanh_form).max() < 1e-15
    assert 4.7e-4 < np.abs(gpt2.gelu(x) - exact_form).max() < 4.8e-4  # the published distance of the two forms


def test_softmax():
    assert np.allclose(gpt2.softmax(np.log([[1.0, 2.0, 5.0]])), [[0.125, 0.25, 0.625]], atol=1e-15)
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    assert np.allclose(gpt2.softmax(x).sum(axis=-1), 1)
    assert np.allclose(gpt2.softmax(x), gpt2.softmax(x + 1000), atol=1e-12), "a common shift changes nothing"
    assert gpt2.softmax(np.array([2, 100])).dtype == np.float64, "integer scores are scores"


def test_layer_norm():
    g, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.0, 0.0, 1.0])
    expected = np.array([-3, -1, 1, 3]) / math.sqrt(5 + 1e-5)  # mean 4, population variance 5
    assert np.allclose(gpt2.layer_norm(np.array([1.0, 3.0, 5.0, 7.0]), g, b), g * expected + b, atol=1e-15)
    assert np.array_equal(gpt2.layer_norm(np.full((2, 4), 7.0), g, b), [b, b]), "a constant vector divides by no zero"
    x = np.float32(1e4) + np.random.default_rng(0).normal(size=(4, 768)).astype(np.float32)  # mean(x²)-mean(x)² fails
    exact = (x.astype(float) - x.mean(-1, keepdims=True, dtype=float)) / x.astype(float).std(-1, keepdims=True)
    assert np.abs(gpt2.layer_norm(x, np.float32(1), np.float32(0)) - exact).max() < 2e-3


def loop_attention(q, k, v, mask):
    """Vaswani et al. 2017, equation 1, one number at a time."""
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if mask[i][j]]
        weights = [math.exp(sum(q[i][d] * k[j][d] for d in range(len(q[i]))) / math.sqrt(len(q[i]))) for j in seen]
        for weight, j in zip(weights, seen, strict=True):
            out[i] += weight / sum(weights) * v[j]
    return out


def test_attention_equals_loops():
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(3, 4)), rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    mask = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=bool)
    assert np.allclose(gpt2.attention(q, k, v, mask), loop_attention(q, k, v, mask), atol=1e-14)


def test_a_masked_key_has_no_weight_however_well_it_matches():
    q, k, v = np.array([[1e3, 0]]), np.array([[1e3, 0], [1.0, 0]]), np.array([[7.0, 7], [1, 2]])
    assert gpt2.attention(q, k, v, np.array([[False, True]])).tolist() == [[1, 2]]


def test_mha_equals_loops_over_heads():
    block, n_head = cast(random_params(), float)["blocks"][0]["attn"], 2
    x = np.random.default_rng(2).normal(size=(5, 6))
    q, k, v = np.split(x @ block["c_attn"]["w"] + block["c_attn"]["b"], 3, axis=1)
    heads = [loop_attention(*(part[:, h * 3 : h * 3 + 3] for part in (q, k, v)), np.tri(5)) for h in range(n_head)]
    expected = np.concatenate(heads, axis=1) @ block["c_proj"]["w"] + block["c_proj"]["b"]
    assert np.allclose(gpt2.mha(x, **block, n_head=n_head), expected, atol=1e-13)


def test_no_token_sees_a_later_one():
    params = random_params()
    a = gpt2.gpt2([1, 2, 3, 4, 5], **params, n_head=2)
    b = gpt2.gpt2([1, 2, 3, 9, 0], **params, n_head=2)
    assert np.array_equal(a[:3], b[:3])
    assert not np.allclose(a[3:], b[3:])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_each_layer_keeps_the_dtype(dtype, monkeypatch):
    if dtype == "bfloat16":
        dtype = oracle("ml_dtypes").bfloat16
    seen = set()
    for name in ("gelu", "softmax", "layer_norm", "linear", "ffn", "attention", "mha", "transformer_block"):
        layer = getattr(gpt2, name)

        def checked(x, *args, layer=layer, name=name, **kwargs):
            y = layer(x, *args, **kwargs)
            assert (name, y.dtype) == (name, np.dtype(dtype))
            seen.add(name)
            return y

        monkeypatch.setattr(gpt2, name, checked)
    assert gpt2.gpt2([1, 2, 3], **cast(random_params(), dtype), n_head=2).dtype == dtype
    assert len(seen) == 8


def test_bfloat16_statistics_are_those_of_float32():
    bfloat16 = oracle("ml_dtypes").bfloat16
    x = np.random.default_rng(0).normal(1, 3, size=(4, 768)).astype(bfloat16)
    g, b = np.ones(768, bfloat16), np.zeros(768, bfloat16)
    wide = x.astype(np.float32)
    assert np.array_equal(gpt2.softmax(x), gpt2.softmax(wide).astype(bfloat16))
    assert np.array_equal(
        gpt2.layer_norm(x, g, b), gpt2.layer_norm(wide, np.float32(1), np.float32(0)).astype(bfloat16)
    )


def test_the_prompt_and_the_new_tokens_may_fill_n_ctx_exactly():
    params = random_params(n_ctx=8)
    assert len(gpt2.generate([1, 2, 3], params, 2, 5)) == 5
    assert gpt2.generate([1], params, 2, 0) == []


@pytest.mark.parametrize(
    ("inputs", "n_new", "message"),
    [
        ([1, 2, 3], 6, "prompt 3 + 6 new = 9 tokens > n_ctx 8"),
        ([1] * 9, 0, "prompt 9 + 0 new = 9 tokens > n_ctx 8"),
        ([1], -1, "1 input ids and -1 new tokens"),
        ([], 3, "0 input ids and 3 new"),
        ([1, 11], 3, "token id 11 is outside the vocabulary: ids go from 0 to 10"),
        ([-1, 1], 3, "token id -1 is outside"),
    ],
)
def test_generate_refuses_before_it_computes(inputs, n_new, message, monkeypatch):
    monkeypatch.setattr(gpt2, "gpt2", None)
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        gpt2.generate(inputs, random_params(), 2, n_new)


@pytest.mark.parametrize("case", CASES)
def test_pico_is_the_same_bit_for_bit(golden, case):
    arguments = {**golden["params"], "n_head": golden["hparams"]["n_head"]}
    ids = golden["cases"][case]["ids"]
    assert np.array_equal(gpt2.gpt2(ids, **arguments), gpt2_pico.gpt2(ids, **arguments))


def test_pico_has_the_same_signatures():
    names = [name for name, f in vars(gpt2_pico).items() if inspect.isfunction(f) and name != "main"]
    assert " ".join(names) == "gelu softmax layer_norm linear ffn attention mha transformer_block gpt2 generate"
    for name in names:
        assert inspect.signature(getattr(gpt2, name)) == inspect.signature(getattr(gpt2_pico, name))


PUBLISHED = [  # picoGPT's README; tests/models/gpt2/test_modeling_gpt2.py of transformers
    (
        "Alan Turing theorized that computers would one day become",
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform complex "
        "calculations, and it can perform these calculations in a way that is very similar to the human brain.",
    ),
    (
        "Every effort moves",
        " forward, but it's not enough.\n\n\"I'm not going to sit here and say, 'I'm not going to do this,'",
    ),
    ("The dog", [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]),
]


@pytest.mark.gpt2_124M
@pytest.mark.parametrize(("prompt", "published"), PUBLISHED, ids=["Turing", "effort", "dog"])
def test_openai_weights_continue_as_published(prompt, published):
    import utils

    folder = utils.MODELS_DIR / "124M"
    if not all((folder / name).exists() for name in utils.TF_FILES):
        pytest.skip("needs OpenAI's weights in models/124M")
    encoder, hparams, params = utils.load_encoder_hparams_and_params("124M")
    assert params["wte"].shape == (50257, 768)
    assert np.allclose(gpt2.gpt2([50256], **params, n_head=12)[0, :3], [-43.4317, -39.8364, -43.0660], atol=1e-3)
    assert np.allclose(params["wte"][0, :3], [-0.11010301, -0.03926672, 0.03310751], atol=1e-8)
    n_new = len(encoder.encode(published)) if isinstance(published, str) else len(published)
    ids = gpt2.generate(encoder.encode(prompt), params, hparams["n_head"], n_new)
    assert published in (ids, encoder.decode(ids))
