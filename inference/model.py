"""What inference knows of a model: a Model, the same for every architecture, and the few functions that use one.

    tokenizer, model = load("3M")
    cache = init_cache(model, n_tokens=20)
    logits, cache = step(model, tokens, cache, position=0)

An architecture is a module with the functions `load`, which makes a Model, and whatever these need:
inference/kv_cache.py for GPT-2.
"""

import importlib
from typing import Any, NamedTuple

import numpy

import backends
import utils

ARCHITECTURES = {"gpt2": "inference.kv_cache"}  # what a model folder says it is -> the module that computes it


class Model(NamedTuple):
    """A model on a backend, ready to generate.

    params       a tree of the backend's arrays
    forward      (params, tokens [n_seq], cache, position, last) -> (logits of tokens[last], [n_vocab], cache).
                 Compiled, if the backend compiles; the cache is donated.
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


def load(model_size="", models_dir=None, base_url=None, backend="numpy", dtype="float32", mesh=""):
    """(tokenizer, Model) of a model by its name: the one place that chooses the architecture (so far there is one).

    Without a name it is 124M, or the embedded model if 124M cannot be had. A mesh, such as "model=2", divides the model
    among JAX's devices (backends/sharding.py). Raises ValueError and OSError as utils.load_encoder_hparams_and_params
    does, for an unknown backend, for an unknown dtype, and for a mesh that does not divide the devices or the heads.
    """
    library = backends.get(backend)
    devices = make_mesh(mesh, backend) if mesh else None
    folder = utils.choose_model(model_size, models_dir, base_url)
    module = importlib.import_module(ARCHITECTURES["gpt2"])
    if devices is None:
        return module.load(folder, library, dtype)
    tokenizer, model = module.load(folder, backends.get("numpy"), dtype)
    return tokenizer, importlib.import_module("backends.sharding").spread(model, module.forward, devices)


def make_mesh(mesh, backend):
    """The mesh that a text describes. Raises ValueError unless JAX computes and has such devices."""
    if backend != "jax":
        raise ValueError(f"--mesh {mesh} needs --backend jax: NumPy computes on one device")
    return importlib.import_module("backends.sharding").make_mesh(mesh)


def init_cache(model, n_tokens):
    """An empty cache for at least n_tokens."""
    return model.init_cache(model.params, min(model.n_ctx, model.backend.cache_capacity(n_tokens)))


def n_positions(cache):
    """The number of positions that a cache has room for."""
    return cache[0][1].shape[-2]


def step(model, tokens, cache, position):
    """(logits [n_vocab] after the last of the list `tokens`, cache): one forward pass. tokens[0] stands at `position`.

    A prompt is padded to one of few lengths, each of which JAX compiles once. The padding fills later slots of the
    cache, which the mask hides and later tokens overwrite.
    """
    n_padded = min(model.backend.bucket_length(len(tokens)), n_positions(cache) - position)
    padded = numpy.zeros(n_padded, numpy.int32)
    padded[: len(tokens)] = tokens
    return model.forward(model.params, padded, cache, position, len(tokens) - 1)


def greedy(model, inputs, n_tokens_to_generate):
    """Yields the most likely ids to follow the list `inputs`, each as soon as it is known."""
    cache = init_cache(model, len(inputs) + n_tokens_to_generate)
    tokens, position = inputs, 0
    for _ in range(n_tokens_to_generate):
        logits, cache = step(model, tokens, cache, position)
        tokens, position = [int(numpy.argmax(model.backend.to_numpy(logits)))], position + len(tokens)
        yield tokens[0]
