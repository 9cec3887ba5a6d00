"""serving/: what OpenAI's own client sees, what a stranger sends, and what becomes of slots."""

import asyncio
import collections
import concurrent.futures
import contextlib
import copy
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, model_of
from serving_at_work import httpx, openai, running
from test_jax import STORY_PROMPTS

import gpt2
from inference.beam import search
from inference.generate import Sequence, generate
from inference.sampling import SamplingParams
from inference.scheduling import QueueFull
from serving.__main__ import main
from training import lora
from weights.params import from_names, named_leaves

ONCE = "Once upon a time"


@pytest.fixture(scope="module")
def server(storyteller):
    with running(storyteller=storyteller) as found:
        yield found


def alone(storyteller, prompt, n_new, params=None, backend="numpy", **settings):
    """The Sequence that the generator for one text makes."""
    encoder, hparams, weights = storyteller
    ids = encoder.encode(prompt) if isinstance(prompt, str) else prompt
    sequence = Sequence(encoder, ids, n_new, params or SamplingParams(), end_ids=(2047,), **settings)
    list(generate(model_of(weights, hparams["n_head"], backend), sequence))
    return sequence


# ---- The table of scenarios, with openai's client ----


class Asked:
    """What a scenario gets: the client with this server's usual arguments, and the text that is expected."""

    def __init__(self, server, storyteller):
        self.server, self.client, self.storyteller = server, server.client, storyteller
        self.encoder = storyteller[0]

    def complete(self, prompt=ONCE, **settings):
        settings = {"max_tokens": 12, "temperature": 0} | settings
        return self.client.completions.create(model="3M", prompt=prompt, **settings)

    def chat(self, *contents, **settings):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents or [ONCE])]
        settings = {"max_tokens": 12, "temperature": 0} | settings
        return self.client.chat.completions.create(model="3M", messages=messages, **settings)

    def expected(self, prompt=ONCE, n_new=12, params=None, **settings):
        return alone(self.storyteller, prompt, n_new, params, **settings)


def models_are_listed(a):
    assert [model.id for model in a.client.models.list()] == ["3M"]
    assert a.client.models.retrieve("3M").object == "model"


def a_completion(a):
    answer, expected = a.complete(), a.expected()
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "3M", "cmpl-")
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 12, 16)


def a_chat(a):
    answer, expected = a.chat(), a.expected(f"{ONCE}\n")
    assert (answer.object, answer.id[:9]) == ("chat.completion", "chatcmpl-")
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"


def a_streamed_completion(a):
    chunks = list(a.complete(stream=True))
    assert {(chunk.id, chunk.created, chunk.object) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "text_completion")
    }
    assert "".join(chunk.choices[0].text for chunk in chunks) == a.expected().text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1].choices[0].text == ""
    assert all(chunk.usage is None for chunk in chunks)


def a_streamed_chat(a):
    first, *chunks, last = a.chat(stream=True)
    assert first.object == "chat.completion.chunk"
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == a.expected(f"{ONCE}\n").text
    assert {chunk.choices[0].delta.role for chunk in chunks} == {None}
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("length", None)


def usage_of_a_stream(a):
    *chunks, last = a.complete(stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (4, 12)


def usage_of_a_streamed_chat(a):
    *_, last = a.chat(stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage.completion_tokens) == ([], 12)


def the_text_ends_by_itself(a):
    answer, expected = a.complete(max_tokens=250), a.expected(n_new=250)
    assert expected.finish_reason == "end_of_text"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, "stop")


def several_texts(a):
    answer = a.complete(n=3, temperature=1, seed=5)
    texts = [a.expected(params=SamplingParams(1.0), seed=5 + i).text for i in range(3)]
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(texts))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 36)


