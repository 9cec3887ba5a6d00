"""What inference knows of a model: a Model, the same for every architecture, and the few functions that use one.

    tokenizer, model = load("3M")
    cache = init_cache(model, n_tokens=20)
    logits, cache = step(model, tokens, cache, position=0)

An architecture is a module with a function `make_model`, which makes a Model of params: inference/kv_cache.py for
GPT-2, variants/llama.py for LLaMA. Which one a model has, its hyperparameters tell.
"""

import importlib
from typing import Any, NamedTuple

import numpy

import backends
import utils
from training import lora
from weights.params import architecture, cast

ARCHITECTURES = {"gpt2": "inference.kv_cache", "llama": "variants.llama"}  # the module that computes each
N_PREFILL = 512  # tokens of a prompt that pass through the model at once


class Model(NamedTuple):
    """A model on a backend, ready to generate.

    params       a tree of the backend's arrays
    forward      (params, tokens [n_seq], cache, position, last) -> (logits of tokens[last], [n_vocab], cache); with
                 last None, the logits of all tokens, [n_seq, n_vocab]. Compiled, if the backend compiles. The new cache
                 may be made in the memory of the old one: after a call, use only the cache that is returned.
    init_cache   (params, n_cache) -> an empty cache with room for n_cache positions: for each layer a pair of keys
                 [n_head, d_head, n_cache] and values [n_head, n_cache, d_head]
    n_vocab      the number of logits; n_ctx: the number of positions that the model can use
    end_ids      the tokens that end a text; stop_at_eos: whether generation stops there unless told otherwise
    backend      the module backends.get(name) that computes it
    """

    params: Any
    forward: Any
    init_cache: Any
    n_vocab: int
    n_ctx: int
    end_ids: tuple
    stop_at_eos: bool
    backend: Any


def load(model_size="", models_dir=None, base_url=None, backend="numpy", dtype="float32", adapter="",
         mesh=""):  # fmt: skip
    """(tokenizer, Model) of a model by its name.

    `adapter` is a folder with a LoRA (weights/peft.py), which is merged into the weights. A mesh, such as "model=2",
    divides the model among JAX's devices (backends/sharding.py).
    Without a name it is 124M, or 3M, which comes with this repository, if 124M cannot be had. Raises ValueError and
    OSError as utils.load_encoder_hparams_and_params does, for an unknown backend and for an unknown dtype, and
    ValueError for a mesh that does not divide the devices or the heads.
    """
    library, devices = backends.get(backend), make_mesh(mesh, backend)
    folder = utils.choose_model(model_size, models_dir, base_url)
    tokenizer, hparams, params = utils.load_folder(folder)
    params = lora.merge_folder(params, adapter) if adapter else params
    ending = utils.read_ending(folder, tokenizer, hparams)
    if devices is not None:
        model = make_model(cast(params, dtype), hparams, backends.get("numpy"), *ending)
        return tokenizer, importlib.import_module("backends.sharding").spread(
            model, module_of(hparams).forward, devices
        )
    params = library.prepare(cast(params, dtype))  # the same name, so that no variable keeps the old arrays in memory
    return tokenizer, make_model(params, hparams, library, *ending)


def make_mesh(mesh, backend):
    """The mesh that a text describes; "" is none. Raises ValueError unless JAX computes and has such devices."""
    if mesh and backend != "jax":
        raise ValueError(f"--mesh {mesh} needs --backend jax: NumPy computes on one device")
    return importlib.import_module("backends.sharding").make_mesh(mesh) if mesh else None


def load_adapters(folder, adapters):
    """{name: leaves} for a Batch from texts NAME=FOLDER, each a LoRA of the model in `folder`. Raises ValueError for
    another form, and as lora.load does."""
    found = {}
    for text in adapters:
        name, _, path = text.partition("=")
        if not name or not path or name in found:
            raise ValueError(f"--adapter {text!r:.80}: give NAME=FOLDER, each name once")
        found[name] = lora.load(path, utils.load_folder(folder)[2])
    return found


def make_model(params, hparams, library, end_ids=(), stop_at_eos=False):
    """The Model of params that are on the backend `library` already (library.prepare or library.asarray)."""
    return module_of(hparams).make_model(params, hparams, library, end_ids, stop_at_eos)


def module_of(hparams):
    """The module that computes the architecture with these hyperparameters: the one place that chooses it."""
    return importlib.import_module(ARCHITECTURES[architecture(hparams)])


def init_cache(model, n_tokens):
    """An empty cache for at least n_tokens."""
    return model.init_cache(model.params, min(model.n_ctx, model.backend.cache_capacity(n_tokens)))


def n_positions(cache):
    """The number of positions that a cache has room for."""
    return cache[0][1].shape[-2]


def step(model, tokens, cache, position):
    """(logits [n_vocab] after the last of the list `tokens`, cache). tokens[0] stands at `position`.

    A long prompt goes through the model in chunks of N_PREFILL tokens, so that its activations, which are much larger
    than its part of the cache, are never in memory all at once.
    """
    for start in range(0, len(tokens), N_PREFILL):
        logits, cache = forward(model, tokens[start : start + N_PREFILL], cache, position + start)
    return logits, cache


def forward(model, tokens, cache, position, all_logits=False):
    """The same in one forward pass.

    A prompt is padded to one of few lengths, each of which JAX compiles once. The padding fills later slots of the
    cache, which the mask hides and later tokens overwrite. all_logits: those after each token, of the padding too.
    """
    n_padded = min(model.backend.bucket_length(len(tokens)), n_positions(cache) - position)
    padded = numpy.zeros(n_padded, numpy.int32)
    padded[: len(tokens)] = tokens
    return model.forward(model.params, padded, cache, position, None if all_logits else len(tokens) - 1)


def greedy(model, inputs, n_tokens_to_generate):
    """Yields the most likely ids to follow the list `inputs`, each as soon as it is known."""
    cache = init_cache(model, len(inputs) + n_tokens_to_generate)
    tokens, position = inputs, 0
    for _ in range(n_tokens_to_generate):
        logits, cache = step(model, tokens, cache, position)
        tokens, position = [int(numpy.argmax(model.backend.to_numpy(logits)))], position + len(tokens)
        yield tokens[0]
