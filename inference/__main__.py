"""The front door: from a command line to text. `python gpt2.py` and `python -m inference` are both this program."""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import inspect
import json as json_library
import sys
import time
from types import SimpleNamespace

import backends
import checkpoint
import cli
import utils
from encoder import read_text
from gpt2 import check_inputs
from inference import batching, beam, kv_cache, sampling
from inference.stream import Row, stream
from tools import trace

STOPPING = {"false": False, "true": True, "never": "never"}


# fmt: off
def main(prompt: str = "", *, n_tokens_to_generate: int = 40, model_size: str = "", models_dir: str = "",
         base_url: str = "", backend: str = "numpy", dtype: str = "float32", prompt_file: str = "",
         temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None,
         repetition_penalty: float = 1.0, min_new_tokens: int = 0, bad_words: list = (),
         stop: list = (), stop_at_eos: bool | None = None, overflow: str = "error",
         num_samples: int = 1, batch: bool = False, num_beams: int = 1, length_penalty: float = 1.0,
         early_stopping: str = "false", json: bool = False, trace: int = 0):
    # fmt: on
    """GPT-2 goes on with your text. The new text alone goes to stdout, as it comes; all else to stderr.

    Args:
        prompt: the text to go on with; without one the model begins a text of its own
        n_tokens_to_generate: how many tokens (words or parts of words) to add, 0 to n_ctx less the prompt's
        model_size: 124M, 355M, 774M, 1558M, 3M or a model folder; left out: 124M if it can be had, else 3M
        models_dir: where the folders of models are; left out: models/ beside gpt2.py
        base_url: where to download from; left out: the environment's GPT2_BASE_URL, or OpenAI's address
        backend: numpy, or jax (compiled, and on an accelerator if there is one)
        dtype: float32, bfloat16 (half the memory, 2 to 3 digits) or float64
        prompt_file: a UTF-8 file with the prompt, - for stdin
        temperature: 0 takes the likeliest token each time; above, the higher the more daring; 1: as the model is
        top_k: draw from the k likeliest tokens only; 0: from all
        top_p: draw from the fewest tokens that have this probability together, above 0; 1: from all
        seed: the same seed draws the same text, 0 or more; left out: another one each time
        repetition_penalty: above 1, what has been said becomes less likely; 0.01 to 100; 1: off
        min_new_tokens: do not write <|endoftext|> before there are so many; 0: off
        bad_words: a word not to write, with a space before it or without; may be given several times
        stop: end where this text is written, and leave it out; may be given several times
        stop_at_eos: end at <|endoftext|>; left out: yes, but for OpenAI's models
        overflow: error, or slide: past n_ctx go on from the last n_ctx/2 tokens
        num_samples: so many continuations of one prompt, 1 to 1024, the i-th (from 0) with seed + i
        batch: a prompt on each line of the prompt_file, all at once
        num_beams: search the likeliest text with so many beams, up to 1024, not token by token; 1: off
        length_penalty: for beams, -10 to 10: above 0 favours long texts; 1: the mean log-probability
        early_stopping: for beams: false, true or never: when enough have ended (inference/beam.py)
        json: a JSON object a line: prompt, text, token_ids, log_probabilities (score), stop_reason, seconds
        trace: show so many candidates for each token on stderr, up to 20; 0: off
    """
    flags = SimpleNamespace(**locals())
    check(flags)
    checkpoint.find_dtype(dtype)
    device = backends.get(backend).start(dtype)
    prompts = read_prompts(flags)
    encoder, hparams, params = utils.load_model(model_size, models_dir, base_url)
    rows = [make_row(flags, encoder, hparams, prompt, i) for i, prompt in enumerate(prompts)]
    if any(prompt.endswith(" ") for prompt in prompts):
        print("hint: a prompt ends in a space; tokens begin with theirs, so leave it away", file=sys.stderr)
    if backend != "numpy":
        print(device, file=sys.stderr)
    params = checkpoint.cast(params, dtype)  # under the same name: an older nest would hold what `take` lets go
    model = kv_cache.take(params, hparams["n_head"], backend)
    if num_beams > 1:
        show_beams(flags, model, prompts[0], rows[0])
    elif batch or num_samples > 1:
        show_batch(flags, model, prompts, rows)
    else:
        show_one(flags, model, prompts[0], rows[0])


