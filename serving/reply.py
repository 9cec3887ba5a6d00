"""From the Events of a request's jobs to its answer: one JSON object, or a stream of server-sent events.

In a stream each event is a line `data: {chunk}` and an empty line; `data: [DONE]` is the last. An error in the middle
of a stream is such an event too, as the status has been sent by then.

Source: OpenAI's API reference, "Chat Completions" and "Completions (legacy)".
"""

import json
import secrets
import sys
import time

from starlette.responses import JSONResponse, Response, StreamingResponse

from inference.jobs import BeamJob

# fmt: off
STATUSES = {"invalid_api_key": 401, "unknown_host": 403, "model_not_found": 404, "not_found": 404, "not_allowed": 405,
            "too_large": 413, "unsupported_media_type": 415, "queue_full": 429, "internal_error": 500,
            "shutting_down": 503}  # every other code: 400
# fmt: on
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
FINISH_REASONS = {None: None, "length": "length", "stop": "stop", "end_of_text": "stop"}


def explain(error):
    """(HTTP status, body with OpenAI's error object) for an exception, by its attribute `code`."""
    code = getattr(error, "code", "invalid_value" if isinstance(error, ValueError) else "internal_error")
    status, message = STATUSES.get(code, 400), str(error)
    if status == 500:
        print(f"a request failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        message = f"the server failed at this request: {type(error).__name__}"
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": code}}


class Reply:
    def __init__(self, tokenizer, values, jobs, chat):
        self.tokenizer, self.values, self.jobs, self.chat = tokenizer, values, jobs, chat
        kind = "chat.completion" + ".chunk" * values.stream if chat else "text_completion"
        self.head = {"id": "chat" * chat + f"cmpl-{secrets.token_hex(12)}", "object": kind, "model": values.model}
        self.head["created"] = int(time.time())
        self.echoed = [tokenizer.decode(job.ids[: job.n_prompt]) if values.echo else "" for job in jobs]

    async def send(self, incoming):
        """The response. It waits for the first Event, as a request may fail before its first token."""
        event = await anext(incoming, None)
        if self.values.stream and event and not event.error:
            lines, headers = self.lines(event, incoming), {"Cache-Control": "no-cache"}
            return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
        tokens = {job: [*job.prompt_tokens] for job in self.jobs}
        while event:
            if event.error:
                raise event.error
            tokens[event.job] += event.tokens
            event = await anext(incoming, None)
        if not all(job.finish_reason for job in self.jobs):
            return Response(status_code=499)  # the client has gone away
        return JSONResponse(self.head | {"choices": self.choices(tokens), "usage": self.usage()})

    def choices(self, tokens):
        found = []
        for job, echoed in zip(self.jobs, self.echoed, strict=True):
            for text, _, reason in job.results():
                content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": echoed + text}
                found.append(self.choice(len(found), content, job, tokens[job], reason))
        return found

    def choice(self, index, content, job, tokens=(), reason=None):
        describe = chat_logprobs if self.chat else completion_logprobs
        logprobs = describe(self.tokenizer, tokens) if tokens and job.n_candidates is not None else None
        return {"index": index} | content | {"logprobs": logprobs, "finish_reason": FINISH_REASONS[reason]}

    async def lines(self, event, incoming):
        """Yields the lines of a stream."""
        counted = self.values.stream_options.get("include_usage")
        while event and not event.error:
            for choice in self.deltas(event):
                yield line(self.head | {"choices": [choice]} | ({"usage": None} if counted else {}))
            event = await anext(incoming, None)
        if event:
            yield line(explain(event.error)[1])
        elif counted:
            yield line(self.head | {"choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    def deltas(self, event):
        """Yields the choices of an Event's chunks: at first the role or the echo, then new text, then the reason."""
        job, i = event.job, self.jobs.index(event.job)
        if event.is_first and (self.chat or self.echoed[i]):
            first = {"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": self.echoed[i]}
            yield self.choice(i, first, job, job.prompt_tokens)
        if event.text or event.tokens:
            new = {"delta": {"content": event.text}} if self.chat else {"text": event.text}
            yield self.choice(i, new, job, event.tokens)
        if event.finish_reason:
            yield self.choice(i, {"delta": {}} if self.chat else {"text": ""}, job, (), event.finish_reason)

    def usage(self):
        """A prompt counts once, however many texts continue it."""
        prompts = self.jobs if isinstance(self.jobs[0], BeamJob) else self.jobs[:: self.values.n]
        n_prompt, n_new = sum(job.n_prompt for job in prompts), sum(n for job in self.jobs for _, n, _ in job.results())
        counts = {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
        return counts | {"prompt_tokens_details": {"cached_tokens": sum(job.n_reused for job in prompts)}}


def line(data):
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


# ---- Log-probabilities, from TokenInfos ----


def spell(tokenizer, i):
    """The text of a token. A part of a character is spelled in hexadecimal, as OpenAI does."""
    try:
        return token_bytes(tokenizer, i).decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(tokenizer, i))


def token_bytes(tokenizer, i):
    """A model may have more logits than its tokenizer has tokens: those have no bytes."""
    return tokenizer.token_bytes(i) if i in tokenizer.spellings else b""


def chat_logprobs(tokenizer, tokens):
    def entry(i, p):
        return {"token": spell(tokenizer, i), "logprob": finite(p), "bytes": [*token_bytes(tokenizer, i)]}

    found = [entry(*token[:2]) | {"top_logprobs": [entry(*best) for best in token.candidates]} for token in tokens]
    return {"content": found, "refusal": None}


def completion_logprobs(tokenizer, tokens):
    best = [dict([*t.candidates, t[:2]]) if t.candidates else None for t in tokens]
    return {
        "tokens": [spell(tokenizer, t.id) for t in tokens],
        "token_logprobs": [finite(t.log_probability) for t in tokens],
        "top_logprobs": [b and {spell(tokenizer, i): finite(p) for i, p in b.items()} for b in best],
        "text_offset": [t.offset for t in tokens],
    }


def finite(log_probability):
    """JSON has no infinity; OpenAI writes -9999. The first token of a prompt has no log-probability."""
    return None if log_probability is None else max(log_probability, -9999.0)
