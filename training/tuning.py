"""What all fine-tuning here shares: which parameters are trained, the batches, and the loop that keeps the best ones.

    head          only the new output layer of a classifier
    last_block    the last block, the last layer norm and the new output layer
    all           everything
    lora          two small matrices beside each matrix, and the new output layer       } lora.py
    adapters      two small networks in each block, and the new output layer            }

Each is a regular expression: a parameter in whose name it is found is trained, the others are frozen. Why train less
than everything: fewer gradients and averages to compute and keep, a small file for each task, and less to learn a few
hundred texts by heart with.
"""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np

import backends
from training import lora, optimizer
from training import step as step_library
from weights.params import tree_map

METHODS = ("head", "last_block", "all", "lora", "adapters")


def pattern_of(method, n_layer):
    """The regular expression for the names of what a method trains."""
    return {
        "head": r"^cls_head",
        "last_block": rf"^blocks\.{n_layer - 1}\.|^ln_f|^cls_head",
        "all": ".",
        "lora": r"\.lora_[ab]$|^cls_head",
        "adapters": r"\.adapter\.|^cls_head",
    }[method]


def add_parameters(params, s):
    """(params with the leaves that the method of settings s adds, the scale of LoRA)."""
    if s.train == "lora":
        return lora.add_lora(params, s.lora, s.rank, s.seed), s.alpha / s.rank
    return (lora.add_adapters(params, s.adapter_size, s.seed) if s.train == "adapters" else params), 1.0


def choose(library, params, s):
    """What step.freeze returns, by the settings s; a new output layer is always trained."""
    if s.train_only:
        step_library.split(params, s.train_only)  # raises ValueError if it matches nothing
    pattern = f"{s.train_only}|^cls_head" if s.train_only else pattern_of(s.train, len(params["blocks"]))
    return step_library.freeze(library, params, pattern)


# ---- Settings ----


def prepare(s, defaults, methods):
    """Checks the settings s and fills in what was left out: alpha, and the number of epochs and the learning rate, by
    `defaults`, {method: (epochs, rate)}. Returns the backend. Raises ValueError for a value out of range."""
    for wrong, message in faults(s, methods):
        if wrong:
            raise ValueError(message)
    n_epochs, rate = defaults[s.train]
    s.n_epochs, s.learning_rate, s.alpha = s.n_epochs or n_epochs, s.learning_rate or rate, s.alpha or 2 * s.rank
    library = backends.get(s.backend or ("jax" if importlib.util.find_spec("jax") else "numpy"))
    print(library.setup(), file=sys.stderr)
    return library


def faults(s, methods):
    """Pairs (whether settings s have this fault, its message)."""
    yield not s.data, "name the file with the examples"
    yield Path(s.out).exists(), f"{s.out} is there already: delete it, or name another folder with --out"
    yield s.train not in methods, f"--train {s.train!r}: choose {', '.join(methods)}"
    for name in ("n_epochs", "batch_size", "rank", "adapter_size"):
        yield getattr(s, name, 1) == 0, f"--{name} 0 is out of range: 1 or more"
    for name in ("learning_rate", "alpha"):
        value = getattr(s, name)
        yield value is not None and not 0 < value < math.inf, f"--{name} {value} is out of range: above 0"
    yield not 0 <= s.weight_decay < math.inf, f"--weight_decay {s.weight_decay} is out of range: 0 (off) or more"
    yield not 0 <= s.dropout < 1, f"--dropout {s.dropout} is out of range: 0 (off) to less than 1"
    yield s.train_only and s.train != "all", "--train_only and --train both choose what is trained: give one"
    for name in ("lora", "rank", "alpha"):
        given = getattr(s, name) != DEFAULTS[name]
        yield given and s.train != "lora", f"--{name} has no effect without --train lora"
    yield s.seed >= 2**32, f"--seed {s.seed} is out of range: 0 to {2**32 - 1}"


DEFAULTS = {"lora": "c_", "rank": 8, "alpha": None}


# ---- Batches ----


def bucket(n, n_ctx):
    """The length to which a batch whose longest text has n tokens is padded: 64, 128, 256, ... Few lengths, as JAX
    compiles a program for each, which takes as long as many batches."""
    return min(n_ctx, max(64, 1 << (n - 1).bit_length()))


def pad(rows, n):
    """Lists of ids -> [n_rows, n], padded on the right with 0. Attention is causal, so no token sees the padding."""
    padded = np.zeros((len(rows), n), np.int32)
    for place, ids in zip(padded, rows, strict=True):
        place[: len(ids)] = ids
    return padded


def groups(order, n):
    """A list of numbers in lists of n; the last one is filled up with -1, so that all batches have the same shape."""
    order = [*order, *[-1] * (-len(order) % n)]
    return [order[i : i + n] for i in range(0, len(order), n)]


def shuffled(lengths, batch_size, seed, epoch):
    """The batches of an epoch, as lists of numbers of texts with these lengths, at random by seed and epoch. Every 64
    texts or so are sorted by length before they are cut into batches, which halves the padding."""
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths)).tolist()
    blocks = groups(order, 4 * batch_size)
    order = [i for block in blocks for i in sorted((i for i in block if i >= 0), key=lambda i: lengths[i])]
    return groups(order, batch_size)


# ---- The loop ----


def tune(library, loss_of, trainable, frozen, batches, s, evaluate, save):
    """Trains for s.n_epochs and returns the best evaluation.

    loss_of is what make_step of step.py takes, batches(epoch) the list of batches of an epoch. evaluate(params) returns
    a dict with "score": the higher, the better. After each epoch whose score is the highest so far, `save(trainable,
    evaluation)` is called with NumPy's arrays. Raises ValueError if a loss is NaN or infinite.
    """
    from tqdm import tqdm

    state = optimizer.init_state(tree_map(backends.np.array, library.asarray(trainable)))  # copies: JAX overwrites them
    n_micro = math.gcd(s.batch_size, 4)
    step = step_library.make_step(library, loss_of, n_micro, s.seed, weight_decay=s.weight_decay)
    n_done, best = 0, {"score": -math.inf}
    for epoch in range(1, s.n_epochs + 1):
        losses, todo = [], batches(epoch)
        for batch in tqdm(todo, unit="step", desc=f"epoch {epoch}", leave=False, disable=None):
            rate = optimizer.learning_rate(n_done, s.learning_rate, 10, s.n_epochs * len(todo))
            state, loss = step(state, batch, n_done, rate, *frozen)
            n_done += 1
            losses.append(float(loss))
        if not math.isfinite(sum(losses)):
            raise ValueError(
                f"the loss is not finite in epoch {epoch}: choose a --learning_rate below {s.learning_rate:g}"
            )
        found = {
            "epoch": epoch,
            "loss": float(np.mean(losses)),
            **evaluate(step_library.join(state["params"], *frozen)),
        }
        better = found["score"] > best["score"]
        shown = "".join(f"  {name} {value:.4f}" for name, value in found.items() if name not in ("epoch", "score"))
        print(f"epoch {epoch:3}{shown}{'  *' * better}", file=sys.stderr)
        if better:
            best = found
            save(library.to_numpy(state["params"]), found)
    return best