def check(flags):
    """Raises ValueError for a value out of its range, and for a flag that another leaves without effect."""
    for wrong, why in (*ranges(flags), *conflicts(flags)):
        if wrong:
            raise ValueError(why)
    sampling.check(settings_of(flags))


def ranges(flags):
    """(is it so?, what is wrong then): each flag by itself."""
    stopping, url = flags.early_stopping, flags.base_url
    yield not 1 <= flags.num_samples <= 1024, f"--num_samples {flags.num_samples} is out of range: 1 to 1024"
    yield not 1 <= flags.num_beams <= 1024, f"--num_beams {flags.num_beams} is out of range: 1 (off) to 1024"
    yield flags.trace > 20, f"--trace {flags.trace} is out of range: 0 (off) to 20 candidates"
    yield flags.overflow not in ("error", "slide"), f"--overflow {flags.overflow!r}: choose error or slide"
    yield stopping.lower() not in STOPPING, f"--early_stopping {stopping!r}: choose false, true or never"
    yield not -10 <= flags.length_penalty <= 10, f"--length_penalty {flags.length_penalty} is out of range: -10 to 10"
    yield url and not url.startswith(("http://", "https://")), f"--base_url {url!r} must begin with http:// or https://"
    yield "" in flags.stop, "an empty --stop text would stop before the first token"
    yield any(not word.strip() for word in flags.bad_words), "--bad_words is empty but for white space: name a word"


def conflicts(flags):
    """The same: each flag beside the others."""
    alone, beams, cold = flags.num_samples == 1 and not flags.batch, flags.num_beams > 1, flags.temperature == 0
    sampled = [name for name in ("temperature", "top_k", "top_p", "seed") if is_set(flags, name)][:1]
    n_least, n_new = flags.min_new_tokens, flags.n_tokens_to_generate
    yield n_least > n_new, f"--min_new_tokens {n_least} is more than --n_tokens_to_generate {n_new}"
    yield flags.batch and not flags.prompt_file, "--batch reads a prompt from each line of a --prompt_file: name one"
    yield flags.batch and flags.num_samples > 1, "--num_samples is for one prompt, --batch for many: choose one"
    yield beams and sampled, f"--num_beams never samples: leave out --{''.join(sampled)}"
    yield beams and not alone, "--num_beams is for one prompt: leave out --batch and --num_samples"
    yield beams and flags.stop, "--num_beams cannot end at a --stop text: leave it out"
    for name in ("length_penalty", "early_stopping"):
        yield not beams and is_set(flags, name), f"--{name} has no effect without --num_beams"
    yield cold and flags.seed is not None, "--seed has no effect at --temperature 0: set --temperature too"
    yield cold and flags.num_samples > 1, "--num_samples are all the same at --temperature 0: set --temperature too"
    for name in ("trace", "overflow"):
        yield is_set(flags, name) and (beams or not alone), f"--{name} is for one text that is not searched by beams"


def is_set(flags, name):
    return getattr(flags, name) != inspect.signature(main).parameters[name].default


def settings_of(flags, encoder=None):
    """The Settings; without an encoder, those that need none."""
    banned, end_ids = (), ()
    if encoder:
        words = [word.strip() for word in flags.bad_words]
        banned = tuple(tuple(encoder.encode(space + word)) for word in words for space in ("", " "))
        end_ids = () if encoder.end_of_text is None else (encoder.end_of_text,)
    return sampling.Settings(
        flags.temperature, flags.top_k, flags.top_p, flags.repetition_penalty, flags.min_new_tokens, banned, end_ids
    )


def read_prompts(flags):
    """The prompts, one for each text that is wanted."""
    if flags.prompt and flags.prompt_file:
        raise ValueError("a prompt and --prompt_file are two prompts: give one")
    prompt = read_prompt_file(flags.prompt_file) if flags.prompt_file else flags.prompt
    if not flags.batch:
        return [prompt] * flags.num_samples
    if not prompt:
        raise ValueError(f"--prompt_file {flags.prompt_file}: no lines")
    return [line.removesuffix("\r") for line in prompt.split("\n")]


