"""What a request may ask of a model: each parameter of OpenAI's API, with the values that it may have.

    values = parse({"model": "3M", "prompt": "Once", "max_tokens": 5}, COMPLETIONS)         # values.max_tokens is 5
    inputs = encode(tokenizer, values.prompt)                                               # lists of ids
    check(values, inputs, 5, model.n_vocab, n_tokens=256, n_slots=16)

None is the same as a parameter that is left out. A parameter that is unknown is refused, as a misspelt one would
otherwise have no effect without a word. What OpenAI has and this project has not is refused unless it changes nothing.
"""

from types import SimpleNamespace

from gpt2 import check_inputs
from inference.chat import load_template
from utils import first_ids

MAX_TEXTS = 1024  # of one request
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Refused(ValueError):
    """A request that cannot be had as it is. param: the parameter to change, or None; code: OpenAI's word for why."""

    def __init__(self, message, param=None, code="invalid_value"):
        super().__init__(message)
        self.param, self.code = param, code


# ---- Rules: whether a value is allowed ----


def is_flag(value):
    return type(value) is bool


def is_number(value, low, high):
    return type(value) in (int, float) and low <= value <= high  # NaN fails here too, and so does true


def is_whole(value, low=0, high=2**31):
    return type(value) is int and low <= value <= high


def is_texts(value, most):
    found = as_list(value)
    return len(found) <= most and all(isinstance(text, str) and text for text in found)


def is_ids(value):
    return isinstance(value, list) and len(value) > 0 and all(type(i) is int for i in value)


def is_prompts(value):
    several = isinstance(value, list) and value != [] and all(isinstance(p, str) or is_ids(p) for p in value)
    return isinstance(value, str) or is_ids(value) or several


def is_messages(value):
    try:
        return len(value) > 0 and all(message["role"] in ROLES and text_of(message) is not None for message in value)
    except (TypeError, KeyError):
        return False


def is_ignored(value):
    return True


def one_of(*values):
    """For what this server does not do: a rule that allows what changes nothing."""
    return lambda value: value in values


def as_list(value):
    return value if isinstance(value, list) else [value]


def text_of(message):
    """The text of a message, whose content is a string or a list of {"type": "text", "text": a string}."""
    content = message["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else "" + content


# fmt: off
TEXTS = "a string that is not empty, or a list of up to {} of them"
UNSUPPORTED = "left out, as it is not supported here"
BOTH = {  # name: (the value if it is left out, a rule, what the rule allows)
    "model": (None, lambda v: isinstance(v, str), "a string"),
    "stream": (False, is_flag, "true or false"),
    "stream_options": ({}, lambda v: isinstance(v, dict) and all(map(is_flag, v.values())), '{"include_usage": true}'),
    "n": (1, lambda v: is_whole(v, 1, 128), "a whole number from 1 to 128"),
    "max_tokens": (None, is_whole, "a whole number, 0 or more"),
    "stop": ([], lambda v: is_texts(v, 4), TEXTS.format(4)),
    "seed": (None, lambda v: is_whole(v, -(2**63), 2**63 - 1), "a whole number of 64 bits"),
    "temperature": (1.0, lambda v: is_number(v, 0, 2), "a number from 0 to 2"),
    "top_p": (1.0, lambda v: is_number(v, 0, 1), "a number from 0 to 1"),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0, one_of(0), UNSUPPORTED)),
    "logit_bias": ({}, one_of({}), UNSUPPORTED),
    **dict.fromkeys(("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"),
                    (None, is_ignored, "")),
    # Beyond OpenAI's, under the names that vLLM's server gave them:
    "top_k": (0, is_whole, "a whole number, 0 or more"),
    "min_p": (0.0, lambda v: is_number(v, 0, 1), "a number from 0 to 1"),
    "repetition_penalty": (1.0, lambda v: is_number(v, 0.01, 100), "a number from 0.01 to 100"),
    "min_tokens": (0, is_whole, "a whole number, 0 or more"),
    "bad_words": ([], lambda v: is_texts(v, 1024), TEXTS.format(1024)),
    "use_beam_search": (False, is_flag, "true or false"),
    "best_of": (None, lambda v: is_whole(v, 1, 128), "a whole number from 1 to 128"),
    "length_penalty": (1.0, lambda v: is_number(v, -10, 10), "a number from -10 to 10"),
}
COMPLETIONS = BOTH | {
    "prompt": ("", is_prompts, "a string, a list of strings, of token ids or of lists of those, none of them empty"),
    "echo": (False, is_flag, "true or false"),
    "logprobs": (None, lambda v: is_whole(v, 0, 5), "a whole number from 0 to 5"),
    "suffix": (None, one_of(""), UNSUPPORTED),
}
CHAT = BOTH | {
    "messages": (None, is_messages, 'a list of {"role": "system", "user" or "assistant", "content": text}, not empty'),
    "max_completion_tokens": (None, is_whole, "a whole number, 0 or more"),
    "logprobs": (False, is_flag, "true or false"),
    "top_logprobs": (None, lambda v: is_whole(v, 0, 20), "a whole number from 0 to 20"),
    "response_format": (None, one_of({"type": "text"}), UNSUPPORTED),
    **dict.fromkeys(("tools", "functions"), (None, one_of([]), UNSUPPORTED)),
    "tool_choice": (None, one_of("none", "auto"), UNSUPPORTED),
    "parallel_tool_calls": (None, is_ignored, ""),
    "modalities": (None, one_of(["text"]), UNSUPPORTED),
}
# fmt: on


