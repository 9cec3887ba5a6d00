"""A Hugging Face model folder: config.json and model.safetensors. (What only a LLaMA has is in llama.py.)

A safetensors file holds named tensors like a TensorFlow checkpoint, but without checksums:

    8 bytes      the length of the JSON text that follows, as a little-endian number
    JSON         {tensor name: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}}
    the rest     the numbers of all tensors, little-endian; the offsets count from here

The `safetensors` library checks that a file is well-formed. It copies each tensor that it reads, so the numbers are
mapped here, as those of a TensorFlow checkpoint are. A large model is split into several such files; then
model.safetensors.index.json says which tensor is in which.

The names differ from OpenAI's: see hf_name. The numbers may be narrower than float32: see widen.
"""

import re
from collections import namedtuple
from pathlib import Path

import numpy as np

from weights import llama
from weights.files import MAX_SMALL, check_regular, map_file, map_part, parse_json, read_json, replacing
from weights.params import (
    architecture,
    assemble,
    check_hparams,
    empty,
    flatten,
    llama_shapes,
    param_shapes,
    replace_leaves,
    require,
)

HF_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
HF_NAMES = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}  # what config.json calls them
# The names that transformers has for GELU's approximation with tanh, which is gpt2.gelu.
GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
OTHER_FORMATS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")
Tensor = namedtuple("Tensor", "path data dtype shape offset size")  # data: the whole file, mapped


def hf_name(path):
    """("blocks", 0, "attn", "c_attn", "w") -> "h.0.attn.c_attn.weight" """
    words = {"blocks": "h", "w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    return ".".join(words.get(part, str(part)) for part in path)


# ---- Reading ----


def read_hparams(path):
    """{n_vocab, n_ctx, n_embd, n_head, n_layer} of a GPT-2's config.json, or what llama.read_config says of a LLaMA's.
    Raises OSError for a file that is damaged, or that describes something which is not computed here."""
    config = read_json(path)
    if (name := config.get("model_type", "gpt2")) not in ("gpt2", "llama"):
        raise OSError(f"{path}: model_type is {name!r:.60}, which is not supported: gpt2 and llama are")
    if name == "llama":
        return llama.read_config(path, config)
    hparams = check_hparams(path, config, HF_NAMES)
    supported = {"activation_function": GELUS, "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,)}
    supported |= {"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}
    supported |= {"tie_word_embeddings": (True,), "quantization_config": (None,)}
    require(path, config, supported, "GPT-2")
    n_inner = 4 * hparams["n_embd"]
    if config.get("n_inner") not in (None, n_inner):
        raise OSError(f"{path}: n_inner is {config['n_inner']!r:.60}, GPT-2's is 4 * n_embd = {n_inner}")
    return hparams


def load_gpt2_params_from_hf(path, hparams):
    """The params of a GPT-2 in a model.safetensors, or in the files that path + ".index.json" lists. Raises OSError as
    load_params does."""
    return load_params(path, param_shapes(**hparams), hf_name, "transformer.", r"\.attn\.(masked_)?bias$")


def load_llama_params_from_hf(path, config):
    """The same for a LLaMA. Each matrix is a transposed view of what the file holds, [n_out, n_in]."""
    shapes = {place: shape[::-1] if place[-1] == "w" else shape for place, shape in llama_shapes(config).items()}
    params = load_params(path, shapes, llama.hf_name, "model.", r"\.rotary_emb\.inv_freq$")
    return replace_leaves(lambda place, array: array.T if place[-1] == "w" else array, params)


def load_params(path, shapes, name_of, prefix, ignored):
    """The params that `shapes` describes, from a model.safetensors or the files that path + ".index.json" lists.
    float32 and float64 are memory-mapped, not copied (changing an array changes memory, never the file); narrower
    numbers become float32.

    Names are with or without `prefix`, as the kind of model was that was saved; those that match `ignored` are masks
    and tables, no parameters. Raises OSError naming the file and the tensor if one is missing, damaged, or has another
    shape, and if the output matrix, lm_head.weight, differs from wte in a model that has one matrix for both.
    """
    tensors = {}
    for name, tensor in read_tensors(Path(path)).items():
        name = name.removeprefix(prefix)
        if name in tensors:
            raise OSError(f"{path}: {name} is in it twice, with the prefix `{prefix}` and without")
        if not re.search(ignored, name):
            tensors[name] = tensor
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in HF_DTYPES]:
        raise OSError(f"{path}: {odd[0]} is of a number type that is not read here: save it as one of {[*HF_DTYPES]}")
    wte, head = name_of(("wte",)), None if ("lm_head",) in shapes else tensors.pop("lm_head.weight", None)
    if head and not equal(head, tensors.setdefault(wte, head)):
        raise OSError(f"{path}: lm_head.weight differs from {wte}, but this model has one matrix for both")
    found = {name: tensor.shape for name, tensor in tensors.items()}
    return assemble(path, shapes, found, name_of, lambda name: widen(tensors[name]))


def read_tensors(path):
    """{name: Tensor} of a safetensors file, or of the several files that path + ".index.json" lists."""
    if path.exists():
        return read_header(path)
    index = path.with_name(path.name + ".index.json")
    if not index.exists():
        raise OSError(what_else(path))
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) and f == Path(f).name for f in places.values()):
        raise OSError(f"{index}: weight_map must say for each tensor in which file of this folder it is")
    files = {file: read_header(path.with_name(file)) for file in sorted(set(places.values()))}
    if lost := [name for name, file in places.items() if name not in files[file]]:
        raise OSError(f"{path.with_name(places[lost[0]])}: {lost[0]} is missing; {index.name} says that it is here")
    return {name: files[file][name] for name, file in places.items()}


