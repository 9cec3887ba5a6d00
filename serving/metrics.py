"""What GET /metrics shows, in Prometheus' text format: what came in, what is waiting and running, and how fast."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = [1e-3 * 2**i for i in range(17)]  # the limits of the histograms: 1 ms to 65 s


class Metrics:
    def __init__(self, scheduler):
        registry = {"registry": CollectorRegistry()}
        buckets = registry | {"buckets": SECONDS}
        self.text = lambda: generate_latest(registry["registry"])
        self.answers = Counter("gpt2_requests", "Answers, by HTTP status", ["status"], **registry)
        self.tokens = Counter("gpt2_tokens", "Tokens of prompts (in) and new ones (out)", ["way"], **registry)
        self.first = Histogram(
            "gpt2_time_to_first_token_seconds", "From the request to a text's first token", **buckets
        )
        self.next = Histogram("gpt2_time_per_token_seconds", "From a token of a text to its next", **buckets)
        Gauge("gpt2_queue", "Texts that wait", **registry).set_function(lambda: len(scheduler.waiting))
        Gauge("gpt2_slots", "Slots in use", **registry).set_function(lambda: scheduler.batch.n_used())

    def count(self, jobs):
        """Counts the tokens of a request that has ended."""
        self.tokens.labels("in").inc(sum(job.n_prompt for job in jobs))
        self.tokens.labels("out").inc(sum(n for job in jobs for _, n, _ in job.results()))
