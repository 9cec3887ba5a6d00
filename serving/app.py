"""The HTTP server: OpenAI's API over inference/scheduling.py, as a Starlette application.

    app = make_app(Service("3M", tokenizer, model, scheduler, n_tokens=256))

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

from inference.scheduling import Closed, QueueFull, make_jobs
from serving.metrics import CONTENT_TYPE, Metrics
from serving.parameters import CHAT, COMPLETIONS, Problem, parse
from serving.reply import Reply, as_problem
from utils import first_ids

MAX_BODY = 4 << 20  # bytes; far more than the longest prompts of any model here
MAX_TEXTS = 1024  # that one request may ask for
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}


class Service(NamedTuple):
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


def make_app(service):
    metrics, started = Metrics(service.scheduler), int(time.time())

    async def models(request):
        check_name(service, request.path_params.get("name", service.name))
        found = {"id": service.name, "object": "model", "created": started, "owned_by": "local"}
        return JSONResponse(found if "name" in request.path_params else {"object": "list", "data": [found]})

    async def completions(request):
        values = await read_values(request, service, COMPLETIONS)
        inputs = [first_ids(service.tokenizer, p) if isinstance(p, str) else p for p in values.prompt]
        n_new = 16 if values.max_tokens is None else values.max_tokens
        return await answer(request, service, metrics, values, inputs, n_new, values.logprobs)

    async def chat(request):
        values = await read_values(request, service, CHAT)
        if service.render is None:
            raise Problem(400, f"{service.name} has no chat template: use /v1/completions", "model", "no_chat_template")
        ids = service.render(values.messages)
        limits = values.max_completion_tokens, values.max_tokens, max(1, service.n_tokens - len(ids))
        n_new = next(limit for limit in limits if limit is not None)
        n_candidates = (values.top_logprobs or 0) if values.logprobs else None
        return await answer(request, service, metrics, values, [ids], n_new, n_candidates, chat=True)

    async def health(request):
        """For a load balancer, which has no key."""
        is_open = service.scheduler.is_open()
        return JSONResponse({"status": "ok" if is_open else "shutting down"}, 200 if is_open else 503)

    async def show_metrics(request):
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    def route(path, endpoint, method="GET"):
        async def guarded(request):
            authorize(request, service)
            return await endpoint(request)

        return Route(path, health if endpoint is health else guarded, methods=[method])

    routes = [route("/v1/models", models), route("/v1/models/{name:path}", models), route("/health", health),
              route("/metrics", show_metrics), route("/v1/completions", completions, "POST"),
              route("/v1/chat/completions", chat, "POST")]  # fmt: skip
    handlers = dict.fromkeys((Problem, HTTPException, Exception), answer_error)
    return metrics.counting(Starlette(routes=routes, exception_handlers=handlers))


def answer_error(request, error):
    """Every error is OpenAI's error object."""
    if isinstance(error, HTTPException):
        error = Problem(error.status_code, f"{request.method} {request.url.path:.80}: {error.detail}")
    elif not isinstance(error, Problem):
        error = as_problem(RuntimeError(error))
    return JSONResponse(error.body, error.status, HEADERS.get(error.status))


# ---- What may come in ----


def authorize(request, service):
    """Raises Problem for a wrong key, and for another Host than ours: that is what a web page would send whose name was
    made to point to this machine (DNS rebinding)."""
    host = request.url.hostname
    if service.hosts and host not in service.hosts:
        raise Problem(403, f"{host!r:.80} is no name of this server: with --host 0.0.0.0 it would have any")
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(
        key.strip().encode("latin-1"), service.api_key.encode()
    )  # equally long for every key
    if service.api_key and not (kind.lower() == "bearer" and is_right):
        raise Problem(401, "wrong or missing API key: send Authorization: Bearer KEY", code="invalid_api_key")


def check_name(service, name):
    if name != service.name:
        raise Problem(404, f"no model {name!r:.80}: this is {service.name}", "model", "model_not_found")


async def read_values(request, service, table):
    """The checked values of a request."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Problem(415, "send Content-Type: application/json")  # which a form on a web page cannot
    size, parts = 0, []
    async for part in request.stream():  # to its end in any case, as a client that is still sending reads no answer
        size += len(part)
        parts = [*parts, part] if size <= MAX_BODY else []
    if size > MAX_BODY:
        raise Problem(413, f"the body has {size} bytes, more than {MAX_BODY}")
    values = parse(parse_json(b"".join(parts)), table)
    check_name(service, values.model)
    return values


def parse_json(data):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not JSON: {error}", code="invalid_json") from None


def check_inputs(service, values, inputs, n_new, name):
    """Raises Problem for what this model or this server cannot do."""
    n_texts, n_vocab, n_slots = len(inputs) * values.n, service.model.n_vocab, service.scheduler.batch.n_slots
    if n_texts > MAX_TEXTS:
        raise Problem(400, f"n asks for {n_texts} texts, more than {MAX_TEXTS}", "n", "invalid_value")
    if values.use_beam_search and max(values.n, values.best_of or 0) > n_slots:
        raise Problem(400, f"best_of: more beams than the {n_slots} slots of this server", "best_of", "invalid_value")
    if values.min_tokens > n_new:
        raise Problem(400, f"min_tokens must be at most max_tokens, {n_new}", "min_tokens", "invalid_value")
    if bad := [i for ids in inputs for i in ids if not 0 <= i < n_vocab]:
        raise Problem(400, f"{name}: token id {bad[0]} is not in the vocabulary of {n_vocab}", name, "invalid_value")
    if (longest := max(map(len, inputs))) + n_new > service.n_tokens:
        message = f"This model's maximum context length is {service.n_tokens} tokens, but you requested {longest} in "
        raise Problem(400, f"{message}{name} and {n_new} new ones", name, "context_length_exceeded")


# ---- The answer ----


async def answer(request, service, metrics, values, inputs, n_new, n_candidates, chat=False):
    """Generates all texts of a request, and answers at once or in a stream."""
    check_inputs(service, values, inputs, n_new, "messages" if chat else "prompt")
    events, loop = asyncio.Queue(), asyncio.get_running_loop()

    def deliver(event):  # in the scheduler's thread
        with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody listens
            loop.call_soon_threadsafe(events.put_nowait, event)

    jobs = make_jobs(service.tokenizer, service.model, values, inputs, n_new, n_candidates, deliver)
    try:
        service.scheduler.submit(jobs)
    except (QueueFull, Closed) as error:
        raise as_problem(error) from None
    incoming = metrics.timed(receive(request, service.scheduler, jobs, events), jobs)
    return await Reply(service.name, service.tokenizer, values, jobs, chat).send(incoming)


async def receive(request, scheduler, jobs, events):
    """Yields the Events of jobs until all have ended, or the client goes away. In any case they free their slots."""

    async def watch():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        events.put_nowait(None)

    watching, running = asyncio.create_task(watch()), {*jobs}
    try:
        while running and (event := await events.get()) is not None:
            running -= {event.job} if event.finish_reason else set()
            yield event
    finally:
        watching.cancel()
        scheduler.cancel(running)
