"""The front door: from a command line to text. `python gpt2.py` and `python -m inference` both run this program."""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import functools
import inspect
import sys
import time
from json import dumps
from pathlib import Path
from types import SimpleNamespace

import numpy

import backends
import cli
import utils
from gpt2 import check_inputs
from inference import batching, beam, sampling, speculative, trace
from inference import chat as chats
from inference import model as models
from inference.generate import Sequence, generate
from weights.files import read_text
from weights.params import find_dtype, why_not_finite

STOPPING = {"false": False, "true": True, "never": "never"}
N_ANSWER = 512  # tokens of an answer of a chat model, which ends by itself, if nothing else is said
MARK = "\ufeff"  # the byte order mark with which Windows begins a text file


class LeftOut(int):
    """The default of a number whose meaning depends on other flags. A number that the user gives is an int."""


# fmt: off
def main(prompt: str = "", *, n_tokens_to_generate: int = LeftOut(40), model_size: str = "", models_dir: str = "",
         base_url: str = "", backend: str = "numpy", dtype: str = "float32", prompt_file: str = "",
         temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int | None = None,
         repetition_penalty: float = 1.0, no_repeat_ngram_size: int = 0, min_new_tokens: int = 0, bad_words: list = (),
         stop: list = (), stop_at_eos: bool | None = None, overflow: str = "error",
         num_samples: int = 1, batch: bool = False, num_beams: int = 1, length_penalty: float = 1.0,
         early_stopping: str = "false", draft: str = "", draft_model: str = "", json: bool = False, trace: int = 0,
         chat: bool = False, system: str = "", adapter: str = "", mesh: str = ""):
    # fmt: on
    """GPT-2 continues your text. The new text alone goes to stdout, as it is generated; all else to stderr.

    Args:
        prompt: the text to continue; without one (and without piped stdin) the model begins a text of its own
        n_tokens_to_generate: how many tokens (parts of words) to add, up to n_ctx minus the prompt's; with --chat: 512
        model_size: 124M, 355M, 774M, 1558M, 3M, smollm2, owner/name, a folder or file; left out: 124M, or else 3M
        models_dir: where the folders of models are; left out: models/ beside gpt2.py
        base_url: where to download from; left out: the environment's GPT2_BASE_URL, or OpenAI's address
        backend: numpy, or jax (compiled, and on an accelerator if there is one)
        dtype: float32, bfloat16 (half the memory, 2 to 3 digits) or float64
        prompt_file: a UTF-8 file with the prompt, - for stdin
        temperature: 0: always the likeliest token; above 0: the higher, the more varied; 1: the model's own
        top_k: draw from the k likeliest tokens only; 0: from all
        top_p: draw from the fewest tokens that have this probability together, above 0; 1: from all
        min_p: draw from tokens with this fraction of the likeliest one's probability or more, up to 1; 0: all
        seed: the same seed draws the same text, 0 or more; left out: another one each time
        repetition_penalty: above 1, tokens of the prompt and the new text become less likely; 0.01 to 100; 1: off
        no_repeat_ngram_size: never repeat a sequence of this many tokens; 0: off
        min_new_tokens: ban <|endoftext|> until there are this many new tokens; 0: off
        bad_words: a word to ban, with and without a space before it; may be given several times
        stop: end at this text, which is not printed; may be given several times
        stop_at_eos: end at <|endoftext|>; left out: as the model's folder says (OpenAI's do not)
        overflow: error, or slide: past n_ctx continue from the last n_ctx/2 tokens
        num_samples: the number of continuations of one prompt, 1 to 1024; the i-th (from 0) has seed + i
        batch: a prompt on each line of the prompt_file, all at once
        num_beams: search for the likeliest text with this many beams, up to 1024; 1: off
        length_penalty: for beams, -10 to 10: above 0 favours long texts; 1: the mean log-probability
        early_stopping: for beams: false, true or never: when enough have ended (inference/beam.py)
        draft: lookup: guess tokens from the text itself and check several at once: faster, the same text
        draft_model: a smaller model with the same tokenizer, such as 124M beside 1558M, that guesses tokens
        json: a JSON object a line: prompt, text, token_ids, log_probabilities (score), stop_reason, seconds
        trace: show this many candidates for each token on stderr, up to 20; 0: off
        chat: the prompt is a message, and the model answers; without one, on a terminal, it is a conversation
        system: with --chat: what the model is to know or to do in all answers
        adapter: a folder with a LoRA for this model, made by training.finetune or by peft
        mesh: how JAX's devices divide the model and the batch, such as data=2,model=4; left out: one device
    """
    flags = SimpleNamespace(**locals())
    flags.stop, flags.bad_words = as_texts(stop), as_texts(bad_words)
    if chat and isinstance(n_tokens_to_generate, LeftOut):
        flags.n_tokens_to_generate = LeftOut(N_ANSWER)
    cli.check(rules(flags))
    sampling.check(sampling_params(flags))
    find_dtype(dtype)
    device = backends.get(backend).setup(dtype)
    prompts = read_prompts(flags)
    if chat:  # the template first: a model that has none is not loaded
        flags.model_size = str(utils.choose_model(model_size, models_dir, base_url).resolve())
        flags.template = chats.load_template(Path(flags.model_size))
    tokenizer, model = models.load(flags.model_size, models_dir, base_url, backend, dtype, adapter, mesh)
    if is_conversation(flags):
        start = chats.Conversation(model, tokenizer, flags.template, system)
        return chats.converse(start, functools.partial(make_answer, flags, tokenizer, model))
    sequences = make_sequences(flags, tokenizer, model, prompts)
    of_draft = tokenizer, model, seed, draft_model, models_dir, base_url, backend, dtype
    flags.drafter = speculative.load_draft_model(*of_draft) if draft_model else speculative.Lookup() if draft else None
    if not chat and any(prompt.endswith(" ") for prompt in prompts):
        print("hint: a prompt ends in a space, which belongs to the next token: leave it out", file=sys.stderr)
    if backend != "numpy":
        print(device + f", mesh {mesh}" * bool(mesh), file=sys.stderr)
    started = time.perf_counter()
    try:
        with numpy.errstate(all="ignore"):  # what is not finite is reported below
            results = (search if num_beams > 1 else sample)(flags, model, prompts, sequences)
    except FloatingPointError as error:
        params = model.params | ({"draft_model": flags.drafter.model.params} if draft_model else {})
        raise OSError(f"{error}: {why_not_finite(params, dtype)}") from None
    seconds = {"seconds": round(time.perf_counter() - started, 4)}
    if json:
        print("\n".join(dumps(result | seconds, ensure_ascii=False) for result in results))
    else:
        print("" if is_streamed(flags) else "\n---\n".join(result["text"] for result in results))


