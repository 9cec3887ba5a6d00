"""The routes of the page: its files, and what it asks of the model besides OpenAI's API.

    GET /                                               serving/page/index.html, and the other files as /page/NAME
    GET /about                                          the model's name and sizes
    GET /walkthrough?prompt=Once&block=2                what each line of gpt2.py computed (views.py)
    GET /broken?prompt=Once&change=head&block=2&head=0  the same prediction with one thing changed (broken.py)

The files may load nothing from elsewhere and run no code but their own: the Content-Security-Policy says so to the
browser. Both computations run in a thread of their own, one at a time, so that generation goes on.
"""

import asyncio
import functools
from pathlib import Path

import numpy
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import gpt2
from inference.parameters import Refused
from serving import broken, views
from utils import first_ids
from weights.params import tree_map

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " \
         "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
N_CONTINUED = 8  # tokens that a changed model writes
NOT_RECORDED = "The walkthrough records gpt2.py, and another file computes this model. The playground works with it"


def page_routes(service, route):
    """The routes; `route` makes one that checks the client's key."""
    lock = asyncio.Lock()

    async def about(request):
        return JSONResponse(describe(service))

    async def walkthrough(request):
        ids, text = read_prompt(service, request.query_params.get("prompt", ""))
        params, n_head = plain_params(service.model)
        block = read_number(request, "block", len(params["blocks"]))
        async with lock:
            work = functools.partial(views.walkthrough, service.tokenizer, params, n_head, ids, text, block)
            return JSONResponse(await run_in_threadpool(work))

    async def change(request):
        ids, _ = read_prompt(service, request.query_params.get("prompt", ""))
        params, n_head = plain_params(service.model)
        name = request.query_params.get("change", "")
        if name not in broken.CHANGES:
            raise Refused(f"change must be one of {', '.join(broken.CHANGES)}, not {name!r:.40}", "change")
        where = read_number(request, "block", len(params["blocks"])), read_number(request, "head", n_head)
        async with lock:
            work = functools.partial(compare, service.tokenizer, params, n_head, ids, name, *where)
            return JSONResponse(await run_in_threadpool(work))

    return [*static_routes(), route("/about", about), route("/walkthrough", walkthrough), route("/broken", change)]


def static_routes():
    """The files of the page, read once: no request can name another."""

    def answer(path):
        async def send(request):
            return Response(path.read_bytes(), headers=HEADERS, media_type=TYPES[path.suffix])

        return send

    files = [path for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES]
    return [Route("/", answer(FOLDER / "index.html"))] + [Route(f"/page/{file.name}", answer(file)) for file in files]


# ---- What the model is ----


def is_recorded(model):
    return "wpe" in model.params


def describe(service):
    found = {"names": [*service.names], "n_tokens": service.n_tokens, "is_chat": service.template is not None}
    found |= {"is_recorded": is_recorded(service.model), "reason": NOT_RECORDED, "max_tokens": views.MAX_TOKENS}
    changes = [
        {"name": name, "label": change.label, "shows": change.shows, "lines": broken.difference(name)}
        for name, change in broken.CHANGES.items()
    ]
    return found | {"changes": changes, "n_slots": service.scheduler.batch.n_slots}


def plain_params(model):
    """(params as NumPy's own arrays, n_head). Raises Refused for a model that is not gpt2.py's."""
    if not is_recorded(model):
        raise Refused(NOT_RECORDED, "model", "not_recorded")
    n_head = model.init_cache(model.params, 1)[0][0].shape[0]
    return tree_map(numpy.asarray, model.params), n_head


# ---- What may come in ----


def read_prompt(service, text):
    """(ids, text). Raises Refused for a prompt that is too long, or empty if the model cannot start from nothing."""
    try:
        ids = first_ids(service.tokenizer, text)
    except ValueError as error:
        raise Refused(str(error), "prompt") from None
    limit = min(views.MAX_TOKENS, service.n_tokens - 1)
    if len(ids) > limit:
        raise Refused(f"the prompt has {len(ids)} tokens, the walkthrough shows at most {limit}: shorten it", "prompt")
    return ids, text


def read_number(request, name, limit):
    text = request.query_params.get(name, "0")
    if not text.isdecimal() or int(text) >= limit:
        raise Refused(f"{name} must be a whole number from 0 to {limit - 1}, not {text!r:.40}", name)
    return int(text)


# ---- A broken model beside the right one ----


def compare(tokenizer, params, n_head, ids, name, block, head):
    changed = broken.silenced(params, n_head, block, head) if name == "head" else params
    right = prediction(tokenizer, gpt2, params, n_head, ids)
    return {"right": right, "changed": prediction(tokenizer, broken.broken_module(name), changed, n_head, ids)}


def prediction(tokenizer, module, params, n_head, ids):
    """The candidates after a prompt, the mean loss of its tokens, and how the text goes on."""
    with numpy.errstate(all="ignore"):  # a broken model may overflow
        logits = module.gpt2(ids, **params, n_head=n_head)
        found = [entry["loss"] for entry in views.losses(tokenizer, logits, ids)]
        n_new = min(N_CONTINUED, len(params["wpe"]) - len(ids))
        new_ids = module.generate(ids, params, n_head, n_new)
        loss = None if None in found or not found else sum(found) / len(found)
        return {"candidates": views.candidates(tokenizer, logits[-1], 8), "loss": loss, "losses": found,
                "text": tokenizer.decode([i for i in new_ids if i in tokenizer.spellings])}  # fmt: skip
