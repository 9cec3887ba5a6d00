"""A queue in front of a batch: requests come from any thread, one thread computes them all.

    scheduler = Scheduler(model, n_slots=16, n_tokens=1024, max_queue=64)
    scheduler.start()
    scheduler.submit([Job(tokenizer, ids, 40, deliver=print)])       # prints an Event for each new token

Only the scheduler's thread calls the model, as neither a Batch nor a cache may be used by two threads. First come,
first served: a job waits until all jobs before it have got a slot. The thread never waits for a client: an Event is
handed to `deliver`, which must return at once, and there are at most as many as tokens were asked for.
"""

import codecs
import collections
import functools
import sys
import threading
import time
from typing import Any, NamedTuple

import numpy

from inference import sampling
from inference.batching import Batch, capacities
from inference.beam import Search
from inference.generate import Sequence
from utils import ids_without_token

CHUNK = 64  # tokens of prompts that a step computes


class QueueFull(Exception):
    """As many jobs are waiting as max_queue allows."""


class Closed(Exception):
    """The scheduler is shutting down."""


class Event(NamedTuple):
    """What a step has brought for a job."""

    job: Any
    text: str  # new text, which may be ""
    tokens: list  # TokenInfos, if they are kept, of the text so far that were not in an earlier event
    finish_reason: str | None  # not None in the last event; "error": then `error` is an exception
    error: Exception | None = None


class TokenInfo(NamedTuple):
    id: int
    log_probability: float | None  # by the model, before any processor; None for the first id of a prompt
    candidates: tuple  # (id, log-probability) of the likeliest tokens
    offset: int  # where its text begins, in characters


class Job(Sequence):
    """A Sequence that somebody waits for.

    deliver          called with an Event after each new token, in the scheduler's thread
    n_candidates     how many candidates to keep of each token; None: no TokenInfos at all
    prompt_tokens    the TokenInfos of the prompt, if needs_prompt_logits
    n_reused         how many ids of the prompt were found in the cache of another sequence
    """

    def __init__(self, *args, deliver, n_candidates=None, needs_prompt_logits=False, **settings):
        super().__init__(*args, **settings)
        self.deliver, self.n_candidates, self.needs_prompt_logits = deliver, n_candidates, needs_prompt_logits
        self.n_prompt = len(self.ids)
        self.error, self.n_reused, self._unsent, self.prompt_tokens, self._n_echoed = None, 0, [], [], 0
        if needs_prompt_logits:
            self.prompt_tokens = [TokenInfo(self.ids[0], None, (), 0)]
            self._offsets = text_offsets(self.tokenizer, self.ids)
            self._n_echoed = len(self.tokenizer.decode(self.ids))

    def accept(self, logits):
        offset = self._n_echoed + len(self.text)
        try:
            piece = super().accept(logits)
        except (ValueError, FloatingPointError) as error:  # of this sequence; the others go on
            self.error, self.finish_reason = error, "error"
            return ""
        if self.n_candidates is not None and self.finish_reason != "end_of_text":
            self._unsent.append(TokenInfo(self.chosen, *self._look_up(self.logits, self.chosen), offset))
        return piece

    def accept_prompt(self, logits, start):
        """Keeps what the model said of the prompt's ids after `start`: logits [n, n_vocab], one row for each id."""
        for i, row in enumerate(logits[: len(self.ids) - 1 - start], start + 1):
            found = self._look_up(numpy.asarray(row, numpy.float64), self.ids[i])
            self.prompt_tokens.append(TokenInfo(self.ids[i], *found, self._offsets[i]))

    def _look_up(self, logits, chosen):
        log_probabilities = logits - logits.max()
        log_probabilities -= numpy.log(numpy.exp(log_probabilities).sum())
        n = min(self.n_candidates or 0, len(logits))
        best = numpy.argpartition(-logits, n - 1)[:n] if n else []
        best = sorted(best, key=lambda i: (-logits[i], i))
        return float(log_probabilities[chosen]), tuple((int(i), float(log_probabilities[i])) for i in best)

    def results(self):
        """[(text, how many new ids, finish_reason)]: one. A beam search has several."""
        return [(self.text, len(self.new_ids), self.finish_reason)]

    def event(self, piece):
        """The Event after a step. A token is held back as long as its text is."""
        limit = self.n_shown if self.finish_reason in (None, "stop") else float("inf")
        ready = [token for token in self._unsent if token.offset - self._n_echoed < limit]
        self._unsent = self._unsent[len(ready) :]
        return Event(self, piece, ready, self.finish_reason, self.error)


class BeamJob(Search):
    """A beam search that somebody waits for, for its n_results best texts. They are complete in the last Event."""

    n_candidates, prompt_tokens = None, ()

    def __init__(self, tokenizer, *args, deliver, n_results, **settings):
        super().__init__(*args, **settings)
        self.tokenizer, self.deliver, self.n_results = tokenizer, deliver, n_results
        self.n_prompt, self.error, self.n_reused = len(self.inputs), None, 0

    def results(self):
        return [
            (self.tokenizer.decode(found.ids), len(found.ids), "end_of_text" if found.ended else "length")
            for found in self.hypotheses[: self.n_results]
        ]

    def accept(self, logits):
        try:
            return super().accept(logits)
        except (ValueError, FloatingPointError) as error:
            self.error, self.finish_reason = error, "error"
            return ""

    def event(self, piece):
        return Event(self, piece, [], self.finish_reason, self.error)


