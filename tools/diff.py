"""Where do two ways of computing the same thing part? Layer by layer, against float64.

    python -m tools.diff "Once upon a time" --model_size 3M

runs the prompt through gpt2.py on NumPy and on JAX (operation by operation, and compiled) in float32, and on NumPy in
float64, which is taken for the truth. Each call of each layer function becomes a place, named by the calls around it:
`blocks[3].mha.attention.softmax`. Places are listed in the order in which they were finished, so the first one that is
beyond the tolerance is where the trouble begins.

Changed a line? `--save before.npz` first, and `--against before.npz` after: it shows where the change shows.

gpt2.py knows nothing of this: its functions are wrapped from outside for the time of one run.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import contextlib
import functools
import inspect
import sys
import zipfile
import zlib
from collections import Counter
from json import dumps
from string import ascii_lowercase

import numpy as np

import backends
import cli
import gpt2
import utils
from weights.params import cast, find_dtype, flatten

NO_LAYERS = ("gpt2", "generate", "check_inputs", "main")
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 0.1}  # of the largest number at a place, or of 1 if larger


def places_and_logits(params, ids, n_head, module=gpt2):
    """({place: what the layer function gave there}, logits): pure, so that it may be jitted like the model itself."""
    places, stack, calls = {}, [], Counter()
    owners = {id(leaf): path[-2] if path[1:] else "" for path, leaf in flatten(params).items()}

    def recorded(layer):
        @functools.wraps(layer)
        def call(*args, **kwargs):
            owner = next((owners[id(value)] for value in kwargs.values() if owners.get(id(value))), None)
            part = f"{layer.__name__}({owner})" if owner else layer.__name__
            if part == "transformer_block":
                part = f"blocks[{calls[part]}]"
                calls["transformer_block"] += 1
            stack.append(part)
            result = layer(*args, **kwargs)
            place = ".".join(stack)
            stack.pop()
            calls[place] += 1
            places[place if calls[place] == 1 else f"{place}#{calls[place]}"] = result
            return result

        return call

    with patched(module, {name: recorded(layer) for name, layer in layers_of(module).items()}):
        logits = module.gpt2(ids, **params, n_head=n_head)
    return places, logits


def layers_of(module):
    """{name: function} of all that a module defines, but for those that are no layer."""
    own = inspect.getmembers(module, lambda f: inspect.isfunction(f) and f.__module__ == module.__name__)
    return {name: f for name, f in own if name not in NO_LAYERS}


@contextlib.contextmanager
def patched(module, functions):
    before = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(before)


def record(params, ids, n_head, backend="numpy", dtype="float32", jit=False):
    """places_and_logits on a backend, in a dtype, its float32 products in full float32; the logits as a last place."""
    library = backends.get(backend)
    library.setup(dtype)
    params, ids = library.asarray((cast(params, dtype), np.asarray(ids, np.int32)))
    run = functools.partial(places_and_logits, n_head=n_head)
    with exact_products(backend):
        places, logits = library.to_numpy((library.jit(run) if jit else run)(params, ids))
    return places | {"logits": logits}


def exact_products(backend):
    """Accelerators multiply float32 with fewer digits unless told otherwise."""
    if backend == "numpy":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


def difference(a, b, truth=None):
    """{"abs", "rel"}: the largest difference, and that divided by the largest number in `truth` (b unless given)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        return {"abs": float("inf"), "rel": float("inf")}
    largest, scale = np.abs(a - b).max(initial=0), np.abs(b if truth is None else truth).max(initial=0)
    largest = float("inf") if np.isnan(largest) else float(largest)
    return {"abs": largest, "rel": largest / float(scale) if scale else largest}


def compare(truth, runs, tolerances):
    """One dict a place: its shape, each run's difference from the truth, that of the first run from each other, and
    whether all are within tolerance. A place that is not in all of them (the code was changed) is beyond it."""
    names, rows = list(runs), []
    for place in dict.fromkeys([*truth, *(place for run in runs.values() for place in run)]):
        present = [run[place] for run in (truth, *runs.values()) if place in run]
        row = {"place": place, "shape": list(np.shape(present[0])), "within": len(present) == 1 + len(runs)}
        if row["within"]:
            pairs = {name: (name, truth[place], tolerances[name]) for name in names}
            for other in names[1:]:
                pairs[f"{names[0]} - {other}"] = (
                    names[0],
                    runs[other][place],
                    max(tolerances[names[0]], tolerances[other]),
                )
            for label, (name, other, tolerance) in pairs.items():
                row[label] = difference(runs[name][place], other, truth[place])
                row["within"] &= row[label]["abs"] <= tolerance * max(1, float(np.abs(truth[place]).max(initial=0)))
        rows.append(row)
    return rows


def next_token(logits):
    """The likeliest token after the last position, and how far its logit is above that of the second."""
    last = np.asarray(logits, np.float64)[-1]
    second, first = np.argsort(last, kind="stable")[-2:]
    return {"id": int(np.argmax(last)), "gap": float(last[first] - last[second])}


def save_recording(path, places, ids, params):
    wide = {f"place {name}": array.astype(np.promote_types(array.dtype, np.float32)) for name, array in places.items()}
    with open(path, "wb") as file:
        np.savez_compressed(file, **wide, **identity(ids, params))


