"""What GET /metrics shows, in Prometheus' text format: what comes in, what is waiting and running, and how fast."""

import time

import prometheus_client as prometheus

SECONDS = [1e-3 * 2**i for i in range(17)]  # the limits of the histograms: 1 ms to 65 s


class Metrics:
    def __init__(self, scheduler):
        self.registry = prometheus.CollectorRegistry()

        def make(kind, name, *text, **settings):
            return kind(f"gpt2_{name}", *text, registry=self.registry, **settings)

        self.requests = make(prometheus.Counter, "requests", "Responses, by address and status", ["path", "status"])
        self.tokens = make(prometheus.Counter, "tokens", "Tokens of prompts (in) and of new text (out)", ["direction"])
        self.first = make(prometheus.Histogram, "time_to_first_token_seconds", "From request to token", buckets=SECONDS)
        self.each = make(
            prometheus.Histogram, "time_per_token_seconds", "Between two tokens of a text", buckets=SECONDS
        )
        waiting, active = (
            make(prometheus.Gauge, "queue", "Texts waiting"),
            make(prometheus.Gauge, "slots", "Slots used"),
        )
        waiting.set_function(lambda: len(scheduler.waiting))
        active.set_function(lambda: scheduler.batch.n_slots - scheduler.batch.n_free())

    def text(self):
        return prometheus.generate_latest(self.registry)

    async def observe(self, events, jobs):
        """Yields the events of a request, and takes their times."""
        last, before = {}, time.perf_counter()
        self.tokens.labels("in").inc(sum(job.n_prompt for job in jobs))
        try:
            async for event in events:
                now = time.perf_counter()
                histogram = self.each if event.job in last else self.first
                histogram.observe(now - last.get(event.job, before))
                last[event.job] = now
                yield event
        finally:
            await events.aclose()
            self.tokens.labels("out").inc(sum(n for job in jobs for _, n, _ in job.results()))
