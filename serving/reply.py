"""From the Events of a request's jobs to its answer: one JSON object, or a stream of server-sent events.

In a stream each event is a line `data: {chunk}` and an empty line, and `data: [DONE]` is the last. An error in the
middle of a stream is an event too, as the status has been sent by then.
"""

import json

from starlette.responses import JSONResponse, Response, StreamingResponse

from inference.scheduling import BeamJob, Closed, QueueFull
from serving import formats
from serving.formats import Problem


def as_problem(error):
    """The Problem that tells a client of an exception in its job."""
    if isinstance(error, QueueFull):
        return Problem(429, str(error), code="queue_full")
    if isinstance(error, Closed):
        return Problem(503, str(error), code="shutting_down")
    if isinstance(error, ValueError):
        return Problem(400, str(error))
    return Problem(500, f"the server failed at this request: {type(error).__name__}")


class Reply:
    def __init__(self, service, values, jobs, chat):
        self.tokenizer, self.values, self.jobs, self.chat = service.tokenizer, values, jobs, chat
        self.head = formats.new_head(chat, values.stream, service.name)
        prompts = [self.tokenizer.decode(job.ids[: job.n_prompt]) for job in jobs if getattr(values, "echo", False)]
        self.echoed = prompts or [""] * len(jobs)

    async def send(self, incoming):
        """The response. It waits for the first Event, as a request may fail before its first token."""
        first = await anext(incoming, None)
        if first is None:
            return Response(status_code=499)  # the client has gone
        if first.error:
            await incoming.aclose()
            raise as_problem(first.error)
        if self.values.stream:
            lines, headers = self.lines(first, incoming), {"Cache-Control": "no-cache"}
            return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
        tokens = {job: [*job.prompt_tokens] for job in self.jobs}
        tokens[first.job] += first.tokens
        async for event in incoming:
            if event.error:
                await incoming.aclose()
                raise as_problem(event.error)
            tokens[event.job] += event.tokens
        return JSONResponse(self.head | {"choices": self.choices(tokens), "usage": self.usage()})

    def choices(self, tokens):
        choose, found = formats.chat_choice if self.chat else formats.completion_choice, []
        for job, echoed in zip(self.jobs, self.echoed, strict=True):
            for text, _, reason in job.results():
                found.append(choose(len(found), echoed + text, self.logprobs(job, tokens[job]), reason))
        return found

    async def lines(self, first, incoming):
        """Yields the events of a stream."""
        started = set()
        usage = {"usage": None} if self.values.stream_options.get("include_usage") else {}
        try:
            for choice in self.deltas(first, started):
                yield line(self.head | {"choices": [choice]} | usage)
            async for event in incoming:
                if event.error:
                    yield line(as_problem(event.error).body())
                    break
                for choice in self.deltas(event, started):
                    yield line(self.head | {"choices": [choice]} | usage)
            else:
                if usage:
                    yield line(self.head | {"choices": [], "usage": self.usage()})
        finally:
            await incoming.aclose()
        yield "data: [DONE]\n\n"

    def deltas(self, event, started):
        """Yields the choices of an Event's chunks: at first the role or the echo, then new text, then the reason."""
        i, job, text, tokens = self.jobs.index(event.job), event.job, event.text, event.tokens
        if job not in started:
            started.add(job)
            if self.chat:
                yield formats.chat_delta(i, {"role": "assistant", "content": ""})
            elif self.echoed[i]:
                yield formats.completion_choice(i, self.echoed[i], self.logprobs(job, job.prompt_tokens))
        if text or tokens:
            logprobs = self.logprobs(job, tokens)
            yield (
                formats.chat_delta(i, {"content": text}, logprobs)
                if self.chat
                else formats.completion_choice(i, text, logprobs)
            )
        if event.finish_reason:
            reason = event.finish_reason
            yield (
                formats.chat_delta(i, {}, None, reason) if self.chat else formats.completion_choice(i, "", None, reason)
            )

    def logprobs(self, job, tokens):
        if job.n_candidates is None:
            return None
        if self.chat:
            return formats.chat_logprobs(self.tokenizer, tokens)
        return formats.completion_logprobs(self.tokenizer, tokens)

    def usage(self):
        """Each prompt counts once, however many texts continue it."""
        prompts = self.jobs if isinstance(self.jobs[0], BeamJob) else self.jobs[:: self.values.n]
        n_new = sum(n for job in self.jobs for _, n, _ in job.results())
        return formats.usage(sum(job.n_prompt for job in prompts), n_new, sum(job.n_reused for job in prompts))


def line(data):
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
