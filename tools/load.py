"""How a server copes with many clients: tokens per second and the time to a first token, for each number of clients.

    python -m serving --model_size 124M &
    python -m tools.load http://127.0.0.1:8000 --plot load.png

Every client sends a prompt of its own, reads the answer as a stream, and sends the next. Several servers, separated by
commas, are measured in turn, round after round, so that a slow minute of the machine affects all of them. It works with
any server that speaks OpenAI's API; with --chat through /v1/chat/completions.

At the end a newcomer is measured: the time to its first token among 15 running streams, beside the time alone.
"""

if __name__ == "__main__":  # before the slow imports
    import cli

    cli.leave_on_ctrl_c()

import json
import random
import statistics
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import requests

import cli
from tools.tables import draw, markdown

WORDS = ["a", "boy", "cat", "day", "dog", "end", "far", "girl", "in", "man", "old", "red", "sad", "she", "sun", "tree"]


def main(servers: str = "http://127.0.0.1:8000", *, clients: str = "1,2,4,8,16", n_prompt: int = 32, n_new: int = 32,
         n_newcomer: int = 128, rounds: int = 3, model: str = "", key: str = "none", chat: bool = False,
         plot: str = ""):  # fmt: skip
    """Measures servers that speak OpenAI's API with several numbers of clients.

    Args:
        servers: their addresses, separated by commas
        clients: the numbers of clients, separated by commas
        n_prompt: words of a prompt
        n_new: tokens of an answer
        n_newcomer: words of the prompt of the newcomer
        rounds: how many times each is measured; the tables show medians
        model: its name; left out: the first of each server's list
        key: the API key
        chat: ask /v1/chat/completions, for a server that has no /v1/completions
        plot: a .png file for a picture of the curves
    """
    found = [Server(url.rstrip("/"), model, key, chat) for url in servers.split(",")]
    counts = [int(n) for n in clients.split(",")]
    rates, firsts, newcomers = (defaultdict(lambda: defaultdict(list)) for _ in range(3))
    for i in range(1 + rounds):  # the first round warms up, and does not count
        for server in found:
            for n in counts:
                rate, first = server.run(n, n_prompt, n_new)
                rates[n][server.name].append(rate)
                firsts[n][server.name].append(first)
            alone, among = server.newcomer(n_newcomer, n_new)
            newcomers["newcomer alone"][server.name].append(alone)
            newcomers["newcomer among 15"][server.name].append(among)
            print(f"round {i} of {rounds}: {server.name}", file=sys.stderr)
    rates, firsts = medians(rates), medians(firsts)
    print("\n".join(markdown("clients: tokens/s", written(rates, "{:.1f}"))), end="\n\n")
    print("\n".join(markdown("clients: seconds to a first token", written(firsts | medians(newcomers), "{:.3f}"))))
    if plot:
        draw(plot, {"tokens/s of all clients together": rates, "seconds to the first token": firsts})


def medians(table):
    return {row: {name: statistics.median(v[1:]) for name, v in found.items()} for row, found in table.items()}


def written(table, form):
    return {row: {name: form.format(value) for name, value in found.items()} for row, found in table.items()}


class Server:
    """A server under test, by its address."""

    def __init__(self, url, model, key, chat):
        self.url, self.chat, self.headers = url, chat, {"Authorization": f"Bearer {key}"}
        models = requests.get(f"{url}/v1/models", headers=self.headers, timeout=600).json()
        self.model = model or models["data"][0]["id"]
        self.name, self.rng = f"{self.model} {url.rpartition(':')[2]}", random.Random(0)

    def ask(self, n_prompt, n_new):
        """One request. (seconds to the first token, the time of each piece of text)."""
        prompt = " ".join(self.rng.choices(WORDS, k=n_prompt))
        what = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        body = what | {"model": self.model, "max_tokens": n_new, "stream": True, "temperature": 0}
        url = f"{self.url}/v1/{'chat/' * self.chat}completions"
        started, times = time.perf_counter(), []
        with requests.post(url, json=body, headers=self.headers, stream=True, timeout=600) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith(b"data: {") and self.has_text(json.loads(line[6:])):
                    times.append(time.perf_counter())
        return times[0] - started, times

    def has_text(self, chunk):
        choices = chunk.get("choices") or [{}]
        return bool(choices[0].get("delta", {}).get("content") if self.chat else choices[0].get("text"))

    def run(self, n_clients, n_prompt, n_new, n_each=2):
        """(tokens per second of all clients together, the median of seconds to a first token)."""
        started = time.perf_counter()
        with ThreadPoolExecutor(n_clients) as pool:
            found = list(pool.map(lambda _: self.ask(n_prompt, n_new), range(n_clients * n_each)))
        n_tokens = n_clients * n_each * n_new
        return n_tokens / (time.perf_counter() - started), statistics.median(first for first, _ in found)

    def newcomer(self, n_prompt, n_new):
        """Seconds to the first token of a request, (alone, among 15 that are running)."""
        alone, running = self.ask(n_prompt, 1)[0], [threading.Event() for _ in range(15)]
        with ThreadPoolExecutor(15) as pool:
            streams = [pool.submit(self.hold, event, 8 * n_new) for event in running]
            for event in running:
                event.wait()
            among = self.ask(n_prompt, 1)[0]
            [stream.result() for stream in streams]
        return alone, among

    def hold(self, event, n_new):
        """A stream that says when its first token has come, and goes on."""
        body = {"model": self.model, "prompt": self.rng.choice(WORDS), "max_tokens": n_new, "stream": True}
        if self.chat:
            body |= {"messages": [{"role": "user", "content": body.pop("prompt")}]}
        url = f"{self.url}/v1/{'chat/' * self.chat}completions"
        with requests.post(url, json=body, headers=self.headers, stream=True, timeout=600) as response:
            for line in response.iter_lines():
                if line:
                    event.set()
        event.set()


if __name__ == "__main__":
    cli.run(main, "-m tools.load")
