"""A queue in front of a batch: requests come from any thread, one thread computes them all.

    scheduler = Scheduler(model, n_slots=16, n_tokens=1024, max_queue=64)
    scheduler.start()
    scheduler.submit([Job(tokenizer, ids, 40, deliver=print)])       # prints an Event for each new token

Only the scheduler's thread calls the model, as neither a Batch nor a cache may be used by two threads. First come,
first served: a job waits until all jobs before it have got a slot. The thread never waits for a client: an Event is
handed to `deliver`, which must return at once, and there are at most as many as tokens were asked for.
"""

import collections
import functools
import sys
import threading
import time

from inference.batching import Batch
from inference.jobs import Event
from inference.slot_caches import capacities

CHUNK = 64  # tokens of prompts that a step computes


class QueueFull(Exception):
    """As many jobs are waiting as max_queue allows."""

    code = "queue_full"


class Closed(Exception):
    """The scheduler is shutting down."""

    code = "shutting_down"


class Scheduler:
    """n_slots, n_tokens, adapters: of its Batch. max_queue: how many jobs may wait for a slot."""

    def __init__(self, model, n_slots, n_tokens, max_queue, adapters=None):
        settings = {"chunk": CHUNK, "capacities": capacities(model, n_tokens), "n_kept": n_slots}
        self.make_batch = functools.partial(Batch, model, n_slots, n_tokens, adapters, **settings)
        self.max_queue = max_queue
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
            running = []
            try:
                with self.changed:
                    self._admit()
                running = self.batch.sequences()  # the step may fail when it has just taken one of them out
                for job, piece in self.batch.step():
                    job.deliver(job.event(piece))
            except Exception as error:  # whatever it is, the clients hear of it, and the next request is served
                print(
                    f"a step failed, so its requests did: {type(error).__name__}: {error}", file=sys.stderr, flush=True
                )
                self._fail(dict.fromkeys([*running, *self.batch.sequences()]), error)
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
            job.deliver(Event(job, finish_reason="error", error=error))
