"""The engines that tools.bench measures: this project's code on its two backends, other programs, and the machine.

Each engine is made from its name, hparams and params. `device` says in words what computes. The methods return seconds:

    decode(n_prompt)   for one token, after a prompt of n_prompt tokens
    prefill(n)         for the logits of all n tokens of a prompt
    batch(n_rows)      for one token of each of n_rows sequences

PicogptStyle has decode alone: a batch without a cache would take minutes.

Each engine runs in a process of its own, so a package of a peer is imported only where that peer is made.
"""

import importlib.util
import os
import tempfile
import time

import numpy as np

import backends
import gpt2
from inference import batching, slot_caches
from inference.model import greedy, init_cache, make_model
from weights.huggingface import hf_config, hf_tensors
from weights.params import architecture, flatten

N_DECODE = 32  # tokens that one measurement of decode generates
N_BATCH_PROMPT, N_BATCH_DECODE = 10, 8  # tokens of the prompt and new tokens, in one measurement of batch


def prompt(hparams, n):
    """n random ids, the same in every process."""
    return np.random.default_rng(1).integers(0, hparams["n_vocab"], n).tolist()


def timed(f):
    """The seconds that f() takes."""
    started = time.perf_counter()
    f()
    return time.perf_counter() - started


class Ours:
    """gpt2.py and inference/ on one of the backends."""

    def __init__(self, name, hparams, params):
        self.backend, self.hparams = backends.get(name), hparams
        self.device = self.backend.setup(str(params["wte"].dtype))
        self.model = make_model(self.backend.prepare(params), hparams, self.backend)

    def decode(self, n_prompt):
        ids = greedy(self.model, prompt(self.hparams, n_prompt), N_DECODE + 1)
        next(ids)  # the first id takes the time of the whole prompt
        return timed(lambda: list(ids)) / N_DECODE

    def prefill(self, n):
        tokens, cache = np.array(prompt(self.hparams, n)), init_cache(self.model, n)
        # On JAX a call returns before the result is there. Fetching one number of it waits for all of it.
        return timed(lambda: self.backend.to_numpy(self.model.forward(self.model.params, tokens, cache, 0)[0][-1, 0]))

    def batch(self, n_rows):
        cache = slot_caches.init_caches(self.model, n_rows, N_BATCH_PROMPT + N_BATCH_DECODE + 1)
        tokens, position = [prompt(self.hparams, N_BATCH_PROMPT)] * n_rows, 0
        for n_done in range(1 + N_BATCH_DECODE):
            logits, cache = batching.step_batch(self.model, tokens, cache, [position] * n_rows)
            position += len(tokens[0])
            tokens = np.argmax(self.backend.to_numpy(logits), axis=-1)[:, None].tolist()
            if n_done == 0:  # the first step computes the prompts
                started = time.perf_counter()
        return (time.perf_counter() - started) / N_BATCH_DECODE


class Limits:
    """The least time that the machine can take, measured with NumPy's BLAS."""

    def __init__(self, name, hparams, params):
        matrices = [array for path, array in flatten(params).items() if path[-1] == "w"]
        # A tall matrix is read faster in column order, and the NumPy backend converts large ones to it in the end.
        matrices = [np.asfortranarray(w) if w.shape[0] > w.shape[1] else w for w in matrices]
        self.products = [(np.ones((1, w.shape[0]), w.dtype), w) for w in (*matrices, params["wte"].T)]
        self.device = f"NumPy {np.__version__}"

    def decode(self, n_prompt):
        """A token needs each weight once, so it takes at least the product of one row with every matrix."""
        return timed(lambda: [x @ w for _ in range(N_DECODE) for x, w in self.products]) / N_DECODE

    def batch(self, n_rows):
        """The same, as the weights are read once for all sequences."""
        return self.decode(1)

    def prefill(self, n):
        """One product of [n, k] and [k, k] with as many multiplications as n tokens take in all matrices."""
        k = int(sum(w.size for _, w in self.products) ** 0.5)
        a, b = np.ones((n, k), np.float32), np.ones((k, k), np.float32)
        return timed(lambda: a @ b)

    one_product = prefill  # a name that no other engine has, for tools.curves to ask for this limit alone