def text_offsets(tokenizer, ids):
    """For each id, where its text begins in the text of all, in characters."""
    decoder, offsets, n = codecs.getincrementaldecoder("utf-8")(errors="replace"), [], 0
    for i in ids:
        offsets.append(n)
        n += len(decoder.decode(tokenizer.token_bytes(i)))
    return offsets


def make_jobs(tokenizer, model, values, inputs, n_new, n_candidates, deliver):
    """The Jobs of a request: for each of `inputs`, lists of ids, values.n Jobs, the i-th (from 0) with seed + i,
    or a BeamJob. `values` has the parameters of the request by their names in serving/parameters.py."""
    cold = values.temperature < 1e-5 or values.use_beam_search
    words = [space + word.strip() for word in values.bad_words for space in ("", " ")]
    params = sampling.SamplingParams(
        *((0.0, 0, 1.0) if cold else (values.temperature, values.top_k, max(values.top_p, 1e-6))),
        values.repetition_penalty, values.min_tokens, tuple(tuple(tokenizer.encode(word)) for word in words),
        model.end_ids, 0.0 if cold else values.min_p, banned=ids_without_token(tokenizer, model.n_vocab, model.end_ids),
    )  # fmt: skip
    common = {"params": params, "end_ids": model.end_ids, "deliver": deliver}
    if values.use_beam_search and (n_beams := max(values.n, values.best_of or 0)) > 1:
        common |= {"length_penalty": values.length_penalty, "n_results": values.n}
        return [BeamJob(tokenizer, ids, n_new, n_beams, **common) for ids in inputs]
    common |= {"stop": values.stop, "n_candidates": n_candidates}
    common["needs_prompt_logits"] = values.echo and n_candidates is not None
    seeds = [None if values.seed is None else (values.seed + i) % 2**64 for i in range(values.n)]
    return [Job(tokenizer, ids, n_new, seed=seed, **common) for ids in inputs for seed in seeds]


# ---- The queue ----


class Scheduler:
    """n_slots, n_tokens: of its Batch. max_queue: how many jobs may wait for a slot."""

    def __init__(self, model, n_slots, n_tokens, max_queue):
        settings = {"chunk": CHUNK, "capacities": capacities(model, n_tokens), "n_kept": n_slots}
        self.make_batch, self.max_queue = functools.partial(Batch, model, n_slots, n_tokens, **settings), max_queue
        self.batch, self.waiting, self.cancelled = self.make_batch(), collections.deque(), set()
        self.changed = threading.Condition()  # guards waiting, cancelled and deadline
        self.deadline = None  # when the running jobs are ended; None as long as the scheduler is open
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self):
        self.thread.start()

    def submit(self, jobs):
        """Puts jobs at the end of the queue. Raises QueueFull and Closed."""
        with self.changed:
            if not self.is_open():
                raise Closed("the server is shutting down")
            if len(self.waiting) >= self.max_queue + self.batch.n_free():
                raise QueueFull(f"{len(self.waiting)} requests are waiting already: try again later")
            self.waiting.extend(jobs)
            self.changed.notify()

    def is_open(self):
        return self.deadline is None and self.thread.is_alive()

    def cancel(self, jobs):
        """Nobody waits for these jobs any more: their slots are free after the step that is being computed."""
        with self.changed:
            self.cancelled.update(jobs)
            self.changed.notify()

    def close(self, grace):
        """Ends the jobs that are waiting, lets the running ones go on for up to `grace` seconds, then ends them too.
        Returns at once; thread.join() waits for the end."""
        with self.changed:
            self.deadline = time.monotonic() + grace
            self.changed.notify()

    def _run(self):
        while self._wait():
            try:
                with self.changed:
                    self._admit()
                for job, piece in self.batch.step():
                    job.deliver(job.event(piece))
            except Exception as error:  # whatever it is, the clients hear of it, and the next request is served
                print(
                    f"a step failed, so its requests did: {type(error).__name__}: {error}", file=sys.stderr, flush=True
                )
                self._fail(self.batch.sequences(), error)
                self.batch = self.make_batch()  # as the step may have left a broken cache

    def _wait(self):
        """Waits until there is work. False when the scheduler has been closed and no job is left."""
        with self.changed:
            while self.deadline is None and not (self.waiting or self.batch.sequences()):
                self.changed.wait()
            if self.deadline is None:
                return True
            ended = [*self.waiting]
            self.waiting.clear()
            if time.monotonic() >= self.deadline:
                ended += self.batch.sequences()
        self._fail(ended, Closed("the server is shutting down"))
        return bool({*self.batch.sequences()} - {*ended})

    def _admit(self):
        """Moves jobs from the queue to the batch, and takes out those that nobody waits for."""
        if self.cancelled:
            self.waiting = collections.deque(job for job in self.waiting if job not in self.cancelled)
            for job in self.cancelled.intersection(self.batch.sequences()):
                self.batch.remove(job)
            self.cancelled.clear()
        while self.waiting and self.waiting[0].n_slots <= self.batch.n_free():
            job = self.waiting.popleft()
            try:
                self.batch.add(job)
            except ValueError as error:  # too long for a slot
                self._fail([job], error)

    def _fail(self, jobs, error):
        for job in jobs:
            job.deliver(Event(job, "", [], "error", error))