def what_else(path):
    """The end of the error that there is no safetensors file: how to convert the weights from another format, if the
    folder has one."""
    for name in OTHER_FORMATS:
        if path.with_name(name).exists():
            return (
                f"{path.with_name(name)} cannot be read here, and reading a pickle can run code. Convert it with "
                f"transformers: AutoModelForCausalLM.from_pretrained({str(path.parent)!r}).save_pretrained('new')"
            )
    return f"{path}: No such file or directory"


def read_header(path):
    """{name: Tensor} of one safetensors file. Raises OSError naming the file if it is not well-formed."""
    import safetensors

    check_regular(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= MAX_SMALL else b""
    try:
        with safetensors.safe_open(path, "numpy"):  # checks the header, and that the tensors fill the file exactly
            header = parse_json(path, text)
    except (safetensors.SafetensorError, OSError) as error:
        raise OSError(f"{path}: no safetensors file, or a damaged one ({error})") from None
    header.pop("__metadata__", None)
    data, tensors = map_file(path), {}
    for name, found in header.items():
        begin, end = found["data_offsets"]
        tensors[name] = Tensor(path, data, found["dtype"], found["shape"], 8 + size + begin, end - begin)
    return tensors


def widen(tensor):
    """The numbers of a tensor as float32 or float64, [n]. A bfloat16 is the upper half of a float32: zeros follow."""
    numbers = map_part(tensor.path, tensor.data, tensor.offset, tensor.size).view(HF_DTYPES[tensor.dtype])
    if tensor.dtype in ("BF16", "F16"):
        wide = empty(numbers.shape, np.uint32 if tensor.dtype == "BF16" else np.float32)
        wide[:] = numbers
        if tensor.dtype == "BF16":
            wide <<= 16  # in place: no second copy of a large tensor
        return wide.view(np.float32)
    return np.require(numbers, requirements="A")  # a copy if the file has it at an odd place: slow to compute with


def equal(a, b):
    """Whether two Tensors have the same shape and, bit for bit, the same numbers."""
    if a is b or a.shape != b.shape:
        return a is b
    a, b = widen(a), widen(b)
    return a.dtype == b.dtype and np.array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))


# ---- Writing ----


def hf_config(hparams, end_of_text):
    """The contents of config.json, with the names that transformers uses. end_of_text is an id, or None."""
    if architecture(hparams) == "llama":
        return llama.hf_config(hparams, end_of_text)
    fixed = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    fixed |= {"layer_norm_epsilon": 1e-5, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return fixed | {HF_NAMES.get(name, name): value for name, value in hparams.items()}


def hf_tensors(hparams, params):
    """{name: array} of params, with the names and shapes of transformers' models (a GPT2Model's, a
    LlamaForCausalLM's)."""
    if architecture(hparams) == "gpt2":
        return {hf_name(path): array for path, array in flatten(params).items()}
    arrays = {path: np.asarray(array).T if path[-1] == "w" else array for path, array in flatten(params).items()}
    return {"model." * (path != ("lm_head",)) + llama.hf_name(path): array for path, array in arrays.items()}


def write_tensors(path, tensors):
    """Writes a model.safetensors, each number as it is (bfloat16, which NumPy lacks, as float32)."""
    import safetensors.numpy

    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    tensors = {name: t.astype("<f4") if t.dtype.itemsize == 2 else t for name, t in tensors.items()}
    with replacing(path) as part:
        part.write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))  # transformers requires it