def as_texts(texts):
    """The values of a flag that may be given several times, as a list. A caller in Python may pass a single str."""
    return [texts] if isinstance(texts, str) else list(texts)


# ---- The rules for flags ----


def rules(f):
    """Yields (whether the flags break a rule, the message), for cli.check: first the rules for one flag, then those
    for several. sampling.check has further ones."""
    yield not 1 <= f.num_samples <= 1024, f"--num_samples {f.num_samples} is out of range: 1 to 1024"
    yield not 1 <= f.num_beams <= 1024, f"--num_beams {f.num_beams} is out of range: 1 (off) to 1024"
    yield f.trace > 20, f"--trace {f.trace} is out of range: 0 (off) to 20 candidates"
    yield f.overflow not in ("error", "slide"), f"--overflow {f.overflow!r}: choose error or slide"
    stopping, url = f.early_stopping, f.base_url
    yield stopping.lower() not in STOPPING, f"--early_stopping {stopping!r}: choose false, true or never"
    yield not -10 <= f.length_penalty <= 10, f"--length_penalty {f.length_penalty} is out of range: -10 to 10"
    yield url and not url.startswith(("http://", "https://")), f"--base_url {url!r} must begin with http:// or https://"
    yield "" in f.stop, "an empty --stop text would stop before the first token"
    yield any(not word.strip() for word in f.bad_words), "--bad_words is empty but for white space: name a word"

    is_set = {name for name, p in inspect.signature(main).parameters.items() if getattr(f, name) != p.default}
    beams, cold, several = f.num_beams > 1, f.temperature == 0, f.batch or f.num_samples > 1
    n_least, n_new = f.min_new_tokens, f.n_tokens_to_generate
    yield n_least > n_new, f"--min_new_tokens {n_least} is more than --n_tokens_to_generate {n_new}"
    yield f.batch and not f.prompt_file, "--batch reads a prompt from each line of a --prompt_file: name one"
    yield f.batch and f.num_samples > 1, "--num_samples is for one prompt, --batch for many: choose one"
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        yield beams and name in is_set, f"--num_beams never samples: leave out --{name}"
    yield beams and several, "--num_beams is for one prompt: leave out --batch and --num_samples"
    yield beams and f.stop, "--num_beams cannot end at a --stop text: leave it out"
    for name in ("length_penalty", "early_stopping"):
        yield not beams and name in is_set, f"--{name} has no effect without --num_beams"
    yield cold and f.seed is not None, "--seed has no effect at --temperature 0: set --temperature too"
    yield cold and f.num_samples > 1, "--num_samples are all the same at --temperature 0: set --temperature too"
    yield f.system and not f.chat, "--system has no effect without --chat"
    yield f.chat and "stop_at_eos" in is_set, "an answer always ends at the model's end ids: leave out --stop_at_eos"
    yield f.chat and "overflow" in is_set, "--overflow would cut off the beginning of the messages: leave it out"
    for name in ("json", "trace", "num_samples", "num_beams", "draft", "draft_model"):
        yield is_conversation(f) and name in is_set, f"--{name} is for one message: give it as the prompt"
    yield f.draft not in ("", "lookup"), f"--draft {f.draft!r}: choose lookup, or name a model with --draft_model"
    yield f.draft and f.draft_model, "--draft and --draft_model both guess tokens: choose one"
    for name in ("trace", "overflow", "draft", "draft_model"):
        yield name in is_set and (beams or several), f"--{name} is for one text that is not searched by beams"


