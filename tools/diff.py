"""Compares two ways of computing the same logits, layer by layer, with NumPy in float64 as the reference.

    python -m tools.diff "Once upon a time" --model_size 3M

runs the prompt through gpt2.py on NumPy and on JAX (operation by operation, and compiled) in float32, and on NumPy in
float64. Each call of a layer function is a place, named by the calls around it: `blocks[3].mha.attention.softmax`.
Places are listed in the order in which the calls returned, so the first one beyond the tolerance is where the error
begins.

To see what a change in the code does: run with `--save before.npz` first, change it, run with `--against before.npz`.

The models have no code for this: their functions are replaced by recording ones for the time of a run.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import contextlib
import functools
import inspect
import itertools
import sys
import zipfile
import zlib
from collections import Counter
from json import dumps
from string import ascii_lowercase
from unittest import mock

import numpy as np

import backends
import cli
import gpt2
import utils
from inference import kv_cache
from variants import llama
from weights.params import architecture, cast, find_dtype, flatten

MODULES = {"gpt2": [gpt2], "llama": [llama, gpt2, kv_cache]}  # where the layer functions of an architecture are
# The other functions in there.
NO_LAYERS = {  # the other functions in there
    *("gpt2", "generate", "check_inputs", "main", "llama", "frequencies", "rotations", "whole", "queries_keys_values"),
    *("init_cache", "cached_gqa", "cached_block", "forward", "make_model", "load", "causal_mask", "extend"),
}
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 0.1}  # of the largest number at a place, or of 1 if larger

# ---- Recording a run ----


def places_and_logits(params, ids, hparams):
    """({place: what the layer function returned}, logits). Pure, so jit can compile it like the model itself."""
    places, stack, calls, n_block = {}, [], Counter(), itertools.count()
    # {id of a weight or bias: the name of its layer}. A call of linear with the weights of c_fc is linear(c_fc).
    owners = {id(leaf): path[-2] for path, leaf in flatten(params).items() if path[1:]}

    def recorded(layer):
        @functools.wraps(layer)
        def call(*args, **kwargs):
            owner = next((f"({owners[id(value)]})" for value in kwargs.values() if id(value) in owners), "")
            is_block = layer.__name__ == "transformer_block"
            stack.append(f"blocks[{next(n_block)}]" if is_block else layer.__name__ + owner)
            result, place = layer(*args, **kwargs), ".".join(stack)
            stack.pop()
            calls[place] += 1
            places[f"{place}#{calls[place]}" if calls[place] > 1 else place] = result
            return result

        return call

    name = architecture(hparams)
    layers = {layer: recorded(layer) for module in MODULES[name] for layer in layers_of(module).values()}
    with contextlib.ExitStack() as stacked:
        for module in MODULES[name]:  # a function that was imported from another module has a name in both
            found = {key: layers[f] for key, f in vars(module).items() if inspect.isfunction(f) and f in layers}
            stacked.enter_context(mock.patch.multiple(module, **found))
        if name == "llama":
            return places, llama.llama(ids, **params, config=hparams)
        return places, gpt2.gpt2(ids, **params, n_head=hparams["n_head"])


def layers_of(module):
    """{name: function} of the layer functions that a module defines."""
    own = inspect.getmembers(module, lambda f: inspect.isfunction(f) and f.__module__ == module.__name__)
    return {name: f for name, f in own if name not in NO_LAYERS}


def record(params, ids, hparams, backend="numpy", dtype="float32", jit=False):
    """{place: NumPy array} of a run on a backend, in a dtype; the logits are the last place."""
    library = backends.get(backend)
    library.setup(dtype)
    params, ids = library.asarray((cast(params, dtype), np.asarray(ids, np.int32)))
    run = functools.partial(places_and_logits, hparams=hparams)
    with exact_products(backend):
        places, logits = library.to_numpy((library.jit(run) if jit else run)(params, ids))
    return places | {"logits": logits}


def exact_products(backend):
    """Within it JAX multiplies float32 in full precision. By default accelerators use fewer digits."""
    if backend == "numpy":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


# ---- Recordings in files ----


def save_recording(path, places, ids, params):
    wide = {f"place {name}": array.astype(np.promote_types(array.dtype, np.float32)) for name, array in places.items()}
    with open(path, "wb") as file:  # given a name, NumPy would append .npz to it
        np.savez_compressed(file, **wide, **identity(ids, params))


def load_recording(path, ids, params):
    """The places of a recording. Raises ValueError if it is damaged, or of another prompt or model."""
    try:
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file) as recording:
            found = dict(recording)
    except OSError as error:
        raise ValueError(f"--against {cli.one_line(error)}") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        raise ValueError(f"--against {path}: no recording, or a damaged one") from None
    for name, expected in identity(ids, params).items():
        if not np.array_equal(found.pop(name, None), expected):
            raise ValueError(f"--against {path}: a recording of another {name}, so the two cannot be compared")
    return {name.removeprefix("place "): array for name, array in found.items()}


def identity(ids, params):
    """What a recording says about the prompt and the model that it is of."""
    return {"prompt": ids, "model": [zlib.crc32(np.ascontiguousarray(leaf)) for leaf in flatten(params).values()]}


# ---- Comparing ----


def compared(names):
    """{label: (run, run)}: each run with the reference, whose name is "", then the first run with each other."""
    first, *others = names
    return {name: (name, "") for name in names} | {f"{first} - {other}": (first, other) for other in others}


def compare(truth, runs, tolerances):
    """One dict for each place: its shape, the difference under each label of compared(runs), and whether all of them
    are within tolerance. A place that is not in all runs, because the code was changed, is not."""
    rows, runs = [], {"": truth, **runs}
    for place in dict.fromkeys(itertools.chain(*runs.values())):
        found = {name: run[place] for name, run in runs.items() if place in run}
        row = {"place": place, "shape": list(next(iter(found.values())).shape), "within": len(found) == len(runs)}
        if row["within"]:
            scale = float(np.abs(truth[place]).max(initial=0))
            for label, (a, b) in compared([*runs][1:]).items():
                row[label] = difference(found[a], found[b], scale)
                row["within"] &= row[label]["abs"] <= max(tolerances[a], tolerances.get(b, 0)) * max(1, scale)
        rows.append(row)
    return rows


def difference(a, b, scale):
    """{"abs": the largest absolute difference, "rel": the same divided by `scale`}; infinite for NaN, and for arrays
    of different shapes."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    largest = float(np.abs(a - b).max(initial=0)) if a.shape == b.shape else np.inf
    largest = np.inf if np.isnan(largest) else largest
    return {"abs": largest, "rel": largest / scale if scale else largest}