def read_prompt_file(path):
    """What stands in a UTF-8 file ("-" is stdin), without the newline that ends it and the mark that Windows begins it
    with. Raises ValueError if that cannot be read."""
    if path == "-" and sys.stdin is None:
        raise ValueError("--prompt_file -: there is no stdin")
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if path == "-" else read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt_file {cli.one_line(error)}") from None
    return text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


def make_row(flags, encoder, hparams, prompt, i):
    """The Row for the i-th text. Raises ValueError if it will not fit into n_ctx and must."""
    inputs = utils.first_ids(encoder, prompt)
    if flags.overflow == "error":
        try:
            check_inputs(inputs, flags.n_tokens_to_generate, hparams["n_vocab"], hparams["n_ctx"])
        except ValueError as error:
            raise ValueError(f"line {i + 1}: {error}" if flags.batch else str(error)) from None
    stop_at_eos = not utils.is_openai(hparams) if flags.stop_at_eos is None else flags.stop_at_eos
    return Row(
        encoder,
        inputs,
        flags.n_tokens_to_generate,
        settings_of(flags, encoder),
        end_ids=[encoder.end_of_text] if stop_at_eos else (),  # [None] stops at nothing
        stop=flags.stop,
        seed=None if flags.seed is None else flags.seed + i,
        keep_log_probabilities=flags.json,
    )


def show_one(flags, model, prompt, row):
    """As it comes; as a whole with --json, and with --trace, whose lines would come in between."""
    started, whole = time.perf_counter(), flags.json or flags.trace
    for n_step, piece in enumerate(stream(model, row, slide_notice() if flags.overflow == "slide" else None), 1):
        if flags.trace and row.stop_reason != "n_ctx":
            print(*trace.lines(row, flags.trace, n_step, rich=sys.stderr.isatty()), sep="\n", file=sys.stderr)
        if not whole:
            print(piece, end="", flush=True)
    print(json_line(prompt, row, time.perf_counter() - started) if flags.json else row.text if whole else "")


def slide_notice():
    """Says once that the text has outgrown n_ctx."""
    told = []

    def tell():
        if not told:
            print("the text has outgrown n_ctx: from here on the model sees the last part of it only", file=sys.stderr)
        told.append(True)

    return tell


def show_batch(flags, model, prompts, rows):
    started = time.perf_counter()
    batching.finish(model, rows)
    seconds = time.perf_counter() - started
    if flags.json:
        print("\n".join(json_line(prompt, row, seconds) for prompt, row in zip(prompts, rows, strict=True)))
    else:
        print("\n---\n".join(row.text for row in rows))


def json_line(prompt, row, seconds):
    """seconds: how long it took, all rows of a batch together."""
    line = {"prompt": prompt, "text": row.text, "token_ids": row.new, "log_probabilities": row.log_probabilities}
    line |= {"stop_reason": row.stop_reason, "seconds": round(seconds, 4)}
    return json_library.dumps(line, ensure_ascii=False)


def show_beams(flags, model, prompt, row):
    """The best text; with --json all that were found, best first."""
    started = time.perf_counter()
    found = beam.search(model, row.ids, flags.n_tokens_to_generate, flags.num_beams, end_ids=row.end_ids,
                        length_penalty=flags.length_penalty, early_stopping=STOPPING[flags.early_stopping.lower()],
                        settings=row.settings)  # fmt: skip
    seconds = time.perf_counter() - started
    for hypothesis in found if flags.json else found[:1]:
        text = row.encoder.decode(hypothesis.ids)
        line = {"prompt": prompt, "text": text, "token_ids": hypothesis.ids, "score": hypothesis.score}
        line |= {"stop_reason": "end_of_text" if hypothesis.ended else "length", "seconds": round(seconds, 4)}
        print(json_library.dumps(line, ensure_ascii=False) if flags.json else text)


if __name__ == "__main__":
    cli.run(main, "-m inference")
