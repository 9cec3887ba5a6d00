"""What GET /metrics shows, in Prometheus' text format: what came in, what is waiting and running, and how fast."""

import time

import prometheus_client as prometheus
from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE

SECONDS = [1e-3 * 2**i for i in range(17)]  # the limits of the histograms: 1 ms to 65 s

__all__ = ["CONTENT_TYPE", "Metrics"]


class Metrics:
    def __init__(self, scheduler):
        own = {"registry": prometheus.CollectorRegistry()}
        self.text = lambda: prometheus.generate_latest(own["registry"])
        self.requests = prometheus.Counter("gpt2_requests", "Answers, by HTTP status", ["status"], **own)
        self.tokens = prometheus.Counter("gpt2_tokens", "Tokens of prompts (in) and new ones (out)", ["way"], **own)
        own["buckets"] = SECONDS
        self.first = prometheus.Histogram("gpt2_time_to_first_token_seconds", "From the request to a token", **own)
        self.next = prometheus.Histogram("gpt2_time_per_token_seconds", "From a token of a text to its next", **own)
        del own["buckets"]
        prometheus.Gauge("gpt2_queue", "Texts that wait", **own).set_function(lambda: len(scheduler.waiting))
        prometheus.Gauge("gpt2_slots", "Slots in use", **own).set_function(lambda: scheduler.batch.n_used())

    async def timed(self, events, jobs):
        """Yields the events of jobs, and takes their times."""
        seen, started = {}, time.perf_counter()
        self.tokens.labels("in").inc(sum(job.n_prompt for job in jobs))
        try:
            async for event in events:
                now = time.perf_counter()
                (self.next if event.job in seen else self.first).observe(now - seen.get(event.job, started))
                seen[event.job] = now
                yield event
        finally:
            await events.aclose()
            self.tokens.labels("out").inc(sum(n for job in jobs for _, n, _ in job.results()))

    def counting(self, app):
        """An application that counts the answers of `app`."""

        async def counted(scope, receive, send):
            async def send_counted(message):
                if message["type"] == "http.response.start":
                    self.requests.labels(message["status"]).inc()
                await send(message)

            await app(scope, receive, send_counted)

        return counted