def several_texts_of_a_streamed_chat(a):
    texts = ["", ""]
    for chunk in a.chat(n=2, temperature=1, seed=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [a.expected(f"{ONCE}\n", params=SamplingParams(1.0), seed=3 + i).text for i in range(2)]


def a_list_of_prompts(a):
    prompts = ["Tom had a", "One day, Lily", "The dog"]
    answer = a.complete(prompts)
    assert [choice.text for choice in answer.choices] == [a.expected(prompt).text for prompt in prompts]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def prompts_times_n(a):
    answer = a.complete(["Tom had a", "The dog"], n=2, temperature=1, seed=8)
    texts = [
        a.expected(p, params=SamplingParams(1.0), seed=8 + i).text for p in ("Tom had a", "The dog") for i in (0, 1)
    ]
    assert [choice.text for choice in answer.choices] == texts


def a_prompt_of_ids(a):
    assert a.complete(a.encoder.encode(ONCE)).choices[0].text == a.expected().text


def a_list_of_prompts_of_ids(a):
    ids = [a.encoder.encode("The dog"), a.encoder.encode("Tom had a")]
    assert [c.text for c in a.complete(ids).choices] == [a.expected(i).text for i in ids]


def an_empty_prompt(a):
    answer = a.complete("")
    assert answer.choices[0].text == a.expected([2047]).text


def special_tokens_are_text(a):
    answer = a.complete("<|endoftext|> One day", max_tokens=5)
    assert answer.usage.prompt_tokens == len(a.encoder.encode("<|endoftext|> One day")) > 5


def the_seed_repeats_a_text(a):
    first, second, other = (a.complete(temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert first == second != other
    assert first == a.expected(params=SamplingParams(1.0), seed=1).text
    assert a.complete(temperature=1, seed=-1).choices[0].text


def top_p_and_top_k(a):
    answer = a.complete(temperature=0.9, top_p=0.8, seed=4, extra_body={"top_k": 20, "min_p": 0.05})
    assert answer.choices[0].text == a.expected(params=SamplingParams(0.9, 20, 0.8, min_p=0.05), seed=4).text


def top_p_of_nothing_is_greedy(a):
    assert a.complete(temperature=1, top_p=0).choices[0].text == a.expected().text


def a_stop_text(a):
    text = a.expected().text
    answer = a.complete(stop=text[9:14])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[: text.find(text[9:14])], "stop")


def stop_texts_across_tokens_in_a_stream(a):
    """No piece may show the beginning of a stop text that is completed later."""
    text = a.expected(n_new=20).text
    for start in range(2, 20, 5):
        stop = text[start : start + 11]
        chunks = list(a.complete(stop=["never", stop], stream=True, max_tokens=20))
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.find(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def log_probabilities(a):
    answer = a.complete(logprobs=3).choices[0].logprobs
    ids = a.encoder.encode(ONCE) + a.expected().new_ids
    rows = gpt2.gpt2(ids, **a.storyteller[2], n_head=a.storyteller[1]["n_head"])[3:-1].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    assert answer.tokens == [a.encoder.decode([i]) for i in ids[4:]]
    assert np.abs(np.array(answer.token_logprobs) - rows[range(12), ids[4:]]).max() <= 1e-4
    for top, row in zip(answer.top_logprobs, rows, strict=True):
        best = np.argsort(-row)[:3]
        assert list(top) == [a.encoder.decode([int(i)]) for i in best]
        assert np.abs(np.array(list(top.values())) - row[best]).max() <= 1e-4
    assert answer.text_offset == [len(a.encoder.decode(ids[4:i])) for i in range(4, 16)]


def log_probabilities_of_a_chat(a):
    answer = a.chat(logprobs=True, top_logprobs=2).choices[0]
    assert "".join(entry.token for entry in answer.logprobs.content) == answer.message.content
    for entry in answer.logprobs.content:
        assert bytes(entry.bytes).decode() == entry.token
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert len(entry.top_logprobs) == 2


def log_probabilities_in_a_stream(a):
    whole, streamed = a.complete(logprobs=1).choices[0].logprobs, []
    for chunk in a.complete(logprobs=1, stream=True):
        streamed += chunk.choices[0].logprobs.tokens if chunk.choices[0].logprobs else []
    assert streamed == whole.tokens


def log_probabilities_end_where_a_stop_text_begins(a):
    text = a.expected().text
    answer = a.complete(stop=text[9:14], logprobs=1).choices[0]
    assert "".join(answer.logprobs.tokens).startswith(answer.text)
    assert answer.logprobs.text_offset[-1] < len(answer.text)


def echo(a):
    assert a.complete(echo=True).choices[0].text == ONCE + a.expected().text
    chunks = list(a.complete(echo=True, stream=True))
    assert chunks[0].choices[0].text == ONCE
    assert "".join(chunk.choices[0].text for chunk in chunks) == ONCE + a.expected().text


def log_probabilities_of_a_prompt(a):
    prompt = "Once upon a time there was a little girl named Lily. " * 6  # more than one chunk
    ids = a.encoder.encode(prompt)
    rows = gpt2.gpt2(ids, **a.storyteller[2], n_head=a.storyteller[1]["n_head"])[:-1].astype(np.float64)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    answer = a.complete(prompt, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert (answer.text, len(ids) > 64) == (prompt, True)
    assert answer.logprobs.tokens == [a.encoder.decode([i]) for i in ids]
    assert answer.logprobs.token_logprobs[0] is None
    assert np.abs(np.array(answer.logprobs.token_logprobs[1:]) - rows[range(len(ids) - 1), ids[1:]]).max() <= 1e-4
    assert answer.logprobs.text_offset == [len(a.encoder.decode(ids[:i])) for i in range(len(ids))]


def an_emoji_across_tokens(a):
    """The model is made to write one, as it would not by itself: a character is shown when it is complete."""
    smile = a.encoder.encode("😀")
    assert len(smile) > 1
    with a.server.writing([*smile, *a.encoder.encode(" ok"), *smile]):
        choices = [chunk.choices[0] for chunk in a.complete(stream=True, max_tokens=20, logprobs=0)]
    assert {choice.text for choice in choices} > {"😀", ""}
    assert "".join(choice.text for choice in choices) == "😀 ok😀"
    assert choices[0].logprobs.text_offset == [0] * len(smile)
    assert choices[0].logprobs.tokens[0].startswith("bytes:\\xf0")
    assert choices[-1].finish_reason == "stop"


def a_conversation(a):
    answer = a.chat("Tell me of a dog", "The dog ran", "And then?", max_completion_tokens=5)
    assert answer.choices[0].message.content == a.expected("Tell me of a dog\nThe dog ran\nAnd then?\n", 5).text


def content_in_parts(a):
    parts = [{"type": "text", "text": "Once upon"}, {"type": "text", "text": " a time"}]
    answer = a.client.chat.completions.create(
        model="3M", messages=[{"role": "user", "content": parts}], max_tokens=12, temperature=0
    )
    assert answer.choices[0].message.content == a.expected(f"{ONCE}\n").text


def a_chat_without_a_limit(a):
    answer = a.client.chat.completions.create(model="3M", messages=[{"role": "user", "content": ONCE}], temperature=0)
    expected = a.expected(f"{ONCE}\n", 256 - len(a.encoder.encode(f"{ONCE}\n")))
    assert answer.choices[0].message.content == expected.text


def beams(a):
    encoder, hparams, params = a.storyteller
    found = search(model_of(params, hparams["n_head"]), encoder.encode(ONCE), 12, 4, end_ids=(2047,))
    answer = a.complete(n=2, extra_body={"use_beam_search": True, "best_of": 4})
    assert [choice.text for choice in answer.choices] == [encoder.decode(hypothesis.ids) for hypothesis in found[:2]]


def min_tokens(a):
    short = a.complete(max_tokens=250)
    longer = a.complete(max_tokens=250, extra_body={"min_tokens": short.usage.completion_tokens + 5})
    assert longer.usage.completion_tokens >= short.usage.completion_tokens + 5


def bad_words(a):
    assert "Lily" in a.complete().choices[0].text
    assert "Lily" not in a.complete(extra_body={"bad_words": ["Lily"]}).choices[0].text


def repetition_penalty(a):
    answer = a.complete(max_tokens=40, extra_body={"repetition_penalty": 1.3})
    assert answer.choices[0].text == a.expected(n_new=40, params=SamplingParams(repetition_penalty=1.3)).text


def one_token(a):
    assert a.complete(max_tokens=1).usage.completion_tokens == 1


def the_whole_context(a):
    ids = a.encoder.encode(ONCE) * 60
    answer = a.complete(ids, max_tokens=256 - len(ids))
    assert answer.choices[0].text == a.expected(ids, 256 - len(ids)).text


def raw_responses(a):
    response = a.client.completions.with_raw_response.create(model="3M", prompt=ONCE, max_tokens=2)
    assert response.headers["content-type"] == "application/json"
    assert response.parse().usage.completion_tokens == 2


def the_asynchronous_client(a):
    async def ask(i):
        async with openai.AsyncOpenAI(base_url=f"{a.server.url}/v1", api_key="any") as client:
            answer = await client.completions.create(model="3M", prompt=ONCE, max_tokens=8, temperature=1, seed=i)
            return answer.choices[0].text

    async def ask_all():
        return await asyncio.gather(*(ask(i) for i in range(6)))

    assert asyncio.run(ask_all()) == [a.expected(n_new=8, params=SamplingParams(1.0), seed=i).text for i in range(6)]


def a_stream_that_is_closed_early(a):
    stream = a.complete(stream=True, max_tokens=250, extra_body={"min_tokens": 250})
    next(iter(stream))
    stream.close()
    a.server.wait_until(lambda: a.server.scheduler.batch.n_used() == 0)


def retries(a):
    """The client tries again where the server was too busy."""
    submit, n = a.server.scheduler.submit, []

    def busy(jobs):
        n.append(1)
        if len(n) < 3:
            raise QueueFull("full")
        submit(jobs)

    a.server.scheduler.submit = busy
    try:
        client = a.client.with_options(max_retries=2)
        assert client.completions.create(model="3M", prompt=ONCE, max_tokens=1).choices[0].text
    finally:
        a.server.scheduler.submit = submit
    assert len(n) == 3


SCENARIOS = [
    models_are_listed, a_completion, a_chat, a_streamed_completion, a_streamed_chat, usage_of_a_stream,
    usage_of_a_streamed_chat, the_text_ends_by_itself, several_texts, several_texts_of_a_streamed_chat,
    a_list_of_prompts, prompts_times_n, a_prompt_of_ids, a_list_of_prompts_of_ids, an_empty_prompt,
    special_tokens_are_text, the_seed_repeats_a_text, top_p_and_top_k, top_p_of_nothing_is_greedy, a_stop_text,
    stop_texts_across_tokens_in_a_stream, log_probabilities, log_probabilities_of_a_chat,
    log_probabilities_in_a_stream, log_probabilities_end_where_a_stop_text_begins, echo,
    log_probabilities_of_a_prompt, an_emoji_across_tokens, a_conversation, content_in_parts, a_chat_without_a_limit,
    beams, min_tokens, bad_words, repetition_penalty, one_token, the_whole_context, raw_responses,
    the_asynchronous_client, a_stream_that_is_closed_early, retries,
]  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_openai_client(server, storyteller, scenario):
    scenario(Asked(server, storyteller))


def test_the_code_of_the_documentation(server, capsys):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), re.DOTALL)
    exec("\n".join(code).replace("http://127.0.0.1:8000", server.url), {})
    printed = capsys.readouterr().out
    assert "there was a little girl" in printed
    assert len(code) == 4


# ---- What is refused: openai's error object, with the status and the name of the parameter ----

CHAT = "/v1/chat/completions"
NAMELESS = {"messages": [{"role": "user", "content": "x"}]}
# fmt: off
# (what is sent beside the model and a prompt, or a message; the status; the parameter that is named)
REFUSED = [
    ({"model": "gpt-4"}, 404, "model"), ({"model": None}, 400, "model"), ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"), ({"prompt": 5}, 400, "prompt"), ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": [1, "a"]}, 400, "prompt"), ({"prompt": [True]}, 400, "prompt"), ({"prompt": [2048]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"), ({"prompt": [10**30]}, 400, "prompt"), ({"prompt": [1] * 256}, 400, "prompt"),
    ({"max_tokens": 256}, 400, "prompt"), ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"), ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"), ({"n": 0}, 400, "n"), ({"n": 129}, 400, "n"),
    ({"n": 100, "prompt": ["a"] * 11}, 400, "n"), ({"best_of": 2}, 400, "best_of"),
    ({"temperature": -0.1}, 400, "temperature"), ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"), ({"temperature": 10**400}, 400, "temperature"),
    ({"top_p": 1.1}, 400, "top_p"), ({"top_k": -1}, 400, "top_k"), ({"min_p": 2}, 400, "min_p"),
    ({"seed": 1.5}, 400, "seed"), ({"seed": 2**63}, 400, "seed"), ({"stop": 5}, 400, "stop"),
    ({"stop": ["a"] * 5}, 400, "stop"), ({"stop": [""]}, 400, "stop"), ({"stop": ""}, 400, "stop"),
    ({"stream": "yes"}, 400, "stream"), ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": 1}, 400, "stream_options"), ({"logprobs": 6}, 400, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"), ({"echo": 1}, 400, "echo"), ({"suffix": "end"}, 400, "suffix"),
    ({"logit_bias": {"5": 100}}, 400, "logit_bias"), ({"presence_penalty": 1}, 400, "presence_penalty"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"), ({"min_tokens": 17}, 400, "min_tokens"),
    ({"bad_words": [5]}, 400, "bad_words"), ({"use_beam_search": True, "n": 17}, 400, "best_of"),
    ({"use_beam_search": True, "n": 2, "stream": True}, 400, "use_beam_search"),
    ({"use_beam_search": True, "n": 3, "best_of": 2}, 400, "best_of"), ({"max_token": 5}, 400, "max_token"),
    ({"": 1}, 400, ""),
]
REFUSED_CHATS = [
    ({"messages": None}, 400, "messages"), ({"messages": []}, 400, "messages"), ({"messages": "hi"}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages"), ({"messages": [None]}, 400, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages"),
    ({"messages": [{"role": [], "content": "x"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "dog " * 300}]}, 400, "messages"),
    ({"messages": [{"role": "system", "content": "x"}, {"role": "developer", "content": "y"}]}, 400, "messages"),
    ({"top_logprobs": 2}, 400, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"logprobs": 2}, 400, "logprobs"), ({"tools": [{}]}, 400, "tools"), ({"prompt": "x"}, 400, "prompt"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
]
# fmt: on


def is_refused(response, status, param):
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert error["param"] == param, error


def test_bad_values_are_refused_by_name(server):
    for extra, status, param in REFUSED:
        is_refused(server.post({"model": "3M", "prompt": "x"} | extra), status, param)
    for extra, status, param in REFUSED_CHATS:
        is_refused(server.post({"model": "3M"} | NAMELESS | extra, CHAT), status, param)
    assert server.scheduler.batch.n_used() == 0


JSON = {"Content-Type": "application/json"}
BODIES = [b"", b"null", b"[]", b"5", b"{", b'{"model": NaN}', b'{"a": Infinity}', b"\xff\xfe", b"[" * 100_000,
          b'{"a":' * 50_000, b'"\\ud800"', b"\0" * 10, b'{"model": "3M", "prompt": "x", "temperature": 1e999}',
          b'{"model": "3M", "prompt": "x", "seed": ' + b"9" * 5000 + b"}"]  # fmt: skip


def test_bodies_that_are_no_request(server):
    for body in BODIES:
        response = server.http.post("/v1/completions", content=body, headers=JSON)
        assert response.status_code == 400, body[:20]
        assert response.json()["error"]["type"] == "invalid_request_error"
    is_refused(server.http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}), 415, None)
    is_refused(server.http.post("/v1/completions", content=b" " * (4 << 20) + b"{}", headers=JSON), 413, None)
    is_refused(server.http.get("/v1/completions"), 405, None)
    is_refused(server.http.get("/v1/nothing"), 404, None)
    is_refused(server.http.get("/v1/models/gpt-4"), 404, "model")
    is_refused(server.http.get("/v1/models", headers={"Host": "evil.example:8000"}), 403, None)
    assert "access-control-allow-origin" not in server.http.get("/v1/models", headers={"Origin": "http://x"}).headers
    with contextlib.suppress(httpx.TransportError):  # or the server closes the connection while more is being sent
        flood = server.http.get("/health", headers={f"X-{i}": "y" * 1000 for i in range(1000)})
        assert flood.status_code in (400, 431)
    assert server.http.get("/health").status_code == 200


