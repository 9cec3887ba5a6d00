"""The JSON of OpenAI's API: responses, chunks of a stream and errors. Pure functions: from what was generated to dicts.

Completions and chat differ in the names of almost everything, so each has its own functions, side by side here.
Source: OpenAI's API reference, "Chat Completions" and "Completions (legacy)".
"""

import itertools
import secrets
import time

FINISH_REASONS = {None: None, "length": "length", "n_ctx": "length"}  # every other is "stop"
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Problem(Exception):
    """An answer that is an error: the HTTP status, and the fields of OpenAI's error object."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self):
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def new_head(chat, stream, model):
    """The fields that all chunks of a response have in common."""
    name = "chat.completion" + ".chunk" * stream if chat else "text_completion"
    prefix = "chatcmpl" if chat else "cmpl"
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": name, "created": int(time.time()), "model": model}


def finish_reason(reason):
    return FINISH_REASONS.get(reason, "stop")


def usage(n_prompt, n_new, n_reused):
    total = {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
    return total | {"prompt_tokens_details": {"cached_tokens": n_reused}}


# ---- Choices ----


def chat_choice(index, text, logprobs, reason):
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(reason)}


def chat_delta(index, delta, logprobs=None, reason=None):
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason(reason)}


def completion_choice(index, text, logprobs=None, reason=None):
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(reason)}


# ---- Log-probabilities, from TokenInfos of inference/scheduling.py ----


def token_text(tokenizer, i):
    """The text of a token. One that is a part of a character is spelled as bytes, as OpenAI does."""
    data = token_bytes(tokenizer, i)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_bytes(tokenizer, i):
    """A model may have more logits than its tokenizer has tokens: those have no bytes."""
    return tokenizer.token_bytes(i) if i in tokenizer.spellings else b""


def chat_logprobs(tokenizer, tokens):
    def entry(i, log_probability):
        data = token_bytes(tokenizer, i)
        return {"token": token_text(tokenizer, i), "logprob": at_least(log_probability), "bytes": list(data)}

    content = [
        entry(token.id, token.log_probability) | {"top_logprobs": list(itertools.starmap(entry, token.candidates))}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer, tokens, offset=0):
    """offset: the number of characters before the text that the tokens' own offsets count from."""
    found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        best = dict(token.candidates) if token.log_probability is not None else None
        if best:
            best |= {token.id: token.log_probability}
        found["tokens"].append(token_text(tokenizer, token.id))
        found["token_logprobs"].append(at_least(token.log_probability))
        found["top_logprobs"].append(best and {token_text(tokenizer, i): at_least(p) for i, p in best.items()})
        found["text_offset"].append(offset + token.offset)
    return found


def at_least(log_probability):
    """JSON has no minus infinity; OpenAI writes -9999.0."""
    return log_probability if log_probability is None else max(log_probability, -9999.0)