def require_gpt2(name, hparams):
    if architecture(hparams) != "gpt2":
        raise ValueError(f"{name} is measured with a gpt2 alone: leave it out of --against")


class Peer:
    """A program that generates n tokens in one call, `generate(rows, n)`, which returns seconds.

    The time for one token is subtracted from the time for n + 1, so the prompt does not count.
    """

    def decode(self, n_prompt, n_rows=1, n=N_DECODE):
        rows = [prompt(self.hparams, n_prompt)] * n_rows
        return (self.generate(rows, n + 1) - self.generate(rows, 1)) / n

    def batch(self, n_rows):
        return self.decode(N_BATCH_PROMPT, n_rows, N_BATCH_DECODE)


class Transformers(Peer):
    def __init__(self, name, hparams, params):
        import torch
        import transformers

        self.torch, self.hparams = torch, hparams
        config = hf_config(hparams, end_of_text=None)  # without an end, no text ends early
        config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        self.model = transformers.AutoModelForCausalLM.from_config(config).eval()
        state = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in hf_tensors(hparams, params).items()}
        inner = self.model.transformer if architecture(hparams) == "gpt2" else self.model
        inner.load_state_dict(state, strict=False)
        self.device = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"

    def generate(self, rows, n):
        ids = self.torch.tensor(rows)
        with self.torch.inference_mode():
            return timed(lambda: self.model.generate(ids, do_sample=False, max_new_tokens=n))

    def prefill(self, n):
        ids = self.torch.tensor([prompt(self.hparams, n)])
        with self.torch.inference_mode():
            return timed(lambda: self.model(ids, use_cache=False).logits)


class CTranslate2(Peer):
    def __init__(self, name, hparams, params):
        import ctranslate2

        require_gpt2(name, hparams)
        self.hparams, self.tokens = hparams, [f"t{i}" for i in range(hparams["n_vocab"])]
        loader = ctranslate2.converters.transformers.GPT2Loader()
        spec = loader.get_model_spec(Transformers(name, hparams, params).model)
        spec.register_vocabulary(self.tokens)
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = self.tokens[-1]
        with tempfile.TemporaryDirectory() as folder:
            spec.validate()
            spec.save(folder)
            self.model = ctranslate2.Generator(folder, compute_type="float32", intra_threads=os.cpu_count())
        self.device = f"CTranslate2 {ctranslate2.__version__}"

    def words(self, rows):
        return [[self.tokens[i] for i in row] for row in rows]

    def generate(self, rows, n):
        words, options = self.words(rows), {"sampling_topk": 1, "include_prompt_in_result": False}
        return timed(lambda: self.model.generate_batch(words, max_length=n, min_length=n, **options))

    def prefill(self, n):
        words = self.words([prompt(self.hparams, n)])
        return timed(lambda: np.asarray(self.model.forward_batch(words)))


class PicogptStyle:
    """gpt2.generate, as the first readable GPT-2 did it: no cache, all tokens through the model for each new one."""

    device = "gpt2.generate"

    def __init__(self, name, hparams, params):
        require_gpt2(name, hparams)
        self.hparams, self.params = hparams, params

    def decode(self, n_prompt, n=2):
        ids = prompt(self.hparams, n_prompt)
        return timed(lambda: gpt2.generate(ids, self.params, self.hparams["n_head"], n)) / n


PEERS = {"transformers": Transformers, "ctranslate2": CTranslate2, "picogpt-style": PicogptStyle}
ENGINES = {"limits": Limits, **dict.fromkeys(backends.NAMES, Ours), **PEERS}


def installed(name):
    """Whether the package of an engine is there."""
    return name == "picogpt-style" or importlib.util.find_spec(name) is not None
