"""A LoRA in the folder format of Hugging Face's `peft` library, which loads what is written here, and the reverse.

    adapter_config.json          rank, alpha, which layers
    adapter_model.safetensors    two matrices for each of these layers

peft stores each matrix with the outputs first, so both are transposed here:

    base_model.model.transformer.h.0.attn.c_attn.lora_A.weight    [rank, n_in]     lora_a is [n_in, rank]
    base_model.model.transformer.h.0.attn.c_attn.lora_B.weight    [n_out, rank]    lora_b is [rank, n_out]

The safetensors file also stores a checksum of the base model's weights, which peft ignores: an adapter on top of other
weights than those it was trained on gives a model that computes nonsense, without any error.
"""

import json
import math
import re
import zlib

import numpy as np

from weights import llama
from weights.files import read_json, replacing, write_text
from weights.huggingface import hf_name, read_header, widen
from weights.params import flatten, leaf_name, named_leaves

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# What a configuration must say, or leave out: anything else would change the result.
SUPPORTED = {"peft_type": ["LORA"], "bias": ["none"], "use_dora": [False], "use_rslora": [False, True]}
SUPPORTED |= {key: [None, {}, []] for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")}


def peft_name(name, is_llama):
    """ "blocks.0.attn.c_attn" -> "transformer.h.0.attn.c_attn", the name of a layer in transformers."""
    path = name.split(".")
    return f"model.{llama.hf_name(path)}" if is_llama else f"transformer.{hf_name(path)}"


def checksum(params):
    """The checksum (CRC-32, as text) of all parameters as float32 numbers, in the order of their names."""
    total = 0
    for name, array in sorted(named_leaves(params).items()):
        total = zlib.crc32(np.ascontiguousarray(array, "<f4"), zlib.crc32(name.encode(), total))
    return f"{total:08x}"


# ---- Writing ----


def save_lora(folder, leaves, alpha, base_name, params):
    """Writes the LoRA `leaves`, {"blocks.0.attn.c_attn.lora_a": [n_in, rank], ...}, without scale, into a folder that
    exists. params are those of the base model. The tensors, one file, are written last."""
    import safetensors.numpy

    is_llama = "wpe" not in params
    names = [name.removesuffix(".lora_a") for name in leaves if name.endswith(".lora_a")]
    tensors = {}
    for name in names:
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            key = f"base_model.model.{peft_name(name, is_llama)}.{theirs}.weight"
            tensors[key] = np.ascontiguousarray(leaves[f"{name}.{ours}"].T, "<f4")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name)}
    config |= {"r": leaves[f"{names[0]}.lora_a"].shape[1], "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none"}
    config |= {"target_modules": sorted(peft_name(name, is_llama) for name in names)}
    config |= {"fan_in_fan_out": not is_llama, "inference_mode": True}  # fan_in_fan_out: w is [n_in, n_out] there too
    write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    with replacing(folder / TENSORS) as part:
        part.write_bytes(safetensors.numpy.save(tensors, {"format": "pt", "base_checksum": checksum(params)}))


# ---- Reading ----


def load_lora(folder, params):
    """{"blocks.0.attn.c_attn.lora_a": [n_in, rank], ...lora_b: [rank, n_out]} of a folder, lora_b multiplied by
    alpha / rank. params are those of the base model, as they were loaded.

    Raises OSError for files that are missing, damaged, or not LoRA in its plain form, and ValueError if the LoRA was
    trained on another base: other layers, other shapes or other weights.
    """
    scale = read_scale(folder / CONFIG)
    file = folder / TENSORS
    tensors, w = read_header(file), {leaf_name(path[:-1]): x for path, x in flatten(params).items() if path[-1] == "w"}
    names = {f"base_model.model.{peft_name(name, 'wpe' not in params)}": name for name in w if "blocks" in name}
    leaves = {}
    for key, tensor in tensors.items():
        module, _, kind = key.removesuffix(".weight").rpartition(".lora_")
        if kind not in ("A", "B") or len(tensor.shape) != 2:
            raise OSError(f"{file}: {key} is no matrix of a LoRA in its plain form, the only one that is read here")
        if module not in names:
            raise ValueError(f"{folder} is for another base: this model has no layer {module!r:.80}")
        array = widen(tensor).reshape(tensor.shape).T  # -> [n_in, rank] or [rank, n_out]
        leaves[f"{names[module]}.lora_{kind.lower()}"] = array * np.float32(scale) if kind == "B" else array
    check_base(folder, leaves, w)
    found = read_checksum(file)
    if found not in (None, ours := checksum(params)):
        raise ValueError(f"{folder} is for another base: its weights have checksum {found}, those of this model {ours}")
    return leaves


def read_scale(path):
    """alpha / rank of an adapter_config.json."""
    config = read_json(path)
    for name, values in SUPPORTED.items():
        if (value := config.get(name, values[0])) not in values:
            raise OSError(f"{path}: {name} is {value!r:.60}; only {values[0]!r}, plain LoRA, is read here")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise OSError(f"{path}: r and lora_alpha must be numbers, r 1 or more, not {rank!r:.20} and {alpha!r:.20}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_base(folder, leaves, w):
    """Raises ValueError unless each layer has both matrices, of shapes that fit to its w."""
    if not leaves:
        raise OSError(f"{folder / TENSORS}: no matrices")
    for name in sorted({re.sub(r"\.lora_[ab]$", "", leaf) for leaf in leaves}):
        a, b = leaves.get(f"{name}.lora_a"), leaves.get(f"{name}.lora_b")
        if a is None or b is None or a.shape[1] != b.shape[0]:
            raise OSError(f"{folder / TENSORS}: {name} needs lora_A and lora_B of the same rank")
        if (shape := (a.shape[0], b.shape[1])) != w[name].shape:
            raise ValueError(f"{folder} is for another base: {name} is {list(shape)} there, {list(w[name].shape)} here")


def read_checksum(path):
    """The base's checksum in a safetensors file, or None."""
    import safetensors

    with safetensors.safe_open(path, "numpy") as file:
        return (file.metadata() or {}).get("base_checksum")
