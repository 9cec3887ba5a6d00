"""What test_sharding.py runs in a process of its own, whose JAX makes many devices of a CPU.

    python tests/on_devices.py '{"n_devices": 24, "tasks": [{"do": "infer", "meshes": ["model=2"], ...}]}'

Prints, as the last line, the results of the tasks as JSON.
"""

import functools
import json
import os
import re
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
TASK = json.loads(sys.argv[1])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={TASK['n_devices']}"

import jax  # noqa: E402, the settings come first
import numpy as np  # noqa: E402

import backends  # noqa: E402
import utils  # noqa: E402
from backends import sharding  # noqa: E402
from inference import batching, model  # noqa: E402
from inference.generate import Sequence  # noqa: E402
from training import data, optimizer, step  # noqa: E402
from training.model import forward_of  # noqa: E402
from variants import llama  # noqa: E402
from weights.params import cast, flatten, tree_map  # noqa: E402

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(compiled):
    """{operation: how often it is in the program} of those that move data between devices and do not move scalars."""
    text = compiled.as_text()
    counts = {}
    for name in COLLECTIVES:
        lines = re.findall(rf"^.* = (.*?) {name}(?:-start)?\(", text, flags=re.MULTILINE)
        counts[name] = sum(re.search(r"\[\d", line) is not None for line in lines)
    return {name: n for name, n in counts.items() if n}


def train(mesh, params, ids, hparams, n_steps, batch_size, n_ctx, dtype):
    """What a mesh computes, "" for one device without one."""
    library = sharding.Backend(sharding.make_mesh(mesh), params, hparams) if mesh else backends.get("jax")
    state = optimizer.init_state(tree_map(backends.np.array, library.asarray(params)))
    loss_of = step.make_loss(library, forward_of(library.own(hparams)), 0.1, dtype)
    micro_batch_size = max(1, batch_size // library.N_DATA // 2)
    train_step = step.make_step(library, loss_of, micro_batch_size, seed=0, clip=0.5)
    losses, program = [], None
    for n_done in range(n_steps):
        read = functools.partial(data.draw, ids, n_ctx, batch_size, 0, n_done)
        arguments = state, library.rows(read, (batch_size, n_ctx + 1)), n_done, 2e-3
        program = program or train_step.lower(*arguments).compile()
        state, loss = program(*arguments)
        losses.append(float(loss))
    mean_loss = step.make_mean_loss(library, forward_of(library.own(hparams)), micro_batch_size)
    losses.append(mean_loss(state["params"], data.consecutive(ids, n_ctx, 13)))
    cut = [leaf for leaf in jax.tree.leaves(state) if not leaf.is_fully_replicated]
    whole, part = sum(leaf.nbytes for leaf in cut), sum(leaf.addressable_shards[0].data.nbytes for leaf in cut)
    found = {"losses": losses, "collectives": collectives(program), "n_cut": len(cut), "share": part / (whole or 1)}
    return found, library.to_numpy(state["params"])


def compare_training(task):
    """{mesh: what it computed}, with the largest difference of a parameter from one device's, key biases left out."""
    dtype = task["dtype"]
    backends.get("jax").setup(dtype)
    rng = np.random.default_rng(0)
    if task["model"]:
        encoder, hparams, params = utils.load_encoder_hparams_and_params(task["model"])
        ids = np.array(data.tokenize([Path("tests/stories.txt").read_text(encoding="utf-8")], encoder), np.uint16)
    else:
        hparams, ids = task["hparams"], rng.integers(0, task["hparams"]["n_vocab"], 500).astype(np.uint16)
        params = step.init_params(hparams, seed=0)
    params, results = cast(params, dtype), {}
    sizes = (hparams, task["n_steps"], task["batch_size"], task["n_ctx"], dtype)
    expected, reference = train("", params, ids, *sizes)
    for mesh in task["meshes"]:
        found, trained = train(mesh, params, ids, *sizes)
        found["loss"] = max(abs(a / b - 1) for a, b in zip(found["losses"], expected["losses"], strict=True))
        found["params"] = max(
            difference(path, leaf, flatten(trained)[path]) for path, leaf in flatten(reference).items()
        )
        results[mesh] = found
    return results


def difference(path, a, b):
    """The largest difference of two arrays, as a part of the largest number there."""
    assert a.shape == b.shape
    if path[-2:] == ("c_attn", "b"):  # the gradient of a key's bias is zero but for rounding, which Adam makes large
        (q, _, v), (q_b, _, v_b) = np.split(a, 3), np.split(b, 3)
        a, b = np.concatenate([q, v]), np.concatenate([q_b, v_b])
    return float(np.abs(a - b).max() / np.abs(a).max())


def load(source, mesh):
    """(tokenizer, Model) of a folder; (None, Model) of one without a tokenizer, or of hparams, with random params."""
    if isinstance(source, str) and utils.has_tokenizer(Path(source)):
        return model.load(source, backend="jax", mesh=mesh)
    _, hparams, params = llama.load(source) if isinstance(source, str) else (0, source, step.init_params(source, 0))
    if mesh:
        m = model.make_model(params, hparams, backends.get("numpy"))
        return None, sharding.spread(m, model.module_of(hparams).forward, sharding.make_mesh(mesh))
    return None, model.make_model(backends.get("jax").prepare(params), hparams, backends.get("jax"))


def infer(source, mesh):
    """Logits after a prompt and after one more token, greedy ids of one text, those of three texts at once."""
    tokenizer, m = load(source, mesh)
    prompt = [i % m.n_vocab for i in range(3, 19)]
    cache = model.init_cache(m, 30)
    program = m.forward.lower(m.params, np.array(prompt, np.int32), cache, 0, len(prompt) - 1).compile()
    first, cache = model.step(m, prompt, cache, 0)
    second, cache = model.step(m, [7], cache, len(prompt))
    batch = [Sequence(tokenizer, prompt[: 5 + i], 6) for i in range(3 if tokenizer else 0)]
    batching.generate_batch(m, batch)
    ids = [list(model.greedy(m, prompt, 8)), *(sequence.new_ids for sequence in batch)]
    n_head = cache[0][0].addressable_shards[0].data.shape[0]
    return np.stack([first, second]), ids, {"heads": n_head, "collectives": collectives(program)}


def compare_inference(task):
    results = {}
    for name, source in task["models"].items():
        logits, ids, _ = infer(source, "")
        for mesh in task["meshes"]:
            found_logits, found_ids, found = infer(source, mesh)
            found["logits"] = float(np.abs(found_logits - logits).max())
            results[f"{name} {mesh}"] = found | {"same ids": found_ids == ids}
    return results


if __name__ == "__main__":
    backends.get("jax").setup()  # keeps compiled programs on disk
    warnings.simplefilter("error")  # JAX warns of a donated cache that it cannot use
    print(json.dumps([{"train": compare_training, "infer": compare_inference}[t["do"]](t) for t in TASK["tasks"]]))
