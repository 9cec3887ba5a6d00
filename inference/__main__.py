"""The front door: from a command line to text. `python gpt2.py` and `python -m inference` both run this program."""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import inspect
import json as json_library
import sys
import time
from types import SimpleNamespace

import backends
import cli
import utils
from gpt2 import check_inputs
from inference import batching, beam, sampling, trace
from inference import model as models
from inference.generate import Sequence, generate
from weights.files import read_text
from weights.params import find_dtype, why_not_finite

STOPPING = {"false": False, "true": True, "never": "never"}
MARK = "\ufeff"  # the byte order mark with which Windows begins a text file


# fmt: off
def main(prompt: str = "", *, n_tokens_to_generate: int = 40, model_size: str = "", models_dir: str = "",
         base_url: str = "", backend: str = "numpy", dtype: str = "float32", prompt_file: str = "",
         temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int | None = None,
         repetition_penalty: float = 1.0, no_repeat_ngram_size: int = 0, min_new_tokens: int = 0, bad_words: list = (),
         stop: list = (), stop_at_eos: bool | None = None, overflow: str = "error",
         num_samples: int = 1, batch: bool = False, num_beams: int = 1, length_penalty: float = 1.0,
         early_stopping: str = "false", json: bool = False, trace: int = 0):
    # fmt: on
    """GPT-2 continues your text. The new text alone goes to stdout, as it is generated; all else to stderr.

    Args:
        prompt: the text to continue; without one (and without piped stdin) the model begins a text of its own
        n_tokens_to_generate: how many tokens (words or parts of words) to add, 0 to n_ctx less the prompt's
        model_size: 124M, 355M, 774M, 1558M, 3M or a model folder; left out: 124M if it can be had, else 3M
        models_dir: where the folders of models are; left out: models/ beside gpt2.py
        base_url: where to download from; left out: the environment's GPT2_BASE_URL, or OpenAI's address
        backend: numpy, or jax (compiled, and on an accelerator if there is one)
        dtype: float32, bfloat16 (half the memory, 2 to 3 digits) or float64
        prompt_file: a UTF-8 file with the prompt, - for stdin
        temperature: 0 takes the likeliest token each time; above, the higher the more varied; 1: as the model is
        top_k: draw from the k likeliest tokens only; 0: from all
        top_p: draw from the fewest tokens that have this probability together, above 0; 1: from all
        min_p: draw from the tokens that are at least this share as likely as the likeliest, 0 to 1; 0: from all
        seed: the same seed draws the same text, 0 or more; left out: another one each time
        repetition_penalty: above 1, tokens that are there already become less likely; 0.01 to 100; 1: off
        no_repeat_ngram_size: never write a sequence of so many tokens twice; 0: off
        min_new_tokens: do not write <|endoftext|> before there are so many; 0: off
        bad_words: a word not to write, with a space before it or without; may be given several times
        stop: end where this text is written, and leave it out; may be given several times
        stop_at_eos: end at <|endoftext|>; left out: as the model's folder says (OpenAI's do not)
        overflow: error, or slide: past n_ctx continue from the last n_ctx/2 tokens
        num_samples: so many continuations of one prompt, 1 to 1024, the i-th (from 0) with seed + i
        batch: a prompt on each line of the prompt_file, all at once
        num_beams: search the likeliest text with so many beams, up to 1024, not token by token; 1: off
        length_penalty: for beams, -10 to 10: above 0 favours long texts; 1: the mean log-probability
        early_stopping: for beams: false, true or never: when enough have ended (inference/beam.py)
        json: a JSON object a line: prompt, text, token_ids, log_probabilities (score), stop_reason, seconds
        trace: show so many candidates for each token on stderr, up to 20; 0: off
    """
    flags = SimpleNamespace(**locals())
    flags.stop, flags.bad_words = as_texts(stop), as_texts(bad_words)
    check(flags)
    find_dtype(dtype)
    device = backends.get(backend).setup(dtype)
    prompts = read_prompts(flags)
    tokenizer, model = models.load(model_size, models_dir, base_url, backend, dtype)
    sequences = [make_sequence(flags, tokenizer, model, prompt, i) for i, prompt in enumerate(prompts)]
    if any(prompt.endswith(" ") for prompt in prompts):
        print("hint: a prompt ends in a space; tokens begin with theirs, so leave it away", file=sys.stderr)
    if backend != "numpy":
        print(device, file=sys.stderr)
    show = show_beams if num_beams > 1 else show_batch if batch or num_samples > 1 else show_one
    try:
        show(flags, model, prompts, sequences)
    except FloatingPointError as error:
        raise OSError(f"{error}: {why_not_finite(model.params, dtype)}") from None


def as_texts(texts):
    """A flag that may be given several times, from Python: one text alone is one text, not its letters."""
    return [texts] if isinstance(texts, str) else list(texts)


# ---- Checks: each rule is (whether it is broken, the message) ----


def check(flags):
    """Raises ValueError for a value out of its range, and for a flag that another leaves without effect."""
    for broken, message in (*ranges(flags), *conflicts(flags)):
        if broken:
            raise ValueError(message)
    sampling.check(sampling_params(flags))


def ranges(flags):
    """The rules for each flag by itself."""
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
    """The rules for each flag beside the others."""
    alone, beams, cold = flags.num_samples == 1 and not flags.batch, flags.num_beams > 1, flags.temperature == 0
    sampled = [name for name in ("temperature", "top_k", "top_p", "min_p", "seed") if is_set(flags, name)][:1]
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


# ---- From flags to sequences ----


