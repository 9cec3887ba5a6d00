"""The HTTP server: OpenAI's API over inference/scheduling.py, as a Starlette application.

    app = make_app(Service(name="3M", tokenizer=tokenizer, model=model, scheduler=scheduler, n_tokens=256))

A request passes through five steps: check it (parameters.py), make a Job for each text that it asks for, submit the
jobs, receive their Events through a queue, answer (formats.py). All of this runs in one thread, the event loop; the
model runs in the scheduler's. A queue needs no limit of its own: there are as many Events as tokens were asked for, so
a client that reads slowly holds up nobody.
"""

import asyncio
import contextlib
import hmac
import json
import time
from dataclasses import dataclass, field
from typing import Any

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from inference.scheduling import Closed, QueueFull
from serving.formats import Problem
from serving.jobs import check_prompts, make_jobs
from serving.metrics import Metrics
from serving.parameters import CHAT, COMPLETIONS, parse
from serving.reply import Reply, as_problem
from utils import first_ids

MAX_BODY = 4 << 20  # bytes; far more than the longest prompts of any model here
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass
class Service:
    """What the application serves.

    n_tokens    how many tokens a prompt and its continuation may have together
    render      (messages) -> ids, by the model's chat template; None if it has none
    hosts       the names that a Host header may have; () is any
    """

    name: str
    tokenizer: Any
    model: Any
    scheduler: Any
    n_tokens: int
    render: Any = None
    api_key: str = ""
    hosts: tuple = LOOPBACK
    started: int = field(default_factory=lambda: int(time.time()))


def make_app(service):
    handlers = {Problem: answer_problem, HTTPException: answer_http_exception, Exception: answer_exception}
    routes = [
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", show_model),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", complete_chat, methods=["POST"]),
        Route("/health", show_health),
        Route("/metrics", show_metrics),
    ]
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.service, app.state.metrics = service, Metrics(service.scheduler)
    return app


# ---- Endpoints ----


async def list_models(request):
    service = authorize(request)
    return JSONResponse({"object": "list", "data": [describe(service)]})


async def show_model(request):
    service = authorize(request)
    check_name(service, request.path_params["name"])
    return JSONResponse(describe(service))


def describe(service):
    return {"id": service.name, "object": "model", "created": service.started, "owned_by": "local"}


def check_name(service, name):
    if name != service.name:
        raise Problem(404, f"no model {name!r:.80}: this server has {service.name!r}", "model", "model_not_found")


async def show_health(request):
    """For a load balancer, which has no key. 503 once the server is shutting down."""
    alive = request.app.state.service.scheduler.is_open()
    return JSONResponse({"status": "ok" if alive else "shutting down"}, 200 if alive else 503)


async def show_metrics(request):
    authorize(request)
    return Response(request.app.state.metrics.text(), media_type=prometheus.CONTENT_TYPE_LATEST)


async def complete(request):
    service, values = await read_request(request, COMPLETIONS)
    encoded = [first_ids(service.tokenizer, p) if isinstance(p, str) else p for p in values.prompt]
    n_candidates, n_new = values.logprobs, 16 if values.max_tokens is None else values.max_tokens
    return await answer(request, values, encoded, n_new, n_candidates, chat=False)


async def complete_chat(request):
    service, values = await read_request(request, CHAT)
    if service.render is None:
        raise Problem(400, f"{service.name} has no chat template: use /v1/completions", "messages", "no_chat_template")
    ids = service.render(values.messages)
    most = values.max_tokens if values.max_completion_tokens is None else values.max_completion_tokens
    n_new = max(1, service.n_tokens - len(ids)) if most is None else most
    n_candidates = (values.top_logprobs or 0) if values.logprobs else None
    return await answer(request, values, [ids], n_new, n_candidates, chat=True)


# ---- What may come in ----


def authorize(request):
    """The Service. Raises Problem for a wrong key, and for a Host header with another name than ours: a web page whose
    name was made to point to this machine would send that (DNS rebinding)."""
    service = request.app.state.service
    host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
    if service.hosts and host not in service.hosts:
        raise Problem(403, f"Host {host!r:.80} is not a name of this server: start it with --host to serve others")
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(key.strip().encode("utf-8", "replace"), service.api_key.encode())
    if service.api_key and not (kind.lower() == "bearer" and right):  # the comparison takes equally long for all keys
        raise Problem(401, "wrong or missing API key: send Authorization: Bearer KEY", code="invalid_api_key")
    return service


async def read_request(request, table):
    """(the Service, the checked values of the request)."""
    service = authorize(request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Problem(415, "send the request as Content-Type: application/json")  # a form of any web page could not
    size, parts = 0, []
    async for part in request.stream():  # read to its end in any case, or the client would not read our answer
        size += len(part)
        parts = [*parts, part] if size <= MAX_BODY else []
    if size > MAX_BODY:
        raise Problem(413, f"the body has {size} bytes, more than {MAX_BODY}")
    values = parse(parse_json(b"".join(parts)), table)
    check_name(service, values.model)
    return service, values


def parse_json(data):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not JSON: {error}") from None


# ---- From jobs to an answer ----


async def answer(request, values, encoded, n_new, n_candidates, chat):
    """Generates all texts of a request and answers, at once or in a stream."""
    service, events, loop = request.app.state.service, asyncio.Queue(), asyncio.get_running_loop()
    check_prompts(service, values, encoded, n_new, chat)

    def deliver(event):  # in the scheduler's thread
        with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody listens
            loop.call_soon_threadsafe(events.put_nowait, event)

    jobs = make_jobs(service, values, encoded, n_new, n_candidates, deliver)
    try:
        service.scheduler.submit(jobs)
    except (QueueFull, Closed) as error:
        raise as_problem(error) from None
    incoming = receive(request, service.scheduler, jobs, events)
    return await Reply(service, values, jobs, chat).send(request.app.state.metrics.observe(incoming, jobs))


async def receive(request, scheduler, jobs, events):
    """Yields the Events of the jobs until all have ended. Ends early if the client goes away. However it ends, no job
    keeps its slot."""

    async def watch():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        scheduler.cancel(jobs)
        events.put_nowait(None)

    watching, open_jobs = asyncio.create_task(watch()), {*jobs}
    try:
        while open_jobs and (event := await events.get()) is not None:
            if event.finish_reason:
                open_jobs.discard(event.job)
            yield event
    finally:
        watching.cancel()
        if open_jobs:
            scheduler.cancel(open_jobs)


def answer_problem(request, problem):
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(problem.status)
    return JSONResponse(problem.body(), problem.status, headers)


def answer_http_exception(request, error):
    messages = {404: f"no such address: {request.method} {request.url.path:.80}",
                405: f"{request.method} is not allowed at {request.url.path:.80}"}  # fmt: skip
    problem = Problem(error.status_code, messages.get(error.status_code, error.detail))
    return JSONResponse(problem.body(), error.status_code, error.headers)


def answer_exception(request, error):
    return JSONResponse(Problem(500, f"the server failed at this request: {type(error).__name__}").body(), 500)