# ---- From flags to sequences ----


def sampling_params(flags, **of_model):
    return sampling.SamplingParams(
        flags.temperature, flags.top_k, flags.top_p, flags.repetition_penalty, flags.min_new_tokens,
        min_p=flags.min_p, no_repeat_ngram_size=flags.no_repeat_ngram_size, **of_model,
    )  # fmt: skip


def read_prompts(flags):
    """The prompts, one for each sequence. Without a prompt and a --prompt_file, piped stdin is the prompt."""
    if flags.prompt and flags.prompt_file:
        raise ValueError("a prompt and --prompt_file are two prompts: give one")
    source = flags.prompt_file or ("-" if not flags.prompt and cli.stdin_is_piped() else "")
    prompt = read_prompt_file(source) if source else flags.prompt
    if flags.chat and not prompt.strip() and not is_conversation(flags):
        raise ValueError("--chat needs a message: give it as the prompt, or start this on a terminal")
    if not flags.batch:
        return [prompt] * flags.num_samples
    if not prompt:
        raise ValueError(f"--prompt_file {flags.prompt_file}: no lines")
    return [line.removesuffix("\r") for line in prompt.split("\n")]


def is_conversation(flags):
    """Whether messages are typed on a terminal, one after the other."""
    return flags.chat and not flags.prompt and not flags.prompt_file and sys.stdin is not None and sys.stdin.isatty()


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


def make_sequences(flags, tokenizer, model, prompts):
    """A Sequence for each prompt. Raises ValueError if one is too long for n_ctx, unless --overflow is slide."""
    make, sequences = sequence_maker(flags, tokenizer, model), []
    for i, prompt in enumerate(prompts):
        ids = prompt_ids(flags, tokenizer, prompt)
        n_new = n_answer(flags, model, ids)
        if flags.overflow == "error":
            try:
                check_inputs(ids, n_new, model.n_vocab, model.n_ctx)
            except ValueError as error:
                raise ValueError(f"line {i + 1}: {error}" if flags.batch else str(error)) from None
        sequences.append(make(ids, n_new, i))
    return sequences


def prompt_ids(flags, tokenizer, prompt):
    """The ids of a prompt; with --chat, of the prompt as a message."""
    if not flags.chat:
        return utils.first_ids(tokenizer, prompt)
    return flags.template.encode(tokenizer, chats.as_messages(prompt, flags.system))


