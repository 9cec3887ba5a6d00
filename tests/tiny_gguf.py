"""A tiny LLaMA as a GGUF file, written by the `gguf` package: 514 tokens, three of them special, and a template."""

import numpy as np
from conftest import GOLDEN, oracle

import encoder
from weights.params import flatten, llama_shapes, unflatten

CONFIG = {"n_vocab": 514, "n_ctx": 96, "n_embd": 64, "n_head": 4, "n_head_kv": 2, "d_head": 16, "n_layer": 2}
CONFIG |= {"n_ffn": 96, "eps": 1e-5, "rope_base": 5e4, "rope_scaling": None, "tied": True}
TEMPLATE = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] | trim + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
NAMES = {"c_q": "attn_q", "c_k": "attn_k", "c_v": "attn_v", "c_proj": "attn_output", "c_gate": "ffn_gate"}
NAMES |= {"c_up": "ffn_up", "c_down": "ffn_down", "ln_1": "attn_norm", "ln_2": "ffn_norm", "ln_f": "output_norm"}
NAMES |= {"wte": "token_embd", "lm_head": "output"}


def random_llama(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    return unflatten({path: rng.normal(size=s, scale=0.3).astype("f4") for path, s in llama_shapes(config).items()})


def permuted(w, n_head):
    """[n_out, n_in] with the rows of each head as llama.cpp's converter leaves them: 0, d/2, 1, d/2 + 1, ..."""
    heads = [[head[i // 2 + (i % 2) * len(head) // 2] for i in range(len(head))] for head in np.split(w, n_head)]
    return np.array([row for head in heads for row in head])


def write_gguf(path, params=None, config=CONFIG, kind="F32", fields=None, template=TEMPLATE, tensors=None):
    """Writes the file. `fields` and `tensors` replace what is written, None leaves it out. Returns the params."""
    gguf, params = oracle("gguf"), params or random_llama(config)
    kind, writer = gguf.GGMLQuantizationType[kind], gguf.GGUFWriter(path, "llama")
    for name, value in (all_fields(config, template) | (fields or {})).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        if value is not None:
            add.get(type(value), writer.add_array)(name, value)
    arrays = {gguf_name(place): to_file(place, array, config) for place, array in flatten(params).items()}
    for name, array in (arrays | (tensors or {})).items():
        if array is None:
            continue
        if array.ndim == 1 or kind.name == "F32":
            writer.add_tensor(name, np.ascontiguousarray(array))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params


def gguf_name(place):
    layer = f"blk.{place[1]}." if place[0] == "blocks" else ""
    return f"{layer}{next(NAMES[part] for part in reversed(place) if part in NAMES)}.weight"


def to_file(place, array, config):
    array = array.T if place[-1] == "w" else array
    heads = {"c_q": config["n_head"], "c_k": config["n_head_kv"]}
    return permuted(array, heads[place[-2]]) if place[-2:-1] and place[-2] in heads else array


def all_fields(config, template):
    """The fields of the file. GGUFWriter writes general.architecture by itself."""
    sizes = {"context_length": "n_ctx", "embedding_length": "n_embd", "block_count": "n_layer"}
    sizes |= {"feed_forward_length": "n_ffn", "attention.head_count": "n_head", "attention.head_count_kv": "n_head_kv"}
    fields = {f"llama.{theirs}": config[ours] for theirs, ours in sizes.items()}
    fields |= {"llama.rope.freq_base": config["rope_base"], "llama.attention.layer_norm_rms_epsilon": config["eps"]}
    ours = encoder.get_encoder(GOLDEN.name, GOLDEN.parent)
    tokens = [ours.spellings[i] for i in range(512)] + ["<|im_start|>", "<|im_end|>"]
    kinds = [3 if token.startswith("<|") and token.endswith("|>") else 1 for token in tokens]
    words = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": kinds, "add_bos_token": False}
    words |= {"merges": [" ".join(pair) for pair in ours.ranks], "bos_token_id": 512, "eos_token_id": 513}
    fields |= {f"tokenizer.ggml.{name}": value for name, value in words.items()}
    return fields | {"tokenizer.chat_template": template}
