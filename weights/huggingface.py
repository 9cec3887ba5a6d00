"""A Hugging Face model folder: config.json and model.safetensors, read and written with the `safetensors` library.

safetensors holds named tensors like a TensorFlow checkpoint, without checksums. The names differ from OpenAI's: see
hf_name. The numbers may be narrower than float32: see widen.
"""

import re
from pathlib import Path

import numpy as np

from weights.files import read_json, replacing
from weights.params import assemble, check_hparams, flatten, param_shapes

HF_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def hf_name(path):
    """("blocks", 0, "attn", "c_attn", "w") -> "h.0.attn.c_attn.weight" """
    words = {"blocks": "h", "w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    return ".".join(words.get(part, str(part)) for part in path)


# ---- Reading ----


def read_hparams(path):
    """{n_vocab, n_ctx, n_embd, n_head, n_layer} of a config.json. Raises OSError for a file that is damaged, or that
    describes something gpt2.py would compute differently."""
    config = read_json(path)
    hparams = check_hparams(path, {"n_vocab": config.get("vocab_size"), "n_ctx": config.get("n_positions")} | config)
    expected = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None}
    expected |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    if config.get("n_inner") == 4 * hparams["n_embd"]:
        config["n_inner"] = None
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise OSError(f"{path}: {name} is {config[name]!r}; GPT-2 has {value!r}")
    return hparams


def load_gpt2_params_from_hf(path, hparams):
    """The params in a model.safetensors. float32 and float64 stay; narrower numbers become float32. Raises OSError
    naming the file and the tensor if one is missing, damaged, or has another shape."""
    import safetensors

    try:
        tensors = dict(safetensors.deserialize(Path(path).read_bytes()))
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: no safetensors file, or a damaged one ({error})") from None
    # Some files have this prefix, some do not; some hold buffers that are not parameters.
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors = {name: t for name, t in tensors.items() if not re.search(r"\.attn\.(masked_)?bias$|^lm_head", name)}
    if odd := [f"{name} ({t['dtype']})" for name, t in tensors.items() if t["dtype"] not in HF_DTYPES]:
        raise OSError(f"{path}: {odd[0]} is of a type that this reader does not know")
    found = {name: tensor["shape"] for name, tensor in tensors.items()}
    return assemble(path, param_shapes(**hparams), found, hf_name, lambda name: widen(tensors[name]))


def widen(tensor):
    """The numbers of a tensor as float32 or float64. A bfloat16 is the upper half of a float32: zeros follow."""
    numbers = np.frombuffer(tensor["data"], HF_DTYPES[tensor["dtype"]])
    if tensor["dtype"] == "BF16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.promote_types(numbers.dtype, np.float32))


# ---- Writing ----


def hf_config(hparams, end_of_text):
    """The contents of config.json, with the names that transformers uses. end_of_text is an id, or None."""
    names = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
    fixed = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    fixed |= {"layer_norm_epsilon": 1e-5, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return fixed | {names.get(name, name): value for name, value in hparams.items()}


def save_gpt2_params_to_hf(path, params):
    """Writes params as a model.safetensors, each number as it is (bfloat16, which NumPy lacks, as float32)."""
    import safetensors.numpy

    tensors = {hf_name(path): np.ascontiguousarray(array) for path, array in flatten(params).items()}
    tensors = {name: t.astype("<f4") if t.dtype.itemsize == 2 else t for name, t in tensors.items()}
    with replacing(path) as part:
        part.write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))  # transformers asks for this word
