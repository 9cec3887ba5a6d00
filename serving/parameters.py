"""What a request may say: each parameter of OpenAI's API, with the values that it may have.

    values = parse({"model": "3M", "prompt": "Once", "max_tokens": 5}, COMPLETIONS)         # values.max_tokens is 5

null is the same as a parameter that is left out. A parameter that is unknown is refused, as a misspelt one would
otherwise have no effect without a word. What OpenAI has and this server has not is refused unless it changes nothing.
"""

from types import SimpleNamespace

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Problem(Exception):
    """An answer that is an error: the HTTP status, and the fields of OpenAI's error object."""

    def __init__(self, status, message, param=None, code=None):
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.param = status, param
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---- Rules: (value) -> the value to use. Each raises ValueError with what is allowed. ----


def flag(value):
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def number(low, high, kinds=(int, float)):
    def rule(value):
        if type(value) not in kinds or not low <= value <= high:  # NaN fails here too, and so does true
            raise ValueError(f"a {'whole ' * (float not in kinds)}number from {low} to {high}")
        return value

    return rule


def whole(low, high=2**31):
    return number(low, high, kinds=(int,))


def texts(most):
    """A string or a list of strings -> a list."""

    def rule(value):
        found = value if isinstance(value, list) else [value]
        if len(found) > most or not all(isinstance(text, str) and text for text in found):
            raise ValueError(f"a string that is not empty, or a list of up to {most} of them")
        return found

    return rule


def is_ids(value):
    return isinstance(value, list) and len(value) > 0 and all(type(i) is int for i in value)


def prompts(value):
    """A string, a list of strings, a list of ids or a list of those -> a string or a list of ids for each prompt."""
    found = [value] if isinstance(value, str) or is_ids(value) else value
    if not isinstance(found, list) or not found or not all(isinstance(p, str) or is_ids(p) for p in found):
        raise ValueError("a string, a list of strings, a list of token ids or a list of those, none of them empty")
    return found


def messages(value):
    """A list of {"role", "content"}, where a content may be a list of parts -> the same with strings as contents."""
    try:
        found = [{"role": ROLES[message["role"]], "content": joined(message["content"])} for message in value]
    except (TypeError, KeyError, AttributeError):
        found = []
    if not found:
        raise ValueError('a list of {"role": "system", "user" or "assistant", "content": text}, not empty')
    return found


def joined(content):
    """The text of a message's content: a string, or a list of {"type": "text", "text": a string}."""
    return content + "" if not isinstance(content, list) else "".join(part["text"] for part in content)


def stream_options(value):
    if not isinstance(value, dict) or any(type(option) is not bool for option in value.values()):
        raise ValueError('an object such as {"include_usage": true}')
    return value


def only(*neutral):
    """For what this server does not do."""

    def rule(value):
        if value not in neutral:
            raise ValueError("left out: this server does not support it")
        return value

    return rule


def ignored(value):
    return value


# fmt: off
BOTH = {  # name: (rule, the value if it is left out)
    "model": (str, None), "stream": (flag, False), "stream_options": (stream_options, {}), "n": (whole(1, 128), 1),
    "max_tokens": (whole(0), None), "stop": (texts(4), []), "seed": (whole(-(2**63), 2**63 - 1), None),
    "temperature": (number(0, 2), 1.0), "top_p": (number(0, 1), 1.0), "presence_penalty": (only(0), 0),
    "frequency_penalty": (only(0), 0), "logit_bias": (only({}), {}), "user": (ignored, None),
    "metadata": (ignored, None), "store": (ignored, None), "safety_identifier": (ignored, None),
    "prompt_cache_key": (ignored, None), "service_tier": (ignored, None),
    # Beyond OpenAI's, under the names that vLLM's server gave them:
    "top_k": (whole(0), 0), "min_p": (number(0, 1), 0.0), "repetition_penalty": (number(0.01, 100), 1.0),
    "min_tokens": (whole(0), 0), "bad_words": (texts(1024), []), "use_beam_search": (flag, False),
    "best_of": (whole(1, 128), None), "length_penalty": (number(-10, 10), 1.0),
}
COMPLETIONS = BOTH | {
    "prompt": (prompts, [""]), "echo": (flag, False), "logprobs": (whole(0, 5), None), "suffix": (only(""), None),
}
CHAT = BOTH | {
    "messages": (messages, None), "max_completion_tokens": (whole(0), None), "logprobs": (flag, False),
    "top_logprobs": (whole(0, 20), None), "response_format": (only({"type": "text"}), None), "tools": (only([]), None),
    "tool_choice": (only("none", "auto"), None), "parallel_tool_calls": (ignored, None), "functions": (only([]), None),
    "modalities": (only(["text"]), None),
}
# fmt: on


def parse(body, table):
    """The values of a request, a SimpleNamespace with every name of the table. Raises Problem naming the parameter."""
    if not isinstance(body, dict):
        raise Problem(400, "the body must be a JSON object")
    values = {name: default for name, (_, default) in table.items()}
    for name, value in body.items():
        if name not in table:
            raise Problem(400, f"unknown parameter {name!r:.80}", name[:80], "unknown_parameter")
        try:
            values[name] = values[name] if value is None else table[name][0](value)
        except ValueError as allowed:
            raise Problem(400, f"{name} must be {allowed}, not {value!r:.60}", name, "invalid_value") from None
    for name in ("model", "messages"):
        if values.get(name, "") is None:
            raise Problem(400, f"{name} is missing", name, "missing_required_parameter")
    check_together(values := SimpleNamespace(**({"echo": False} | values)))
    return values


def check_together(values):
    """Raises Problem for a parameter that has no effect, or another than is meant, beside others."""
    v, beams = values, values.best_of or values.n
    rules = {
        "stream_options needs stream: true": v.stream_options and not v.stream,
        "top_logprobs needs logprobs: true": getattr(v, "top_logprobs", None) is not None and not v.logprobs,
        "best_of is the number of beams, n or more; without use_beam_search leave it out":
            beams < v.n if v.use_beam_search else beams != v.n,
        "use_beam_search goes without stream, stop and logprobs":
            v.use_beam_search and (v.stream or v.stop or v.logprobs not in (None, False)),
    }  # fmt: skip
    for message, broken in rules.items():
        if broken:
            raise Problem(400, message, message.partition(" ")[0], "invalid_value")
