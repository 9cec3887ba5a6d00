"""The HTTP server: OpenAI's API over inference/scheduling.py, as a Starlette application.

    app = make_app(Service(["3M"], tokenizer, model, scheduler, n_tokens=256))

A request is checked (parameters.py), becomes a Job for each text that it asks for, and its answer is made from the
Events of the jobs (reply.py). All of this runs in one thread, the event loop; the model runs in the scheduler's. Events
come through a queue that needs no limit: there are as many as tokens were asked for. So a client that reads slowly
holds up nobody.
"""

import asyncio
import contextlib
import hmac
import json
import time
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from inference.jobs import make_jobs
from inference.parameters import CHAT, COMPLETIONS, Refused, check, encode, encode_chat, parse
from serving.metrics import Metrics
from serving.reply import Reply, explain
from serving.walkthrough import page_routes

MAX_BODY = 4 << 20  # bytes; far more than the longest prompts of any model here
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}


class Service(NamedTuple):
    """What the application serves.

    names       of the model, and of the adapters of the scheduler's batch
    n_tokens    how many tokens a prompt and its continuation may have together
    template    the model's chat template (inference/chat.py), or None
    hosts       the names that a Host header may have; () is any
    """

    names: list
    tokenizer: Any
    model: Any
    scheduler: Any
    n_tokens: int
    template: Any = None
    api_key: str = ""
    hosts: tuple = LOOPBACK


def make_app(service):
    metrics, started = Metrics(service.scheduler), int(time.time())

    async def models(request):
        check_name(service, name := request.path_params.get("name", service.names[0]))
        found = {n: {"id": n, "object": "model", "created": started, "owned_by": "local"} for n in service.names}
        return JSONResponse(found[name] if request.path_params else {"object": "list", "data": [*found.values()]})

    async def completions(request):
        values = await read_values(request, service, COMPLETIONS)
        inputs, n_new = encode(service.tokenizer, values.prompt), 16 if values.max_tokens is None else values.max_tokens
        return await answer(request, service, metrics, values, inputs, n_new, values.logprobs)

    async def chat(request):
        values = await read_values(request, service, CHAT)
        ids = encode_chat(service.template, service.tokenizer, values.messages)
        limits = values.max_completion_tokens, values.max_tokens, max(1, service.n_tokens - len(ids))
        n_new = next(limit for limit in limits if limit is not None)
        n_candidates = (values.top_logprobs or 0) if values.logprobs else None
        return await answer(request, service, metrics, values, [ids], n_new, n_candidates, chat=True)

    async def health(request):
        status = ("ok", 200) if service.scheduler.is_open() else ("shutting down", 503)
        return JSONResponse({"status": status[0]}, status[1])

    async def show_metrics(request):
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def route(path, endpoint, method="GET"):
        async def counted(request):
            try:
                if endpoint is not health:  # asked by load balancers, which have no key
                    authorize(request, service)
                response = await endpoint(request)
            except Exception as error:
                response = answer_error(request, error)
            metrics.answers.labels(response.status_code).inc()
            return response

        return Route(path, counted, methods=[method])

    routes = [route("/v1/models", models), route("/v1/models/{name:path}", models), route("/health", health),
              route("/metrics", show_metrics), route("/v1/completions", completions, "POST"),
              route("/v1/chat/completions", chat, "POST"), *page_routes(service, route)]  # fmt: skip
    return Starlette(routes=routes, exception_handlers={HTTPException: answer_error})


def answer_error(request, error):
    """Every error is OpenAI's error object."""
    if isinstance(error, HTTPException):
        error = Refused(error.detail, code="not_found" if error.status_code == 404 else "not_allowed")
    status, body = explain(error)
    return JSONResponse(body, status, HEADERS.get(status))


# ---- What may come in ----


def authorize(request, service):
    """Raises Refused for a wrong key, and for another Host than ours: that is what a web page would send whose name was
    made to point to this machine (DNS rebinding)."""
    if service.hosts and request.url.hostname not in service.hosts:
        raise Refused(f"{request.url.hostname!r:.80} is no name of this server", code="unknown_host")
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(key.strip().encode("latin-1"), service.api_key.encode())  # as long for every key
    if service.api_key and not (kind.lower() == "bearer" and is_right):
        raise Refused("wrong or missing API key: send Authorization: Bearer KEY", code="invalid_api_key")


def check_name(service, name):
    if name not in service.names:
        raise Refused(f"no model {name!r:.80}: choose {' or '.join(service.names)}", "model", "model_not_found")


async def read_values(request, service, table):
    """The checked values of a request."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("send Content-Type: application/json", code="unsupported_media_type")  # no web form can
    size, parts = 0, []
    async for part in request.stream():  # to its end in any case, as a client that is still sending reads no answer
        size += len(part)
        parts = [*parts, part] if size <= MAX_BODY else []
    if size > MAX_BODY:
        raise Refused(f"the body has {size} bytes, more than {MAX_BODY}", code="too_large")
    try:
        values = parse(json.loads(b"".join(parts)), table)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}", code="invalid_json") from None
    check_name(service, values.model)
    return values


# ---- The answer ----


async def answer(request, service, metrics, values, inputs, n_new, n_candidates, chat=False):
    """Generates all texts of a request, and answers at once or in a stream."""
    events, loop = asyncio.Queue(), asyncio.get_running_loop()

    def deliver(event):  # in the scheduler's thread
        with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody listens
            loop.call_soon_threadsafe(events.put_nowait, event)

    check(values, inputs, n_new, service.model.n_vocab, service.n_tokens, service.scheduler.batch.n_slots)
    adapter = None if values.model == service.names[0] else values.model
    jobs = make_jobs(service.tokenizer, service.model, values, inputs, n_new, n_candidates, deliver, adapter)
    service.scheduler.submit(jobs)
    incoming = receive(request, service.scheduler, metrics, jobs, events)
    return await Reply(service.tokenizer, values, jobs, chat).send(incoming)


async def receive(request, scheduler, metrics, jobs, events):
    """Yields the Events of jobs until all have ended, or the client goes away. In any case they free their slots."""

    async def watch():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        events.put_nowait(None)

    watching, running = asyncio.create_task(watch()), {*jobs}
    try:
        while running and (event := await events.get()):
            running -= {event.job} if event.finish_reason else set()
            (metrics.first if event.is_first else metrics.next).observe(event.seconds)
            yield event
    finally:
        watching.cancel()
        scheduler.cancel(running)
        metrics.count(jobs)