ERRORS = {
    openai.NotFoundError: {"model": "gpt-4"},
    openai.BadRequestError: {"temperature": 3},
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_by_type(server, kind):
    with pytest.raises(kind) as caught:
        server.client.completions.create(**({"model": "3M", "prompt": "x"} | ERRORS[kind]))
    assert caught.value.param in ERRORS[kind]


def test_all_tokens_banned_is_the_clients_mistake(server, monkeypatch):
    every = tuple((i,) for i in range(2048))
    monkeypatch.setattr(
        "inference.jobs.Job._coin", lambda job: setattr(job, "sampling_params", banning(job, every)) or 0.5
    )
    with pytest.raises(openai.BadRequestError, match="every token is banned"):
        server.client.completions.create(model="3M", prompt="x", max_tokens=3)
    monkeypatch.undo()
    assert server.post({"model": "3M", "prompt": "x"}).status_code == 200


def banning(job, words):
    return job.sampling_params._replace(bad_words=words)


# ---- Mutations ----

# fmt: off
ODD = [None, True, -1, 0, 2**40, 1.5, 1e308, "", "x", "\ud800", "\0", [], [[]], {}, {"a": []}, [None], "é" * 3000, [5]]
GOOD = {"model": "3M", "prompt": "x", "max_tokens": 2, "temperature": 1.0, "top_p": 0.9, "n": 1, "stop": ["."],
        "seed": 3, "stream": False, "logprobs": 1, "echo": False, "top_k": 3, "min_tokens": 1, "bad_words": ["y"],
        "user": "me"}
GOOD_CHAT = NAMELESS | {"model": "3M", "max_tokens": 2, "logprobs": True, "top_logprobs": 1, "stream": True,
                        "stream_options": {"include_usage": True}}
# fmt: on


def mutated(rng):
    """(path, body): a good request with one to three odd values, at any depth."""
    path, body = rng.choice([("/v1/completions", GOOD), (CHAT, GOOD_CHAT)])
    body = json.loads(json.dumps(body))
    for _ in range(rng.randrange(1, 4)):
        place, key = body, rng.choice([*body, "odd"])
        while isinstance(place.get(key), dict) and place[key] and rng.random() < 0.5:
            place = place[key]
            key = rng.choice([*place])
        place[key] = copy.deepcopy(rng.choice(ODD))
        if rng.random() < 0.2:
            place.pop(key)
    return path, body


def check_mutations(server, n, seed):
    rng = random.Random(seed)
    statuses = collections.Counter()
    for _ in range(n):
        path, body = mutated(rng)
        response = server.http.post(path, content=json.dumps(body).encode(), headers=JSON)
        statuses[response.status_code] += 1
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code != 200:
            error = response.json()["error"]
            assert error["param"] is not None, (body, error)
    assert min(statuses[200], statuses[400]) > n / 20, statuses


def test_mutations(server):
    check_mutations(server, 60, seed=0)


@pytest.mark.trial
def test_500_mutations(server):
    check_mutations(server, 500, seed=1)


# ---- Keys ----


def test_a_server_with_a_key(storyteller):
    with running(storyteller=storyteller, api_key="secret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            is_refused(server.http.get("/v1/models", headers=headers), 401, None)
            is_refused(server.http.get("/metrics", headers=headers), 401, None)
            is_refused(server.post({"model": "3M", "prompt": "x"}, headers=headers), 401, None)
        is_refused(server.http.get("/v1/models", headers={"Authorization": "Bearer sécret".encode()}), 401, None)
        assert server.http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert server.http.get("/health").json() == {"status": "ok"}
        with pytest.raises(openai.AuthenticationError):
            server.client.with_options(api_key="wrong").models.list()


def test_adapters_are_models_of_their_own(storyteller):
    """Beside the base model, in the same batch, and with the same prompt, whose cache they do not share."""
    encoder, hparams, params = storyteller
    rng, name = np.random.default_rng(0), "blocks.2.mlp.c_fc"
    leaves = {f"{name}.lora_{part}": 0.3 * rng.normal(size=shape).astype(np.float32)
              for part, shape in (("a", (192, 4)), ("b", (4, 768)))}  # fmt: skip
    merged = lora.merge(from_names(named_leaves(params) | leaves))
    prompt = "Once upon a time there was a little girl named Lily. She had a red ball and a dog. One day"
    with running(storyteller=storyteller, adapters={"poet": leaves}) as server:
        assert [model.id for model in server.client.models.list()] == ["3M", "poet"]

        def ask_model(name):
            answer = server.client.completions.create(model=name, prompt=prompt, max_tokens=20, temperature=0)
            assert answer.model == name
            return answer.choices[0].text

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = list(pool.map(ask_model, ["3M", "poet"] * 3))
    expected = [alone((encoder, hparams, weights), prompt, 20).text for weights in (params, merged)]
    assert expected[0] != expected[1]
    assert found == expected * 3


def test_a_model_without_a_template(storyteller):
    with running(storyteller=storyteller, template=None) as server:
        is_refused(server.post({"model": "3M"} | NAMELESS, CHAT), 400, "model")


# ---- Many at once ----


def shapes(encoder, n, seed):
    """n requests of random shape, greedy and sampled."""
    rng = random.Random(seed)
    ids = encoder.encode(" ".join(STORY_PROMPTS))
    for i in range(n):
        start, length = rng.randrange(len(ids)), rng.choice([1, 3, 10, 60, 100])
        prompt = (ids[start:] + ids)[:length]
        extra = (
            {"temperature": 0} if i % 2 else {"temperature": 0.9, "seed": i, "top_p": 0.9, "extra_body": {"top_k": 40}}
        )
        yield {"prompt": prompt, "max_tokens": rng.randrange(1, 60), "logprobs": 0} | extra


def ask(server, request):
    choice = server.client.completions.create(model="3M", **request).choices[0]
    return choice.text, choice.finish_reason, choice.logprobs.tokens, choice.logprobs.token_logprobs


def check_alone_and_together(server, requests):
    """Each request alone, then all from 16 clients in another order."""
    apart = [ask(server, request) for request in requests]
    order = random.Random(3).sample(range(len(requests)), len(requests))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = dict(zip(order, pool.map(lambda i: ask(server, requests[i]), order), strict=True))
    for i, one in enumerate(apart):
        assert together[i][:3] == one[:3], requests[i]
        assert np.abs(np.subtract(together[i][3], one[3])).max(initial=0) <= 1e-4


def test_a_request_alone_and_among_others(server, storyteller):
    check_alone_and_together(server, list(shapes(storyteller[0], 16, seed=0)))


@pytest.mark.trial
@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_many_requests_alone_and_among_others(storyteller, backend):
    with running(backend, storyteller=storyteller) as server:
        check_alone_and_together(server, list(shapes(storyteller[0], 400, seed=1)))


def test_a_full_queue(storyteller):
    with running(storyteller=storyteller, n_slots=1, max_queue=1) as server:
        held = server.client.completions.create(model="3M", prompt="x", max_tokens=250, stream=True,
                                                extra_body={"min_tokens": 250})  # fmt: skip
        next(iter(held))
        waiting = threading.Thread(target=server.post, args=({"model": "3M", "prompt": "y", "max_tokens": 1},))
        waiting.start()
        server.wait_until(lambda: server.scheduler.waiting or not server.scheduler.batch.n_used())
        response = server.post({"model": "3M", "prompt": "z", "max_tokens": 1})
        is_refused(response, 429, None)
        assert response.headers["retry-after"] == "1"
        held.close()
        waiting.join()
        assert server.post({"model": "3M", "prompt": "z", "max_tokens": 1}).status_code == 200


def test_metrics(storyteller):
    with running(storyteller=storyteller) as server:
        server.post({"model": "3M", "prompt": ONCE, "max_tokens": 3, "temperature": 0})
        server.post({"model": "gpt-4", "prompt": ONCE})
        lines = server.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    expected = {
        'gpt2_requests_total{status="200"}': 1, 'gpt2_requests_total{status="404"}': 1,
        "gpt2_queue": 0, "gpt2_slots": 0,
        'gpt2_tokens_total{way="in"}': 4, 'gpt2_tokens_total{way="out"}': 3,
        "gpt2_time_to_first_token_seconds_count": 1, "gpt2_time_per_token_seconds_count": 2,
    }  # fmt: skip
    assert {name: float(values[name]) for name in expected} == expected


# ---- Clients that go away ----


def test_clients_that_go_away_free_their_slots(server):
    """While they wait for the whole text, in the middle of a stream, and in the queue."""
    before = server.scheduler.batch.n_used()
    endless = {"model": "3M", "prompt": "x", "max_tokens": 250, "min_tokens": 250, "n": 10}
    for body in (endless, endless | {"stream": True}, endless | {"n": 40}):
        with (
            server.http.stream("POST", "/v1/completions", json=body, timeout=300)
            if body.get("stream")
            else (pytest.raises(httpx.ReadTimeout))
        ):
            if not body.get("stream"):
                httpx.post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(300, read=0.05))
        server.wait_until(lambda: server.scheduler.batch.n_used() == before and not server.scheduler.waiting)


# ---- Faults ----


def plant(server, error):
    """The next step of the model fails."""
    batch = server.scheduler.batch
    step = batch.step

    def fail():
        batch.step = step
        raise error

    batch.step = fail


@pytest.mark.parametrize("error", [RuntimeError("planted"), MemoryError(), KeyError("x")])
def test_an_exception_in_the_worker(server, capfd, error):
    """Every client hears of it, and the next request is served."""
    stream = server.client.completions.create(model="3M", prompt="x", max_tokens=250, stream=True,
                                              extra_body={"min_tokens": 250})  # fmt: skip
    next(iter(stream))
    plant(server, error)
    with pytest.raises(openai.APIError, match=f"failed at this request: {type(error).__name__}"):
        list(stream)
    assert server.post({"model": "3M", "prompt": "x", "max_tokens": 2}).status_code == 200
    assert capfd.readouterr().err.count("a step failed") == 1


def test_an_exception_before_the_first_token_is_a_500(server, capfd):
    plant(server, RuntimeError("planted"))
    is_refused(server.post({"model": "3M", "prompt": "x"}), 500, None)
    assert "planted" in capfd.readouterr().err


def test_shutting_down(storyteller):
    """What runs may finish within `grace` seconds, what waits is told to go elsewhere."""
    with running(storyteller=storyteller, n_slots=1, grace=600) as server:
        request = {"model": "3M", "max_tokens": 200, "extra_body": {"min_tokens": 200}}
        held = server.client.completions.create(prompt="x", stream=True, **request)
        next(iter(held))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.post, {"model": "3M", "prompt": "y"})
            server.wait_until(lambda: server.scheduler.waiting)
            server.server.should_exit = True
            is_refused(waiting.result(), 503, None)
        assert [chunk.choices[0].finish_reason for chunk in held][-1] == "length"
        server.stop()
        assert not server.scheduler.thread.is_alive()