def sampling_params(flags, tokenizer=None, model=None):
    """The SamplingParams of the flags; without a tokenizer, those that need none."""
    of_model = {}
    if tokenizer:
        words = [word.strip() for word in flags.bad_words]
        of_model["bad_words"] = tuple(tuple(tokenizer.encode(space + word)) for word in words for space in ("", " "))
        of_model |= {"end_ids": model.end_ids}
        of_model["banned"] = utils.ids_without_token(tokenizer, model.n_vocab, model.end_ids)
    return sampling.SamplingParams(
        flags.temperature, flags.top_k, flags.top_p, flags.repetition_penalty, flags.min_new_tokens,
        min_p=flags.min_p, no_repeat_ngram_size=flags.no_repeat_ngram_size, **of_model,
    )  # fmt: skip


def read_prompts(flags):
    """The prompts, one for each text that is wanted. Piped stdin is the prompt if nothing else is."""
    if flags.prompt and flags.prompt_file:
        raise ValueError("a prompt and --prompt_file are two prompts: give one")
    source = flags.prompt_file or ("-" if not flags.prompt and cli.stdin_is_piped() else "")
    prompt = read_prompt_file(source) if source else flags.prompt
    if not flags.batch:
        return [prompt] * flags.num_samples
    if not prompt:
        raise ValueError(f"--prompt_file {flags.prompt_file}: no lines")
    return [line.removesuffix("\r") for line in prompt.split("\n")]


def read_prompt_file(path):
    """The text of a UTF-8 file ("-" is stdin), without a byte order mark at its start and the newline at its end.
    Raises ValueError if it cannot be read."""
    if path == "-" and sys.stdin is None:
        raise ValueError("--prompt_file -: there is no stdin")
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if path == "-" else read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt_file {cli.one_line(error)}") from None
    return text.removeprefix(MARK).removesuffix("\n").removesuffix("\r")


def make_sequence(flags, tokenizer, model, prompt, i):
    """The Sequence for the i-th text. Raises ValueError if it does not fit into n_ctx and must."""
    inputs = utils.first_ids(tokenizer, prompt)
    if flags.overflow == "error":
        try:
            check_inputs(inputs, flags.n_tokens_to_generate, model.n_vocab, model.n_ctx)
        except ValueError as error:
            raise ValueError(f"line {i + 1}: {error}" if flags.batch else str(error)) from None
    stop_at_eos = model.stop_at_eos if flags.stop_at_eos is None else flags.stop_at_eos
    return Sequence(
        tokenizer,
        inputs,
        flags.n_tokens_to_generate,
        sampling_params(flags, tokenizer, model),
        end_ids=model.end_ids if stop_at_eos else (),
        stop=flags.stop,
        seed=None if flags.seed is None else flags.seed + i,
        keep_log_probabilities=flags.json,
    )


# ---- Output ----


def show_one(flags, model, prompts, sequences):
    """Prints the text as it is generated; at the end with --json, and with --trace, whose lines would stand in
    between."""
    started, at_end = time.perf_counter(), flags.json or flags.trace
    (prompt,), (sequence,) = prompts, sequences
    pieces = generate(model, sequence, slide_notice() if flags.overflow == "slide" else None)
    for n_step, piece in enumerate(pieces, 1):
        if flags.trace and sequence.finish_reason != "n_ctx":
            print(*trace.lines(sequence, flags.trace, n_step, rich=sys.stderr.isatty()), sep="\n", file=sys.stderr)
        if not at_end:
            print(piece, end="", flush=True)
    seconds = time.perf_counter() - started
    print(json_line(prompt, sequence, seconds) if flags.json else sequence.text if at_end else "")


def slide_notice():
    """A function that says once on stderr that the text is longer than n_ctx."""
    said = []

    def notice():
        if not said:
            print("the text has outgrown n_ctx: from here on the model sees the last part of it only", file=sys.stderr)
        said.append(True)

    return notice


def show_batch(flags, model, prompts, sequences):
    started = time.perf_counter()
    batching.generate_batch(model, sequences)
    seconds = time.perf_counter() - started
    if flags.json:
        print("\n".join(json_line(*pair, seconds) for pair in zip(prompts, sequences, strict=True)))
    else:
        print("\n---\n".join(sequence.text for sequence in sequences))


def json_line(prompt, sequence, seconds):
    """seconds: the time of the whole batch."""
    line = {"prompt": prompt, "text": sequence.text, "token_ids": sequence.new_ids}
    line |= {"log_probabilities": sequence.log_probabilities, "stop_reason": sequence.finish_reason}
    return json_library.dumps(line | {"seconds": round(seconds, 4)}, ensure_ascii=False)


def show_beams(flags, model, prompts, sequences):
    """Prints the best text; with --json all that were found, best first."""
    started = time.perf_counter()
    (prompt,), (sequence,) = prompts, sequences
    found = beam.search(model, sequence.ids, flags.n_tokens_to_generate, flags.num_beams, end_ids=sequence.end_ids,
                        length_penalty=flags.length_penalty, early_stopping=STOPPING[flags.early_stopping.lower()],
                        params=sequence.params)  # fmt: skip
    seconds = time.perf_counter() - started
    for hypothesis in found if flags.json else found[:1]:
        text = sequence.tokenizer.decode(hypothesis.ids)
        line = {"prompt": prompt, "text": text, "token_ids": hypothesis.ids, "score": hypothesis.score}
        line |= {"stop_reason": "end_of_text" if hypothesis.ended else "length", "seconds": round(seconds, 4)}
        print(json_library.dumps(line, ensure_ascii=False) if flags.json else text)


if __name__ == "__main__":
    cli.run(main, "-m inference")
