"""What a Hugging Face folder says of a LLaMA: its config.json and the names of its tensors. huggingface.py reads and
writes the files.

    config.json of transformers 5      "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, ...}
    of earlier versions                "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", ...}

Both are read. The matrices are [n_out, n_in] there, so they are transposed views of the file here: no copy is made.
"""

import math

from weights.params import check_sizes, require

SIZES = {
    "n_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "d_head": "head_dim",
    "n_layer": "num_hidden_layers",
    "n_ffn": "intermediate_size",
}
SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "n_ctx_original": "original_max_position_embeddings",
}
WORDS = {
    "wte": "embed_tokens.weight",
    "lm_head": "lm_head.weight",
    "blocks": "layers",
    "ln_f": "norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn": "self_attn",
    "c_q": "q_proj",
    "c_k": "k_proj",
    "c_v": "v_proj",
    "c_proj": "o_proj",
    "c_gate": "gate_proj",
    "c_up": "up_proj",
    "c_down": "down_proj",
    "w": "weight",
    "g": "weight",
}
# The values of a LLaMA that are computed here. The first is the one that a missing entry stands for.
SUPPORTED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def hf_name(path):
    """("blocks", 0, "attn", "c_q", "w") -> "layers.0.self_attn.q_proj.weight" """
    return ".".join(WORDS.get(part, str(part)) for part in path)


def read_config(path, found):
    """The config, as variants/llama.py describes it, of the object `found` in a config.json. Raises OSError for sizes
    that are none, and for what is not computed here."""
    required = {name: theirs for name, theirs in SIZES.items() if name not in ("n_head_kv", "d_head")}
    n_embd, n_head = (check_sizes(path, found, required)[name] for name in ("n_embd", "n_head"))
    found = {"num_key_value_heads": n_head} | {name: value for name, value in found.items() if value is not None}
    if "head_dim" not in found and n_embd % n_head:
        raise OSError(f"{path}: hidden_size {n_embd} cannot be shared among num_attention_heads {n_head}")
    config = check_sizes(path, {"head_dim": n_embd // n_head} | found, SIZES)
    rope = {name: found[name] for name in ("rope_theta", "partial_rotary_factor") if name in found}
    for name in ("rope_scaling", "rope_parameters"):
        rope |= require_dict(path, name, found.get(name, {}))
    require(path, found | {"partial_rotary_factor": rope.get("partial_rotary_factor")}, SUPPORTED, "LLaMA")
    check_heads(path, config)
    config["eps"] = number(path, "rms_norm_eps", found.get("rms_norm_eps", 1e-6))
    config["rope_base"] = number(path, "rope_theta", rope.get("rope_theta", 10000.0))
    config["rope_scaling"] = read_scaling(path, {"original_max_position_embeddings": config["n_ctx"]} | rope)
    return config | {"tied": found.get("tie_word_embeddings", False) is True}


def check_heads(path, config):
    """Raises OSError for heads that cannot share keys, or whose numbers cannot be turned in pairs."""
    if config["n_head"] % config["n_head_kv"]:
        raise OSError(
            f"{path}: {config['n_head']} query heads cannot share {config['n_head_kv']} key/value heads evenly"
        )
    if config["d_head"] % 2:
        raise OSError(f"{path}: heads of {config['d_head']} numbers: rotary positions turn pairs, so it must be even")


def read_scaling(path, rope):
    """The rope_scaling of a config, None for plain rotary positions."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise OSError(
            f"{path}: rotary positions of the type {kind!r:.60} are not computed here: default and llama3 are"
        )
    scaling = {ours: number(path, theirs, rope.get(theirs)) for ours, theirs in SCALING.items()}
    if not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise OSError(f"{path}: low_freq_factor {scaling['low_freq_factor']} must be below high_freq_factor")
    return scaling


def number(path, name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OSError(f"{path}: {name} must be a number above 0, not {value!r:.40}")
    return value


def require_dict(path, name, value):
    if not isinstance(value, dict):
        raise OSError(f"{path}: {name} must be an object, not {value!r:.40}")
    return value


def hf_config(config, end_of_text):
    """The contents of config.json, with the names that transformers uses (of its older form, which all versions read).
    end_of_text is an id, or None."""
    fixed = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    fixed |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "attention_bias": False, "mlp_bias": False}
    scaling = config["rope_scaling"]
    if scaling is not None:
        scaling = {"rope_type": "llama3"} | {theirs: scaling[ours] for ours, theirs in SCALING.items()}
    rope = {"rope_theta": config["rope_base"], "rope_scaling": scaling}
    sizes = {theirs: config[ours] for ours, theirs in SIZES.items()}
    return fixed | sizes | rope | {"rms_norm_eps": config["eps"], "tie_word_embeddings": config["tied"]}
