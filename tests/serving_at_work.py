"""A server for the tests of serving/, in this process, so that they can look inside."""

import contextlib
import threading
import time

import numpy
from conftest import model_of, oracle

import utils
from inference.jobs import Job
from inference.scheduling import Scheduler

for package in ("starlette", "uvicorn", "prometheus_client"):
    oracle(package)
httpx, openai = oracle("httpx"), oracle("openai")
from serving.__main__ import Server, listen  # noqa: E402
from serving.app import Service, make_app  # noqa: E402


class Template:
    """A chat template for a model that has none."""

    def encode(self, tokenizer, messages):
        if [message["role"] for message in messages[:2]] == ["system", "system"]:
            raise OSError("the chat template fails: two systems")
        return tokenizer.encode("".join(f"{message['content']}\n" for message in messages))


class Running:
    """A server that runs, and what its tests need: .client (openai's), .http, .service, .url."""

    def __init__(
        self,
        model,
        encoder,
        name="3M",
        *,
        adapters=None,
        n_slots=16,
        max_queue=64,
        n_tokens=None,
        grace=5.0,
        **settings,
    ):
        self.scheduler = Scheduler(model, n_slots, n_tokens or model.n_ctx, max_queue, adapters)
        settings = {"template": Template()} | settings
        self.service = Service(
            [name, *(adapters or ())], encoder, model, self.scheduler, n_tokens or model.n_ctx, **settings
        )
        self.listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = Server(make_app(self.service), self.scheduler, grace)
        self.scheduler.start()
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self.thread.start()
        key = settings.get("api_key") or "any"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=300)
        self.http = httpx.Client(base_url=self.url, timeout=300)

    def post(self, body, path="/v1/completions", **settings):
        return self.http.post(path, json=body, **settings)

    @contextlib.contextmanager
    def writing(self, ids):
        """Every text is these ids, whatever the model says, and then ends."""
        accept = Job.accept

        def accept_instead(job, logits):
            logits = numpy.zeros_like(logits)
            logits[[*ids, *ENDING["end_ids"]][len(job.new_ids)]] = 50
            return accept(job, logits)

        Job.accept = accept_instead
        try:
            yield
        finally:
            Job.accept = accept

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    def wait_until(self, condition, seconds=300):
        """Waits for condition(); tests may be stopped for a while, so the limit is generous."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "waited in vain"
            time.sleep(0.002)


@contextlib.contextmanager
def running(backend="numpy", storyteller=None, **settings):
    encoder, hparams, params = storyteller or utils.load_encoder_hparams_and_params("3M")
    server = Running(model_of(params, hparams["n_head"], backend, **ENDING), encoder, **settings)
    try:
        yield server
    finally:
        server.stop()


ENDING = {"end_ids": (2047,), "stop_at_eos": True}
