"""What a request may say: each parameter of OpenAI's API with the values that it may have.

    values = parse({"prompt": "Once", "max_tokens": 5}, COMPLETIONS)      # values.prompt, values.temperature, ...

A rule is a function of a parameter's value. It returns the value to use, or raises ValueError with what is allowed.
null is the same as a parameter that is left out. What is unknown is refused, as a misspelt parameter would otherwise
have no effect without a word; what OpenAI has and this server has not is refused unless its value changes nothing.
"""

import math
from types import SimpleNamespace

from serving.formats import Problem


def boolean(value):
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def text(value):
    if type(value) is not str:
        raise ValueError("a string")
    return value


def number(low, high, whole=False):
    def rule(value):
        kinds, name = ((int,), "a whole number") if whole else ((int, float), "a number")
        if type(value) not in kinds or not low <= value <= high:  # NaN fails here too, and so does true
            raise ValueError(f"{name} from {low} to {high}" if high < 2**31 else f"{name}, {low} or more")
        return value

    return rule


def whole(low, high=2**31):
    return number(low, high, whole=True)


def texts(most):
    """A string or a list of strings -> a list."""

    def rule(value):
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or len(value) > most or not all(isinstance(s, str) and s for s in value):
            raise ValueError(f"a string that is not empty, or a list of up to {most} of them")
        return value

    return rule


def ids_or_texts(value):
    """A string, a list of strings, a list of ids or a list of those -> a list with a string or list for each prompt."""
    value = [value] if isinstance(value, str) or (isinstance(value, list) and value and is_ids(value)) else value
    if not isinstance(value, list) or not value or not all(isinstance(v, str) or is_ids(v) for v in value):
        raise ValueError("a string, a list of strings, a list of token ids or a list of those, none of them empty")
    return value


def is_ids(value):
    return isinstance(value, list) and len(value) > 0 and all(type(i) is int for i in value)


def messages(value):
    """[{"role", "content"}, ...], where a content may be a list of parts of text -> the same with strings."""
    allowed = 'a list of {"role": "system", "user" or "assistant", "content": text}, not empty'
    if not isinstance(value, list) or not value:
        raise ValueError(allowed)
    found = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise ValueError(allowed)
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") != "text" or type(part.get("text")) is not str:
                raise ValueError(f"{allowed}; this model reads text only")
        content = "".join(part["text"] for part in content) if isinstance(content, list) else content
        if type(content) is not str:
            raise ValueError(allowed)
        found.append({"role": message["role"].replace("developer", "system"), "content": content})
    return found


def stream_options(value):
    if not isinstance(value, dict) or not value.keys() <= {"include_usage", "include_obfuscation"}:
        raise ValueError('an object with "include_usage": true or false')
    return {name: boolean(flag) for name, flag in value.items()}


def only(*neutral):
    """For what this server does not do."""

    def rule(value):
        if value not in neutral:
            raise ValueError("left out: this server does not support it")
        return value

    return rule


def ignored(value):
    return value


BOTH = {  # name: (rule, the value if it is left out)
    "model": (text, None), "stream": (boolean, False), "stream_options": (stream_options, {}), "n": (whole(1, 128), 1),
    "max_tokens": (whole(0), None), "stop": (texts(4), []), "seed": (whole(-(2**63), 2**63 - 1), None),
    "temperature": (number(0, 2), 1.0), "top_p": (number(0, 1), 1.0),
    "presence_penalty": (only(0), 0), "frequency_penalty": (only(0), 0), "logit_bias": (only({}), {}),
    **dict.fromkeys(("user", "metadata", "store", "safety_identifier", "prompt_cache_key"), (ignored, None)),
    # beyond OpenAI's, with the names of vLLM's server
    "top_k": (whole(0), 0), "min_p": (number(0, 1), 0.0), "repetition_penalty": (number(0.01, 100), 1.0),
    "min_tokens": (whole(0), 0), "bad_words": (texts(1024), []), "use_beam_search": (boolean, False),
    "best_of": (whole(1, 128), None), "length_penalty": (number(-10, 10), 1.0),
}  # fmt: skip
COMPLETIONS = BOTH | {
    "prompt": (ids_or_texts, [""]), "echo": (boolean, False), "logprobs": (whole(0, 5), None), "suffix": (only(""), ""),
}  # fmt: skip
CHAT = BOTH | {
    "messages": (messages, None), "max_completion_tokens": (whole(0), None), "logprobs": (boolean, False),
    "top_logprobs": (whole(0, 20), None), "response_format": (only({"type": "text"}), None), "tools": (only([]), None),
    "tool_choice": (only("none", "auto"), None), "parallel_tool_calls": (ignored, None), "functions": (only([]), None),
    "modalities": (only(["text"]), None), "service_tier": (ignored, None), "reasoning_effort": (only(), None),
}  # fmt: skip


def parse(body, table):
    """The values of a request, a SimpleNamespace with every name of the table. Raises Problem naming the parameter."""
    if not isinstance(body, dict):
        raise Problem(400, "the body must be a JSON object")
    if unknown := [name for name in body if name not in table]:
        raise Problem(400, f"unknown parameter: {unknown[0]!r:.80}", unknown[0][:80], "unknown_parameter")
    values = {name: default for name, (_, default) in table.items()}
    for name, value in body.items():
        if value is not None:
            try:
                values[name] = table[name][0](value)
            except ValueError as allowed:
                raise Problem(400, f"{name} must be {allowed}, not {value!r:.60}", name) from None
    for name in {"model", "messages"} & table.keys():
        if values[name] is None:
            raise Problem(400, f"you must give {name}", name, "missing_required_parameter")
    found = SimpleNamespace(**values)
    for name, message in contradictions(found, table):
        raise Problem(400, message, name)
    return found


def contradictions(values, table):
    """Yields (name, message) for each parameter that has no effect, or none that is meant, beside another."""
    if values.stream_options and not values.stream:
        yield "stream_options", "stream_options needs stream: true"
    if table is CHAT and values.top_logprobs is not None and not values.logprobs:
        yield "top_logprobs", "top_logprobs needs logprobs: true"
    if values.use_beam_search:
        if values.stream or values.stop or values.logprobs or getattr(values, "echo", False):
            yield "use_beam_search", "use_beam_search goes without stream, stop, logprobs and echo"
        if (values.best_of or values.n) < values.n:
            yield "best_of", f"best_of, the number of beams, must be n, {values.n}, or more"
    elif values.best_of not in (None, values.n):
        yield "best_of", f"best_of is for use_beam_search; without it all n, {values.n}, are returned"


def temperature_of(values):
    """Below 1e-5 a temperature is 0: greedy."""
    return values.temperature if values.temperature >= 1e-5 and math.isfinite(values.temperature) else 0.0
