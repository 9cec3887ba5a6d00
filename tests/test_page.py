"""The page that python -m serving shows: what the server sends, and what a browser makes of it (marker `browser`).

The browser is Debian's Chromium, driven by Playwright; all tests share one of it and one server.
"""

import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import oracle
from serving_at_work import running
from test_record import PROMPT, by_hand

import gpt2
from inference import sampling
from serving import views
from serving.record import source
from serving.walkthrough import FOLDER, describe, plain_params

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VIEWS = ["playground", "walkthrough", "tokens", "attention", "lens", "loss", "sampling", "cache", "cost", "broken"]
HOSTILE = [
    "<script>document.title = 'hacked'</script>", '"><img src=x onerror="document.title=\'hacked\'">', "<b>bold</b>",
    "<svg onload=alert(1)>", "javascript:alert(1)", "</textarea><script>alert(1)</script>", "<!-- a comment",
    "&lt;script&gt;", "&amp;", "{{7*7}}", "${7*7}", "`${alert(1)}`", "' onfocus='alert(1)", '" autofocus onfocus="x',
    "<style>*{display:none}</style>", "<iframe src=//example.com>", "<base href=//example.com>", "<math><mi>x",
    "</script>", "<a href='javascript:alert(1)'>x</a>", "\u202eright to left", "<details open ontoggle=alert(1)>",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(storyteller):
    with running(storyteller=storyteller, template=None) as found:
        yield found


# ---- What the server sends ----


def test_the_page_is_small_and_may_load_nothing_from_elsewhere(server):
    size, answer = 0, server.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert not re.search(r"unsafe|\*|https?:|data:", policy)
    assert answer.headers["content-type"].startswith("text/html")
    for file in FOLDER.iterdir():
        answer = server.http.get(f"/page/{file.name}")
        assert (answer.status_code, answer.content) == (200, file.read_bytes())
        assert answer.headers["content-security-policy"] == policy
        size += len(answer.content)
    assert size <= 250_000
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/", "/page/x.js"):
        assert server.http.get(path).status_code == 404


@pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda file: file.name)
def test_the_files_of_the_page(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert not re.search(
        r"(https?:)?//(?!www\.w3\.org/)[a-z]+\.", re.sub(r"^\s*//.*|  // .*", "", text, flags=re.MULTILINE)
    )
    if file.suffix == ".html":
        assert not re.search(r"\bstyle=|\bon[a-z]+=|<script>|<style", text)


def walkthrough(server, **values):
    return server.http.get("/walkthrough", params=values)


@pytest.mark.parametrize(
    ("path", "values", "expected"),
    [
        ("walkthrough", {"prompt": "dog " * 70}, "at most 64: shorten it"),
        ("walkthrough", {"prompt": "a", "block": "6"}, "block must be a whole number from 0 to 5, not '6'"),
        ("walkthrough", {"prompt": "a", "block": "-1"}, "block must be a whole number from 0 to 5"),
        ("broken", {"prompt": "a", "change": "everything"}, "change must be one of mask, scale"),
        ("broken", {"prompt": "a", "change": "head", "head": "x"}, "head must be a whole number from 0 to 5"),
    ],
)
def test_what_cannot_be_shown_is_said(server, path, values, expected):
    answer = server.http.get(f"/{path}", params=values)
    assert answer.status_code == 400
    assert expected in answer.json()["error"]["message"]


def test_an_empty_prompt_and_one_token(server):
    found = walkthrough(server).json()
    assert (found["ids"], found["pieces"], found["losses"]) == ([2047], [], [])
    assert server.http.get("/broken", params={"change": "mask"}).json()["right"]["loss"] is None
    assert walkthrough(server, prompt="x" * 3000).status_code == 400


def test_every_backend_and_dtype_can_be_recorded(storyteller):
    for backend in ("jax", "numpy"):
        with running(backend, storyteller, template=None) as other:
            params, n_head = plain_params(other.service.model)
            assert n_head == 6
            assert np.array_equal(params["wte"], storyteller[2]["wte"])
            assert walkthrough(other, prompt="One day").json()["tokens"] == ["One", "␣day"]


def test_a_model_of_another_file_is_said_not_to_be_recorded(server):
    other = server.service.model._replace(params={"wte": None, "blocks": []})
    service = server.service._replace(model=other)
    assert describe(service)["is_recorded"] is False
    with pytest.raises(ValueError, match="another file computes this model"):
        plain_params(service.model)


def test_a_key_protects_the_numbers_but_not_the_files(storyteller):
    with running(storyteller=storyteller, api_key="secret") as other:
        assert other.http.get("/").status_code == other.http.get("/page/page.js").status_code == 200
        for path in ("/about", "/walkthrough", "/broken"):
            assert other.http.get(path).status_code == 401
            assert other.http.get(path, headers={"Host": "evil.example"}).status_code == 403
        assert other.http.get("/about", headers={"Authorization": "Bearer secret"}).json()["is_chat"] is True


def test_the_server_goes_on_while_it_records(server, storyteller):
    """A model that is broken for the page answers as before."""

    def text():
        return server.post({"model": "3M", "prompt": "Once upon a time", "temperature": 0}).json()["choices"][0]["text"]

    before = text()
    for name in ("mask", "residual", "layer_norm", "head"):
        found = server.http.get("/broken", params={"prompt": "Once upon a time", "change": name}).json()
        assert before.startswith(found["right"]["text"])
    assert text() == before


# ---- In a browser ----


@pytest.fixture(scope="module")
def browser():
    playwright = oracle("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class Visitor:
    """A tab of the browser at the page, and what happens in it."""

    def __init__(self, browser, server, **settings):
        self.server, self.requests, self.complaints = server, [], []
        self.context = browser.new_context(**settings)
        self.context.set_default_timeout(600_000)  # tests may be stopped for a while
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda found: self.complaints.append(found.text) if found.type == "error" else None)
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(server.url)
        self.page.wait_for_selector("body[data-ready]")

    def show(self, view, prompt=None):
        """Goes to a view, with a prompt if one is given."""
        if prompt is not None:
            self.page.fill("#prompt", prompt)
        self.page.evaluate(f"location.hash = '{view}'")
        self.page.wait_for_selector(f"nav a[href='#{view}'][aria-current]")
        if prompt is not None:
            self.page.click("#run")
        if view != "playground":
            self.page.wait_for_selector("main h2, main .note")
        self.settle()
        return self.page

    def settle(self):
        self.page.wait_for_selector("main[aria-busy=false]")

    def generate(self, **values):
        """The texts of the playground."""
        self.show("playground")
        self.page.select_option("#field-mode", values.pop("mode", "greedy"))
        for name, value in values.items():
            self.page.fill(f"#field-{name}", str(value))
        self.page.click("#run")
        self.settle()
        return self.page.eval_on_selector_all(".text", "found => found.map(text => text.textContent)")


@pytest.fixture(scope="module")
def visitor(browser, server):
    made = Visitor(browser, server, viewport={"width": 1280, "height": 900})
    yield made
    made.context.close()


@pytest.mark.browser
def test_the_playground_writes_what_the_api_does(visitor, server):
    prompt = "Once upon a time"
    visitor.page.fill("#prompt", prompt)

    def api(**values):
        answer = server.post({"model": "3M", "prompt": prompt, "max_tokens": 15} | values)
        return [choice["text"] for choice in answer.json()["choices"]]

    cases = [
        ({"mode": "greedy", "max_tokens": 15}, {"temperature": 0}),
        ({"mode": "sample", "max_tokens": 15, "seed": 7, "n": 3, "top_p": 0.9},
         {"temperature": 0.8, "seed": 7, "n": 3, "top_p": 0.9}),
        ({"mode": "sample", "seed": 3, "n": 1, "top_p": 1, "repetition_penalty": 1.3, "bad_words": " girl,Lily"},
         {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3, "bad_words": [" girl", "Lily"]}),
        ({"mode": "beams", "max_tokens": 8, "n": 2, "best_of": 3, "repetition_penalty": 1, "bad_words": ""},
         {"temperature": 0, "max_tokens": 8, "n": 2, "best_of": 3, "use_beam_search": True}),
        ({"mode": "greedy", "max_tokens": 15, "stop": "little"}, {"temperature": 0, "stop": ["little"]}),
    ]  # fmt: skip
    for settings, values in cases:
        assert visitor.generate(**settings) == api(**values), settings
    visitor.generate(mode="greedy", max_tokens=5, stop="")
    visitor.page.hover(".text .token:nth-child(2)")
    assert re.search(r"Token 2, .*there.* probability [\d.]+%, rank 1", visitor.page.text_content("#detail"))
    assert visitor.page.locator("#detail tr").count() == 5


@pytest.mark.browser
def test_a_character_of_several_tokens(visitor, server, storyteller):
    with server.writing([*storyteller[0].encode("a 😀 é")]):
        assert visitor.generate(mode="greedy", max_tokens=20) == ["a 😀 é"]


@pytest.mark.browser
def test_the_stop_button_frees_the_slot(visitor, server):
    visitor.show("playground", "One day")
    visitor.page.select_option("#field-mode", "sample")
    visitor.page.fill("#field-min_tokens", "200")
    visitor.page.fill("#field-max_tokens", "240")
    visitor.page.click("#run")
    visitor.page.wait_for_selector(".text .token")
    assert server.scheduler.batch.sequences()
    visitor.page.click("#stop")
    visitor.page.wait_for_selector("text=stopped by you")
    server.wait_until(lambda: not server.scheduler.batch.sequences())
    visitor.page.fill("#field-min_tokens", "0")
    assert visitor.page.locator("#problem").is_hidden()


@pytest.mark.browser
def test_the_request_can_be_copied(visitor, server):
    """What is shown as Python runs, up to the name of the server's address."""
    visitor.generate(mode="sample", max_tokens=6, seed=1, n=1, stop="")
    visitor.page.click("summary")
    code = visitor.page.locator(".copyable pre").nth(1).text_content()
    printed = []
    exec(compile(code, "copied", "exec"), {"print": lambda text, end="": printed.append(text)})
    body = json.loads(re.search(r"-d '(.*)'$", visitor.page.locator(".copyable pre").nth(0).text_content())[1])
    assert "".join(printed) == visitor.page.text_content(".text")
    assert body == {"model": "3M", "prompt": "One day", "max_tokens": 6, "temperature": 0.8, "seed": 1, "stream": True,
                    "logprobs": 5}  # fmt: skip


@pytest.mark.browser
def test_the_walkthrough_shows_the_numbers_of_an_independent_run(visitor, storyteller):
    """20 cells chosen at random: of any line, block and head."""
    tokenizer, hparams, params = storyteller
    ids, rng, seen = tokenizer.encode(PROMPT), random.Random(20), 0
    page, found = visitor.show("walkthrough", PROMPT), source(gpt2.__file__)
    for block in (1, 4):
        page.select_option("#block", str(block))
        visitor.settle()
        expected = by_hand(params, hparams["n_head"], ids, block)
        for function, beginning, name in rng.sample(sorted(expected), 5):
            line = next(i for i, text in enumerate(found.lines, 1)
                        if found.function_of.get(i) == function and text.strip().startswith(beginning))  # fmt: skip
            head = rng.randrange(hparams["n_head"])
            page.select_option("#head", str(head))
            page.click(f"#line-{line} code")
            array = expected[function, beginning, name]
            array = array[head] if array.ndim == 3 else array
            for _ in range(2):
                row = rng.randrange(len(array))
                column = rng.randrange(min(array.shape[1], 64))
                step = math.ceil(array.shape[1] / 64)
                column = min(column, (array.shape[1] - 1) // step)
                text = page.evaluate("([row, column]) => { const figure = document.querySelector('.value .heatmap');"
                                     "figure.move(row, column); return figure.querySelector('output').textContent; }",
                                     [row, column])  # fmt: skip
                shown = float(text.rpartition(": ")[2])
                assert shown == pytest.approx(float(array[row, column * step]), rel=6e-4, abs=1e-6), (function, text)
                seen += 1
    assert seen == 20


@pytest.mark.browser
def test_all_steps_of_the_walkthrough_can_be_shown_by_keyboard(visitor):
    page = visitor.show("walkthrough", "Tom ran")
    n = int(re.search(r"of (\d+)", page.text_content(".steps"))[1])
    page.focus(".source")
    for _ in range(n):
        page.keyboard.press("ArrowDown")
    assert f"step {n} of {n}" in page.text_content(".steps")
    page.click(f"#line-{source(gpt2.__file__).functions['attention'] + 12} code")
    page.focus(".value canvas")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.text_content(".value .readout").startswith("query ␣ran, key Tom: 0.")
    page.click("text=the weights of a head as arcs")
    assert "Attention of block" in page.text_content("h2")


@pytest.mark.browser
def test_the_sliders_do_what_sampling_does(visitor, storyteller):
    tokenizer, hparams, params = storyteller
    page = visitor.show("sampling", PROMPT)
    logits = gpt2.gpt2(tokenizer.encode(PROMPT), **params, n_head=hparams["n_head"])[-1]
    for t, k, p, minimum, coin in [
        (1, 0, 1, 0, 0.5),
        (0.7, 5, 0.9, 0, 0.93),
        (2, 0, 0.8, 0.05, 0.999),
        (0, 0, 1, 0, 0.1),
    ]:
        times = page.evaluate(  # how long each slider takes
            "values => [...document.querySelectorAll('.slider input')].map((input, i) => {"
            "const start = performance.now(); input.value = values[i]; input.dispatchEvent(new Event('input'));"
            "return performance.now() - start; })",
            [t, k, p, minimum, coin],
        )
        assert min(times) <= 100
        warped = sampling.warp(logits.astype(np.float64), sampling.SamplingParams(t, k, p, min_p=minimum))
        chosen = int(sampling.sample(warped, coin))
        expected = gpt2.softmax(warped)
        text = page.text_content(".result")
        assert f"chooses {views.show(tokenizer, chosen)} with" in text, (t, k, p, minimum, coin)
        assert text.endswith(f"{np.isfinite(warped).sum()} tokens are left.") or "1 token is left" in text
        best = np.argsort(-logits)[:12]
        shown = page.eval_on_selector_all(
            ".candidates tbody tr td:last-child", "cells => cells.map(c => c.textContent)"
        )
        for cell, i in zip(shown, best, strict=True):
            if expected[i] == 0:
                assert cell == "out"
            elif expected[i] >= 0.001:
                assert float(cell[:-1]) == pytest.approx(100 * expected[i], abs=0.051)


@pytest.mark.browser
def test_hostile_prompts_are_text(visitor, server):
    tokenizer, groups = server.service.tokenizer, [""]
    for text in HOSTILE:  # as many in one prompt as the page shows
        fits = len(tokenizer.encode(f"{groups[-1]} {text}")) <= views.MAX_TOKENS
        groups = [*groups[:-1], f"{groups[-1]} {text}"] if fits else [*groups, text]
    for prompt in groups:
        page = visitor.show("tokens", prompt)
        shown = page.eval_on_selector_all(".id-token .token", "found => found.map(text => text.textContent)")
        assert shown == [views.show(tokenizer, i) for i in tokenizer.encode(prompt)]
        assert page.locator("main script, main img, main svg[onload], main iframe, main b, main style").count() == 0
    with server.writing(tokenizer.encode(HOSTILE[0] + HOSTILE[1])):
        assert visitor.generate(mode="greedy", max_tokens=200) == [HOSTILE[0] + HOSTILE[1]]
    assert "hacked" not in visitor.page.title()
    assert visitor.complaints == []


@pytest.mark.browser
def test_what_goes_wrong_is_said_in_the_page(visitor):
    page = visitor.show("loss", "dog " * 70)
    assert "at most 64: shorten it" in page.text_content("#problem")
    page = visitor.show("loss", "Tom")
    assert page.locator("#problem").is_hidden()
    assert "has no loss" in page.text_content("main")
    visitor.show("playground")
    page.select_option("#field-mode", "sample")
    page.fill("#field-temperature", "3")
    page.click("#run")
    page.wait_for_selector("text=temperature must be a number from 0 to 2")
    page.fill("#field-temperature", "0.8")
    page.route("**/v1/completions", lambda route: route.abort())
    page.click("#run")
    page.wait_for_selector("text=The server does not answer.")
    page.unroute("**/v1/completions")
    half = {"choices": [{"index": 0, "text": "Half a", "logprobs": None, "finish_reason": None}]}
    page.route(
        "**/v1/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(half)}\n\n"),
    )
    page.click("#run")
    page.wait_for_selector("text=The connection was lost in the middle of the text.")
    assert page.text_content(".text") == "Half a"
    page.unroute("**/v1/completions")
    visitor.complaints[:] = [text for text in visitor.complaints if "Failed to load resource" not in text]
    assert visitor.complaints == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_views_are_accessible_and_complete(browser, server, scheme):
    folder = Path(oracle("axe_playwright_python").__file__).parent
    script = next(folder.rglob("axe.min.js")).read_text(encoding="utf-8")
    size = {"width": 1280, "height": 900} if scheme == "light" else {"width": 390, "height": 844}
    visitor = Visitor(browser, server, viewport=size, color_scheme=scheme)
    visitor.page.evaluate(script)
    visitor.generate(mode="greedy", max_tokens=5)
    for view in VIEWS:
        page = visitor.show(view)
        found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
        serious = [
            (v["id"], [node["html"][:120] for node in v["nodes"]][:3])
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert serious == [], view
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{view} is wider than the screen"
    assert {url.split("/")[2] for url in visitor.requests} == {server.url.split("/")[2]}
    assert visitor.complaints == []
    visitor.context.close()