def parse(body, table):
    """The values of a request, a SimpleNamespace with every name of the table. Raises Refused."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in table:
            raise Refused(f"unknown parameter {name!r:.80}", name[:80], "unknown_parameter")
        if not table[name][1](value):
            raise Refused(f"{name} must be {table[name][2]}, not {value!r:.60}", name)
    for name in {"model", "messages"} & table.keys() - given.keys():
        raise Refused(f"{name} is missing", name, "missing_required_parameter")
    values = {"echo": False} | {name: given.get(name, default) for name, (default, *_) in table.items()}
    values["stop"], values["bad_words"] = as_list(values["stop"]), as_list(values["bad_words"])
    if values["stream_options"] and not values["stream"]:
        raise Refused("stream_options needs stream: true", "stream_options")
    if values.get("top_logprobs") is not None and not values["logprobs"]:
        raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
    return SimpleNamespace(**values)


def encode(tokenizer, prompt):
    """A list of ids for each prompt."""
    prompts = [prompt] if is_ids(prompt) else as_list(prompt)
    return [first_ids(tokenizer, p) if isinstance(p, str) else p for p in prompts]


def find_template(folder):
    """The chat template of a model, or None if it has none."""
    try:
        return load_template(folder)
    except ValueError:
        return None


def encode_chat(template, tokenizer, messages):
    """The ids of a conversation, by the model's chat template, or None if it has none. Raises Refused."""
    if template is None:
        raise Refused("this model has no chat template: use /v1/completions", "model", "no_chat_template")
    plain = [{"role": ROLES[message["role"]], "content": text_of(message)} for message in messages]
    try:
        return template.encode(tokenizer, plain)
    except OSError as error:  # a template may refuse an order of roles
        raise Refused(f"messages: {error}", "messages") from None


def check(values, inputs, n_new, n_vocab, n_tokens, n_slots):
    """Raises Refused for what depends on the model and the server. n_tokens: how many a prompt and its continuation may
    have; n_slots: how many beams there may be."""
    n_beams = values.n if values.best_of is None else values.best_of
    if len(inputs) * values.n > MAX_TEXTS:
        raise Refused(f"n {values.n} for {len(inputs)} prompts is more than {MAX_TEXTS} texts", "n")
    if n_beams != values.n and not values.use_beam_search:
        raise Refused("best_of is the number of beams: without use_beam_search leave it out", "best_of")
    if values.use_beam_search and not values.n <= n_beams <= n_slots:
        raise Refused(f"best_of {n_beams} is out of range: from n, {values.n}, to {n_slots} beams", "best_of")
    if values.use_beam_search and (values.stream or values.stop or values.logprobs not in (None, False)):
        raise Refused("use_beam_search goes without stream, stop and logprobs", "use_beam_search")
    if values.min_tokens > n_new:
        raise Refused(f"min_tokens {values.min_tokens} is more than max_tokens {n_new}", "min_tokens")
    try:
        for ids in inputs:
            check_inputs(ids, n_new, n_vocab, n_tokens)
    except ValueError as error:
        code = "context_length_exceeded" if len(ids) + n_new > n_tokens else "invalid_value"
        raise Refused(str(error), "prompt" if hasattr(values, "prompt") else "messages", code) from None
