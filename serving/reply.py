"""From the Events of a request's jobs to its answer: one JSON object, or a stream of server-sent events.

In a stream each event is a line `data: {chunk}` and an empty line; `data: [DONE]` is the last. An error in the middle
of a stream is such an event too, as the status has been sent by then.

Source: OpenAI's API reference, "Chat Completions" and "Completions (legacy)".
"""

import itertools
import json
import secrets
import time

from starlette.responses import JSONResponse, Response, StreamingResponse

from inference.scheduling import BeamJob, Closed, QueueFull
from serving.parameters import Problem

FINISH_REASONS = {None: None, "length": "length", "n_ctx": "length", "stop": "stop", "end_of_text": "stop"}


def as_problem(error):
    """The Problem that tells a client of an exception."""
    if isinstance(error, QueueFull):
        return Problem(429, str(error), code="queue_full")
    if isinstance(error, Closed):
        return Problem(503, str(error), code="shutting_down")
    if isinstance(error, ValueError):
        return Problem(400, str(error), code="invalid_value")
    return Problem(500, f"the server failed at this request: {type(error).__name__}", code="internal_error")


class Reply:
    def __init__(self, name, tokenizer, values, jobs, chat):
        self.tokenizer, self.values, self.jobs, self.chat = tokenizer, values, jobs, chat
        kind = "chat.completion" + ".chunk" * values.stream if chat else "text_completion"
        head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", "object": kind}
        self.head = head | {"created": int(time.time()), "model": name}
        self.echoed = [self.tokenizer.decode(job.ids[: job.n_prompt]) if values.echo else "" for job in jobs]

    async def send(self, incoming):
        """The response. It waits for the first Event, as a request may fail before its first token."""
        if (first := await anext(incoming, None)) is None:
            return Response(status_code=499)  # the client has gone
        if not first.error and self.values.stream:
            lines, headers = self.lines(first, incoming), {"Cache-Control": "no-cache"}
            return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
        events = [first] if first.error else [first, *[event async for event in incoming]]
        for event in events:
            if event.error:
                raise as_problem(event.error)
        return JSONResponse(self.head | {"choices": self.choices(events), "usage": self.usage()})

    def choices(self, events):
        tokens, found = {job: [*job.prompt_tokens] for job in self.jobs}, []
        for event in events:
            tokens[event.job] += event.tokens
        for job, echoed in zip(self.jobs, self.echoed, strict=True):
            for text, _, reason in job.results():
                content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": echoed + text}
                found.append(self.choice(len(found), content, job, tokens[job], reason))
        return found

    def choice(self, index, content, job, tokens, reason=None):
        logprobs = None
        if job.n_candidates is not None and tokens:
            logprobs = (chat_logprobs if self.chat else completion_logprobs)(self.tokenizer, tokens)
        return {"index": index} | content | {"logprobs": logprobs, "finish_reason": FINISH_REASONS[reason]}

    # ---- A stream ----

    async def lines(self, first, incoming):
        """Yields the lines of a stream."""
        usage, started, error = self.values.stream_options.get("include_usage"), set(), first.error
        async for event in chain(first, incoming):
            if error := event.error:
                await incoming.aclose()
                break
            for choice in self.deltas(event, started):
                yield line(self.head | {"choices": [choice]} | ({"usage": None} if usage else {}))
        if error:
            yield line(as_problem(error).body)
        elif usage:
            yield line(self.head | {"choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    def deltas(self, event, started):
        """Yields the choices of an Event's chunks: at first the role or the echo, then new text, then the reason."""
        job, i = event.job, self.jobs.index(event.job)
        if job not in started and (self.chat or self.echoed[i]):
            first = {"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": self.echoed[i]}
            yield self.choice(i, first, job, job.prompt_tokens)
        started.add(job)
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


async def chain(first, others):
    yield first
    async for event in others:
        yield event


def line(data):
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


# ---- Log-probabilities, from TokenInfos ----


def spell(tokenizer, i):
    """(text, bytes) of a token. A part of a character is spelled in hexadecimal, as OpenAI does. A model may have more
    logits than its tokenizer has tokens: those have no bytes."""
    data = tokenizer.token_bytes(i) if i in tokenizer.spellings else b""
    try:
        return data.decode("utf-8"), data
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


def chat_logprobs(tokenizer, tokens):
    def entry(i, log_probability):
        text, data = spell(tokenizer, i)
        return {"token": text, "logprob": max(log_probability, -9999.0), "bytes": list(data)}

    found = [
        entry(t.id, t.log_probability) | {"top_logprobs": [*itertools.starmap(entry, t.candidates)]} for t in tokens
    ]
    return {"content": found, "refusal": None}


def completion_logprobs(tokenizer, tokens):
    best = [dict(t.candidates) | {t.id: t.log_probability} if t.candidates else None for t in tokens]
    return {
        "tokens": [spell(tokenizer, t.id)[0] for t in tokens],
        "token_logprobs": [
            t.log_probability and max(t.log_probability, -9999.0) for t in tokens
        ],  # JSON has no infinity
        "top_logprobs": [b and {spell(tokenizer, i)[0]: max(p, -9999.0) for i, p in b.items()} for b in best],
        "text_offset": [t.offset for t in tokens],
    }
