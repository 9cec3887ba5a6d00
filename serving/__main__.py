"""OpenAI's HTTP API over a model: python -m serving --model_size 3M"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import signal
import socket
import sys

try:
    import uvicorn

    from serving.app import LOOPBACK, Service, make_app
except ModuleNotFoundError as missing:
    print(f"serving needs {missing.name}: python3 -m pip install -r requirements-serving.txt", file=sys.stderr)
    sys.exit(2)

import backends
import cli
import utils
from inference import model as models
from inference.parameters import find_template
from inference.scheduling import Scheduler
from weights.params import find_dtype


# fmt: off
def main(*, model_size: str = "", models_dir: str = "", base_url: str = "", backend: str = "numpy",
         dtype: str = "float32", adapter: list = (), host: str = "127.0.0.1", port: int = 8000, max_batch: int = 16,
         max_queue: int = 64, max_model_len: int = 0, api_key: str = "", warm_up: bool = True, grace: float = 10.0):
    # fmt: on
    """Serves a model to any client of OpenAI's API, many at once.

    Args:
        model_size: 124M, 355M, 774M, 1558M, 3M or a model folder; left out: 124M if it can be had, else 3M
        models_dir: where the folders of models are; left out: models/ beside gpt2.py
        base_url: where to download from; left out: the environment's GPT2_BASE_URL, or OpenAI's address
        backend: numpy, or jax (compiled, and on an accelerator if there is one)
        dtype: float32, bfloat16 (half the memory, 2 to 3 digits) or float64
        adapter: NAME=FOLDER, a LoRA of this model that clients choose as model NAME; may be given several times
        host: the address to listen at; 127.0.0.1: this machine alone; 0.0.0.0: every network, so set an api_key too
        port: the port to listen at; 0: one that is free
        max_batch: how many texts are generated at the same time, 1 to 1024
        max_queue: how many more may wait; one that finds the queue full is told to come again later (429)
        max_model_len: how many tokens a prompt and its continuation may have; 0: n_ctx, all that the model can see
        api_key: what clients must send as their key; left out: none
        warm_up: compile every program before the first request; --nowarm_up: when it is needed
        grace: how many seconds running texts get to finish after SIGTERM or Ctrl-C
    """
    if not (1 <= max_batch <= 1024 and 0 <= grace <= 1e6):
        raise ValueError(f"--max_batch {max_batch} must be 1 to 1024, --grace {grace} 0 to 1,000,000 seconds")
    find_dtype(dtype)
    device = backends.get(backend).setup(dtype)
    listener = listen(host, port)  # before the model is loaded, so that a port in use is known at once
    folder = utils.choose_model(model_size, models_dir, base_url)
    name = folder.name.removesuffix(".gguf") if not model_size or utils.is_path(model_size) else model_size
    tokenizer, model = models.load(str(folder), models_dir, base_url, backend, dtype)
    if max_model_len > model.n_ctx:
        raise ValueError(f"--max_model_len {max_model_len} is more than n_ctx {model.n_ctx}, all the model can see")
    n_tokens = max_model_len or model.n_ctx
    adapters = models.load_adapters(folder, adapter)
    scheduler = Scheduler(model, max_batch, n_tokens, max_queue, adapters)
    for found in scheduler.batch.warm_up() if warm_up else ():  # each takes seconds for a large model
        print(f"\rcompiled: {found:40}", end="\r", file=sys.stderr, flush=True)
    hosts = (*LOOPBACK, host) if host in LOOPBACK else ()  # what listens to a network may have any name there
    names, template = [name, *adapters], find_template(folder)
    app = make_app(Service(names, tokenizer, model, scheduler, n_tokens, template, api_key, hosts))
    cli.unwind_on_ctrl_c()
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn sets its own, and at its end raises the signal once more
    scheduler.start()
    print(f"{device}: {name} at http://{host}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    Server(app, scheduler, grace).run([listener])


def listen(host, port):
    """A socket at an address. Raises OSError if the port is in use."""
    if port > 65535:
        raise ValueError(f"--port {port} is out of range: 0 (any) to 65535")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"cannot listen at --host {host} --port {port}: {error.strerror}") from None


class Server(uvicorn.Server):
    """uvicorn, which at its end waits for the answers that are being sent."""

    def __init__(self, app, scheduler, grace):
        self.scheduler, self.grace = scheduler, grace
        settings = {"timeout_graceful_shutdown": int(grace) + 2, "lifespan": "off", "ws": "none", "http": "h11"}
        super().__init__(uvicorn.Config(app, log_level="error", access_log=False, server_header=False, **settings))

    async def shutdown(self, sockets=None):
        self.scheduler.close(self.grace)
        await super().shutdown(sockets)


if __name__ == "__main__":
    cli.run(main, "-m serving")