def test_shutting_down_without_grace(storyteller):
    with running(storyteller=storyteller, grace=0) as server:
        held = server.client.completions.create(model="3M", prompt="x", max_tokens=250, stream=True,
                                                extra_body={"min_tokens": 250})  # fmt: skip
        next(iter(held))
        server.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(held)


# ---- Soak ----


def memory():
    """The resident memory of this process in MB."""
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def behave(server, kinds, rng):
    """One request of a client: a good one, one that it goes away from, or rubbish. Returns what was wrong."""
    request, expected = kinds[rng.randrange(len(kinds))]
    body = {"model": "3M"} | request
    body |= body.pop("extra_body", {})
    fate = rng.choice(["whole", "whole", "stream", "leave", "rubbish", "stream"])
    with httpx.Client(base_url=server.url, timeout=600) as http:
        if fate == "rubbish":
            path, body = mutated(rng)
            response = http.post(path, content=json.dumps(body).encode(), headers=JSON)
            return response.text if response.status_code not in (200, 400, 404, 429) else None
        if fate == "whole":
            response = http.post("/v1/completions", json=body)
            while response.status_code == 429:
                time.sleep(0.05)
                response = http.post("/v1/completions", json=body)
            return response.text if response.status_code != 200 or answered(response.json()) != expected else None
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            text = ""
            for n, line in enumerate(response.iter_lines()):
                if fate == "leave" and n > rng.randrange(8):
                    return None
                if line.startswith("data: {") and response.status_code == 200:
                    text += json.loads(line[6:])["choices"][0]["text"]
            return text if response.status_code == 200 and text != expected else None


