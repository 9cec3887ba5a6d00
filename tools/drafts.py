"""How much speculative decoding gains: measured on prompts, or computed from the time of a pass.

    python -m tools.drafts smollm2                        drafts from the text itself (--draft lookup)
    python -m tools.drafts 3M --draft_model models/mine --prompts tests/performance/stories.txt
    python -m tools.drafts 1558M --draft_model 124M --random

The first two continue each prompt of a file greedily, with and without drafts, in turn, round after round. The texts
must be the same. A file of prompts has a line ==== between them, and the first line of each says of what kind it is.

The third needs no files, as it takes random weights. It measures the time of a pass of one row and of more rows, and of
a guess of the draft model. From these follows the gain for each rate at which guesses are accepted, and the rate at
which it begins.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

import backends
import cli
import utils
from inference import chat, generate, speculative
from inference import model as models
from inference.generate import Sequence
from tools.bench import HPARAMS, check, machine
from tools.tables import markdown
from training.step import init_params
from weights.files import read_text

N_TOKENS = 160  # new tokens of each prompt, at most
N_WARM = 25  # passes that are not counted: JAX compiles, and NumPy changes the order of matrices in memory
RATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# ---- On prompts ----


def read_prompts(path):
    """[(kind, prompt), ...] of a file of prompts."""
    parts = (part.strip().partition("\n") for part in read_text(path).split("====\n"))
    return [(kind, prompt) for kind, _, prompt in parts]


def encoder_of(model_size, models_dir, tokenizer):
    """The function that makes ids of a prompt: a message for a chat model, the beginning of a text for others."""
    try:
        template = chat.load_template(utils.find_model(model_size, models_dir))
    except ValueError:
        return tokenizer.encode
    return lambda prompt: template.encode(tokenizer, chat.as_messages(prompt, ""))


def timed(pieces):
    """The seconds of a text without its first token, which takes the time of the prompt."""
    next(pieces)
    started = time.perf_counter()
    for _ in pieces:
        pass
    return time.perf_counter() - started


def measure_prompt(model, tokenizer, ids, new_drafter, rounds):
    """What a row of the table shows, for one prompt: medians over the rounds, without the first one, in which JAX
    compiles."""
    n_new, seconds = min(N_TOKENS, model.n_ctx - len(ids)), []
    for _ in range(1 + rounds):
        plain, drafted, drafter = *(Sequence(tokenizer, ids, n_new, end_ids=model.end_ids) for _ in "12"), new_drafter()
        without = timed(generate.generate(model, plain))
        seconds.append((without, timed(speculative.generate(model, drafted, drafter))))
        assert plain.ids == drafted.ids, "drafts have changed the text"
    n_tokens = len(plain.new_ids) - 1
    without, drafts = (n_tokens / statistics.median(column) for column in zip(*seconds[1:], strict=True))
    gain = statistics.median(a / b for a, b in seconds[1:])
    accepted = statistics.mean(drafter.accepted_per_step[1:])
    return {"tokens": n_tokens, "accepted per step": accepted, "tokens/s": without, "with drafts": drafts, "gain": gain}


def prompts_report(library, model_size, models_dir, draft_model, prompts, rounds):
    """Yields the lines of the table of one backend, with a mean for each kind of prompt."""
    tokenizer, model = models.load(model_size, models_dir, None, library)
    encode, new_drafter = encoder_of(model_size, models_dir, tokenizer), speculative.Lookup
    if draft_model:
        where = draft_model, models_dir, None, library

        def new_drafter():
            return speculative.load_draft_model(tokenizer, model, None, *where)

    rows, gains = {}, defaultdict(list)
    for i, (kind, prompt) in enumerate(prompts, 1):
        row = measure_prompt(model, tokenizer, encode(prompt), new_drafter, rounds)
        gains[kind].append(row["gain"])
        rows[f"{i}. {kind}"] = {name: str(v) if name == "tokens" else f"{v:.2f}" for name, v in row.items()}
    rows |= {f"mean: {kind}": {"gain": f"{statistics.mean(some):.2f}"} for kind, some in gains.items()}
    yield from markdown(library, rows)


# ---- From the time of a pass ----


def random_model(size, library):
    params = library.prepare(init_params(HPARAMS[size], seed=0))
    return models.make_model(params, HPARAMS[size], library)


def pass_seconds(model, n_rows, cache, rounds):
    """(the median time of a pass of n_rows rows, cache)"""
    tokens, seconds = list(range(n_rows)), []
    for _ in range(N_WARM + rounds):
        started = time.perf_counter()
        _, cache = speculative.verify(model, tokens, cache, 64, n_rows)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[N_WARM:]), cache


def costs_report(name, model_size, draft_size, rounds):
    """Yields the lines of the table of one backend."""
    library, cache = backends.get(name), None
    draft_model = random_model(draft_size, library)
    guess, _ = pass_seconds(draft_model, 1, models.init_cache(draft_model, 100), rounds)
    del draft_model
    model, passes = random_model(model_size, library), {}
    cache = models.init_cache(model, 100)
    for n_rows in library.ROW_COSTS:
        passes[n_rows], cache = pass_seconds(model, n_rows, cache, rounds)
    shown = ", ".join(f"{n} rows {1000 * t:.0f} ms ({t / passes[1]:.2f})" for n, t in passes.items())
    yield f"{name}: a pass of {shown}; a guess {1000 * guess:.0f} ms ({guess / passes[1]:.2f})"
    costs = {n: t + n * guess for n, t in passes.items() if n > 1}
    gains = {rate: gain(rate, costs, passes[1]) for rate in (*RATES, *np.arange(0.01, 1, 0.01))}
    yield from markdown("guesses accepted", {"gain": {f"{rate:.0%}": f"{gains[rate]:.2f}" for rate in RATES}})
    yield f"drafts pay from {min((rate for rate in gains if gains[rate] > 1), default=1):.0%} on"


def gain(rate, costs, one):
    """How many times as fast as without drafts a text is, with the best number of rows: costs is {rows: seconds of a
    pass and its guesses}, `one` the seconds of a pass of one row."""
    return max(speculative.expected_tokens(rate, n_rows) * one / seconds for n_rows, seconds in costs.items())


# ---- The command ----


# fmt: off
def main(model_size: str = "smollm2", *, models_dir: str = "", draft_model: str = "", random: bool = False,
         prompts: str = "tests/performance/copying.txt", backend: str = "", rounds: int = 5):
    # fmt: on
    """Measures how many times as fast a text is generated with drafts as without.

    Args:
        model_size: a model as for gpt2.py; with --random one of 3M, 124M, 355M, 774M, 1558M
        models_dir: where the folders of models are; left out: models/ of this repository
        draft_model: the model that guesses tokens; left out: the text itself
        random: compute the gain from the times of both models, with random weights
        prompts: the file of prompts
        backend: numpy or jax; left out: both
        rounds: how many times each is measured; take 5 or more for a reliable median
    """
    check(rounds, "")
    if random and not {model_size, draft_model} <= HPARAMS.keys():
        raise ValueError(f"--random: choose the model and --draft_model from {', '.join(HPARAMS)}")
    found = None if random else read_prompts(Path(prompts))
    print(machine())
    for name in [backend] if backend else backends.NAMES:
        print(backends.get(name).setup())
        if random:
            lines = costs_report(name, model_size, draft_model, rounds)
        else:
            lines = prompts_report(name, model_size, models_dir, draft_model, found, rounds)
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    cli.run(main, "-m tools.drafts")