def next_token(logits):
    """The likeliest token after the last position, and how far its logit is above that of the second."""
    last = np.asarray(logits, np.float64)[-1]
    second, first = np.sort(last)[-2:]
    return {"id": int(np.argmax(last)), "gap": float(first - second)}


# ---- The command ----


def table(rows, names):
    """The lines of a table. Runs are lettered, as five columns of long names would be wider than a screen."""
    letters = dict(zip(names, ascii_lowercase, strict=False)) | {"": ""}
    columns = {label: " - ".join(filter(None, (letters[a], letters[b]))) for label, (a, b) in compared(names).items()}
    width = max(len(row["place"]) for row in rows)
    yield "max abs and max rel difference from NumPy float64, and of two runs from each other"
    yield from (f"  {letters[name]}  {name}" for name in names)
    yield f"{'place':{width}} {'shape':>10}" + "".join(f"   {letter:^15}" for letter in columns.values())
    for row in rows:
        shape = ",".join(map(str, row["shape"]))
        numbers = (f"   {row[c]['abs']:.1e} {row[c]['rel']:.1e}" if c in row else f"   {'-':^15}" for c in columns)
        yield f"{row['place']:{width}} {shape:>10}{''.join(numbers)}{'' if row['within'] else '  <- beyond'}"


def report(found, encoder, tolerance):
    """The lines that are printed without --json."""
    rows, tokens = found["places"], found["next_token"]
    yield from table(rows, [*tokens])
    yield ""
    for name, token in tokens.items():
        text = repr(encoder.decode([token["id"]])) if token["id"] in encoder.spellings else "(no token)"
        yield f"{name}: next token {token['id']} {text}, {token['gap']:.4f} ahead"
    yield f"the next token is {'the same' if len({token['id'] for token in tokens.values()}) == 1 else 'NOT THE SAME'}"
    if found["first_beyond"]:
        n_beyond = sum(not row["within"] for row in rows)
        yield f"beyond tolerance: {n_beyond} of {len(rows)} places, the first is {found['first_beyond']}"
    else:
        yield f"all {len(rows)} places are within tolerance, {tolerance:g} of the largest number there (or of 1)"


# fmt: off
def main(prompt: str = "Once upon a time", *, model_size: str = "3M", models_dir: str = "",
         backend_a: str = "numpy", dtype_a: str = "float32", backend_b: str = "jax", dtype_b: str = "float32",
         against: str = "", save: str = "", json: bool = False):
    # fmt: on
    """Compares two runs of one prompt, layer by layer. Exit status 1 if they differ by more than rounding.

    Args:
        prompt: the text to run through the model
        model_size: 3M, 124M, 355M, 774M, 1558M or a model folder
        models_dir: where the folders of models are; left out, models/ of this repository
        backend_a: numpy or jax; jax runs twice, operation by operation and compiled ("jit")
        dtype_a: float32, bfloat16 or float64
        backend_b: as backend_a, for the run to compare with
        dtype_b: as dtype_a
        against: a recording (.npz) to compare with, instead of run b
        save: a file (.npz) to record the first run of a in
        json: print one JSON object instead of the table
    """
    for dtype in (dtype_a, dtype_b):
        find_dtype(dtype)
    if against and (backend_b, dtype_b) != ("jax", "float32"):
        raise ValueError("--against stands in for run b: leave out --backend_b and --dtype_b")
    settings = {f"{backend_a} {dtype_a}": (backend_a, dtype_a)}
    settings |= {} if against else {f"{backend_b} {dtype_b}": (backend_b, dtype_b)}
    settings |= {f"{name} jit": (*setting, True) for name, setting in settings.items() if setting[0] == "jax"}
    encoder, hparams, params = utils.load_encoder_hparams_and_params(model_size, models_dir)
    ids = utils.first_ids(encoder, prompt)
    gpt2.check_inputs(ids, 0, hparams["n_vocab"], hparams["n_ctx"])
    other = {"recording": load_recording(against, ids, params)} if against else {}
    runs = {name: record(params, ids, hparams, *setting) for name, setting in settings.items()} | other
    if save:
        save_recording(save, next(iter(runs.values())), ids, params)
    tolerances = {name: TOLERANCE[settings.get(name, (None, dtype_a))[1]] for name in runs}
    rows = compare(record(params, ids, hparams, "numpy", "float64"), runs, tolerances)
    first_beyond = next((row["place"] for row in rows if not row["within"]), None)
    tokens = {name: next_token(run["logits"]) for name, run in runs.items()}
    found = {"places": rows, "first_beyond": first_beyond, "next_token": tokens}
    if json:
        print(dumps(found).replace("Infinity", "null"))  # JSON has no infinity
    else:
        print("\n".join(report(found, encoder, max(tolerances.values()))))
    sys.exit(1 if first_beyond else 0)


if __name__ == "__main__":
    cli.run(main, "-m tools.diff")