def answered(answer):
    return answer["choices"][0]["text"]


def soak(server, encoder, n, n_clients):
    kinds = [(request, ask(server, request)[0]) for request in shapes(encoder, min(40, n // 4), seed=9)]
    rng, wrong, sizes = random.Random(4), [], []
    seeds = [rng.random() for _ in range(n)]
    with concurrent.futures.ThreadPoolExecutor(n_clients) as pool:
        for found in pool.map(lambda seed: behave(server, kinds, random.Random(seed)), seeds):
            wrong += [found] if found else []
            sizes.append(memory())
    server.wait_until(lambda: server.scheduler.batch.n_used() == 0 and not server.scheduler.waiting)
    answers = dict(re.findall(r'gpt2_requests_total{status="(\d+)"} (\S+)', server.http.get("/metrics").text))
    print(f"\n{answers}, memory {sizes[min(199, n - 1)]:.0f} MB after 200 requests, {sizes[-1]:.0f} MB at the end")
    assert wrong == []
    assert [status for status in answers if status.startswith("5")] == []
    return sizes


def test_a_short_soak(storyteller):
    with running(storyteller=storyteller) as fresh:
        soak(fresh, storyteller[0], 40, 8)


@pytest.mark.trial
@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_a_soak_of_2000_requests(storyteller, backend):
    with running(backend, storyteller=storyteller) as server:
        sizes = soak(server, storyteller[0], 2000, 32)
        assert abs(sizes[-1] - sizes[199]) <= 20


# ---- The program ----


class Program:
    """python -m serving in a process of its own."""

    def __init__(self, *flags):
        words = [sys.executable, "-m", "serving", "--model_size", "3M", *flags]
        self.process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.line = self.process.stderr.readline()
        self.url = re.search(r"http://\S+", self.line)[0]

    def complete(self, n_new=2):
        """The pieces of a stream, and how it ended: None, or the exception of the client."""
        client, pieces = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=600), []
        try:
            for chunk in client.completions.create(model="3M", prompt="x", max_tokens=n_new, stream=True,
                                                   extra_body={"min_tokens": n_new}):  # fmt: skip
                pieces.append(chunk.choices[0])
            return pieces, None
        except (openai.APIError, httpx.HTTPError) as error:
            return pieces, error
        except Exception as error:  # the client may use another version of httpx
            return pieces, error


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_sigterm_under_load():
    """Every client gets a proper last event: a finish_reason, or an error. The status is 0."""
    program = Program("--port", "0", "--grace", "0.3", "--max_batch", "2")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(program.complete, 250) for _ in range(4)]
        while "gpt2_slots 2.0" not in httpx.get(f"{program.url}/metrics", timeout=300).text:
            time.sleep(0.01)
        program.process.send_signal(signal.SIGTERM)
        for client in clients:
            pieces, error = client.result(timeout=300)
            assert "shutting down" in str(error) or pieces[-1].finish_reason == "length"
    assert program.process.wait(300) == 0
    assert program.process.stderr.read() == ""


def test_sigkill_and_restart():
    program = Program("--port", "0")
    port = program.url.rpartition(":")[2]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        client = pool.submit(program.complete, 250)
        time.sleep(0.3)
        program.process.kill()
        assert client.result(timeout=300)[1] is not None
    program.process.wait(300)
    program.process.stderr.close()
    again = Program("--port", port)
    assert again.complete()[0][-1].finish_reason == "length"
    again.process.send_signal(signal.SIGINT)
    assert again.process.wait(300) == 130
    assert again.process.stderr.read() == ""


def test_bad_flags(command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        (tmp_path / "hparams.json").write_text("{}")
        for status, flags, message in [
            (1, ["--port", port], f"cannot listen at --host 127.0.0.1 --port {port}"),
            (1, ["--port", "0", "--host", "192.0.2.1"], "cannot listen at --host 192.0.2.1"),
            (2, ["--port", "70000"], "--port 70000 is out of range"),
            (2, ["--port", "0", "--model_size", "4M"], "no model '4M'"),
            (1, ["--port", "0", "--model_size", str(tmp_path)], str(tmp_path)),
            (2, ["--port", "0", "--max_model_len", "257"], "--max_model_len 257 is more than n_ctx 256"),
            (2, ["--max_batch", "0"], "--max_batch 0 must be 1 to 1024"),
            (2, ["--grace", "-1"], "--grace -1.0"),
            (2, ["--port", "0", "--adapter", "poet"], "--adapter 'poet': give NAME=FOLDER"),
            (2, ["--port", "0", "--adapter", "poet=nowhere"], "no adapter folder 'nowhere'"),
            (2, ["--backend", "cupy"], "unknown backend 'cupy'"),
            (2, ["--dtype", "int8"], "int8"),
        ]:
            found, out, err = command(*(["--model_size", "3M"] * ("--model_size" not in flags)), *flags, main=main)
            assert (found, out, err.count("\n")) == (status, "", 1), err
            assert message in err