def n_answer(flags, model, ids):
    """The number of tokens to generate: what the flag says, or for an answer what n_ctx leaves of N_ANSWER."""
    n_new = flags.n_tokens_to_generate
    return max(1, min(n_new, model.n_ctx - len(ids))) if isinstance(n_new, LeftOut) and flags.chat else n_new


def make_answer(flags, tokenizer, model, ids):
    """The Sequence of an answer in a conversation, where what n_ctx leaves is always the limit."""
    n_new = min(flags.n_tokens_to_generate, model.n_ctx - len(ids))
    return sequence_maker(flags, tokenizer, model)(ids, n_new, 0)


def sequence_maker(flags, tokenizer, model):
    """(ids, number of new tokens, its place among several) -> a Sequence, as the flags say."""
    words = [space + word.strip() for word in flags.bad_words for space in ("", " ")]
    params = sampling_params(
        flags, bad_words=tuple(tuple(tokenizer.encode(word)) for word in words), end_ids=model.end_ids,
        banned=utils.ids_without_token(tokenizer, model.n_vocab, model.end_ids),
    )  # fmt: skip
    stops =  (model.stop_at_eos if flags.stop_at_eos is None else flags.stop_at_eos)
    settings = {"end_ids": model.end_ids if stops else (), "stop": flags.stop, "keep_log_probabilities": flags.json}

    def make(ids, n_new, i):
        seed = None if flags.seed is None else flags.seed + i
        return Sequence(tokenizer, ids, n_new, params, seed=seed, **settings)

    return make


# ---- From sequences to text ----


def sample(flags, model, prompts, sequences):
    """Generates all sequences. Returns what --json prints of each."""
    if flags.batch or flags.num_samples > 1:
        batching.generate_batch(model, sequences)
    else:
        stream(flags, model, *sequences)
    return [
        {"prompt": prompt, "text": sequence.text, "token_ids": sequence.new_ids,
         "log_probabilities": sequence.log_probabilities, "stop_reason": sequence.finish_reason,
         **({"accepted_per_step": flags.drafter.accepted_per_step} if flags.drafter else {})}
        for prompt, sequence in zip(prompts, sequences, strict=True)
    ]  # fmt: skip


def is_streamed(flags):
    """Whether the text is printed as it is generated. Lines of --trace would come in between."""
    return not (flags.json or flags.trace or flags.batch or flags.num_samples > 1 or flags.num_beams > 1)


def stream(flags, model, sequence):
    """Generates one sequence. Prints the pieces of the text, or the lines of --trace, as they are generated."""
    note = "the text has outgrown n_ctx: from here on the model sees the last part of it only"
    notice = functools.cache(lambda: print(note, file=sys.stderr))  # cached, so it prints once
    run = functools.partial(speculative.generate, drafter=flags.drafter) if flags.drafter else generate
    pieces = run(model, sequence, overflow=notice if flags.overflow == "slide" else None)
    for n_step, piece in enumerate(pieces, 1):
        if flags.trace and sequence.finish_reason != "n_ctx":
            print(*trace.lines(sequence, flags.trace, n_step, rich=sys.stderr.isatty()), sep="\n", file=sys.stderr)
        if is_streamed(flags):
            print(piece, end="", flush=True)
    if flags.chat:
        chats.hint_if_cut(sequence, model.n_ctx)


def search(flags, model, prompts, sequences):
    """Searches by beams. Returns what --json prints of the texts that were found, best first; otherwise of the best."""
    (prompt,), (sequence,) = prompts, sequences
    found = beam.search(
        model, sequence.ids, flags.n_tokens_to_generate, flags.num_beams, length_penalty=flags.length_penalty,
        early_stopping=STOPPING[flags.early_stopping.lower()], end_ids=sequence.end_ids,
        sampling_params=sequence.sampling_params,
    )  # fmt: skip
    return [
        {"prompt": prompt, "text": sequence.tokenizer.decode(hypothesis.ids), "token_ids": hypothesis.ids,
         "score": hypothesis.score, "stop_reason": "end_of_text" if hypothesis.ended else "length"}
        for hypothesis in (found if flags.json else found[:1])
    ]  # fmt: skip


if __name__ == "__main__":
    cli.run(main, "-m inference")