def load_recording(path, ids, params):
    """The places of a recording. Raises ValueError if it is none, or of another prompt or model."""
    try:
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file) as recording:
            found = {name: recording[name] for name in recording.files}
    except OSError as error:
        raise ValueError(f"--against {cli.one_line(error)}") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        raise ValueError(f"--against {path}: no recording, or a damaged one") from None
    for name, expected in identity(ids, params).items():
        if name not in found or not np.array_equal(found[name], expected):
            raise ValueError(
                f"--against {path}: a recording of another {name}, and only like can be compared with like"
            )
    return {name.removeprefix("place "): array for name, array in found.items() if name.startswith("place ")}


def identity(ids, params):
    sums = [zlib.crc32(np.ascontiguousarray(array)) for array in flatten(params).values()]
    return {"prompt": np.asarray(ids), "model": np.asarray(sums)}


def table(rows, names):
    """The lines of a table. Runs are lettered: five columns of long names would be wider than a screen."""
    letters = dict(zip(names, ascii_lowercase, strict=False))
    columns = letters | {f"{names[0]} - {name}": f"{letters[names[0]]} - {letters[name]}" for name in names[1:]}
    width = max(len(row["place"]) for row in rows)
    yield "max abs and max rel difference from NumPy float64, and of two runs from each other"
    yield from (f"  {letter}  {name}" for name, letter in letters.items())
    yield f"{'place':{width}} {'shape':>10}" + "".join(f"   {letter:^15}" for letter in columns.values())
    for row in rows:
        shape = ",".join(map(str, row["shape"]))
        numbers = (f"   {row[c]['abs']:.1e} {row[c]['rel']:.1e}" if c in row else f"   {'-':^15}" for c in columns)
        yield f"{row['place']:{width}} {shape:>10}{''.join(numbers)}{'' if row['within'] else '  <- beyond'}"


def report(rows, runs, encoder, tolerance):
    """The table, and below it the verdict."""
    yield from table(rows, [*runs])
    yield ""
    best = {name: next_token(run["logits"]) for name, run in runs.items()}
    for name, token in best.items():
        text = repr(encoder.decode([token["id"]])) if token["id"] in encoder.spellings else "(no token)"
        yield f"{name}: next token {token['id']} {text}, {token['gap']:.4f} ahead"
    yield f"the next token is {'the same' if len({token['id'] for token in best.values()}) == 1 else 'NOT THE SAME'}"
    beyond = [row["place"] for row in rows if not row["within"]]
    yield (
        f"beyond tolerance: {len(beyond)} of {len(rows)} places, the first is {beyond[0]}"
        if beyond
        else f"all {len(rows)} places are within tolerance, {tolerance:g} of the largest number there (or of 1)"
    )


def check(backend_a, dtype_a, backend_b, dtype_b, against):
    """Raises ValueError for what is unknown, and for a run b that a recording stands in for."""
    for dtype in (dtype_a, dtype_b):
        find_dtype(dtype)
    if against and (backend_b, dtype_b) != ("jax", "float32"):
        raise ValueError("--against stands in for run b: leave out --backend_b and --dtype_b")
    for backend in (backend_a,) if against else (backend_a, backend_b):
        backends.get(backend)


# fmt: off
def main(prompt: str = "Once upon a time", *, model_size: str = "3M", models_dir: str = "",
         backend_a: str = "numpy", dtype_a: str = "float32", backend_b: str = "jax", dtype_b: str = "float32",
         against: str = "", save: str = "", json: bool = False):
    # fmt: on
    """Where two runs of one prompt part, layer by layer. Exit status 1 if they do beyond rounding.

    Args:
        prompt: the text to run through the model
        model_size: 3M, 124M, 355M, 774M, 1558M or a model folder
        models_dir: where the folders of models are; left out, models/ of this repository
        backend_a: numpy or jax; jax runs twice, operation by operation and compiled ("jit")
        dtype_a: float32, bfloat16 or float64
        backend_b: as backend_a, for the run to compare with
        dtype_b: as dtype_a
        against: a recording (.npz) to compare with, in place of run b
        save: a file (.npz) to record the first run of a in
        json: print one JSON object in place of the table
    """
    check(backend_a, dtype_a, backend_b, dtype_b, against)
    encoder, hparams, params = utils.load_encoder_hparams_and_params(model_size, models_dir)
    ids = utils.first_ids(encoder, prompt)
    gpt2.check_inputs(ids, 0, hparams["n_vocab"], hparams["n_ctx"])
    other = {"recording": load_recording(against, ids, params)} if against else {}
    settings = {f"{backend_a} {dtype_a}": (backend_a, dtype_a)}
    settings |= {} if against else {f"{backend_b} {dtype_b}": (backend_b, dtype_b)}
    settings |= {f"{name} jit": (*setting, True) for name, setting in settings.items() if setting[0] == "jax"}
    runs = {name: record(params, ids, hparams["n_head"], *setting) for name, setting in settings.items()} | other
    if save:
        save_recording(save, next(iter(runs.values())), ids, params)
    truth = record(params, ids, hparams["n_head"], "numpy", "float64")
    tolerances = {name: TOLERANCE[settings.get(name, (None, dtype_a))[1]] for name in runs}
    rows = compare(truth, runs, tolerances)
    beyond = [row["place"] for row in rows if not row["within"]]
    if json:
        best = {name: next_token(run["logits"]) for name, run in runs.items()}
        found = {"places": rows, "first_beyond": beyond[0] if beyond else None, "next_token": best}
        print(dumps(found).replace("Infinity", "null"))  # JSON has no word for a shape that changed
    else:
        print("\n".join(report(rows, runs, encoder, max(tolerances.values()))))
    sys.exit(1 if beyond else 0)


if __name__ == "__main__":
    cli.run(main, "python -m tools.diff")
