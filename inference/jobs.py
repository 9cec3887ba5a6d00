"""Texts that somebody waits for: what a request asks of a model, and the Events with which it is answered.

    jobs = make_jobs(tokenizer, model, values, [tokenizer.encode("Once")], n_new=40, deliver=print)

A Job is a Sequence, a BeamJob a beam search, that also keeps what an answer needs: log-probabilities with their places
in the text, those of the prompt, times, and an error of its own. inference/scheduling.py computes them.
"""

import codecs
import time
from typing import Any, NamedTuple

import numpy

from inference import sampling
from inference.beam import Search
from inference.generate import Sequence
from utils import ids_without_token


class Event(NamedTuple):
    """What a step has brought for a job."""

    job: Any
    text: str = ""  # new text
    tokens: tuple = ()  # TokenInfos, if they are kept, of the text so far that were not in an earlier event
    finish_reason: str | None = None  # not None in the last event; "error": then `error` is an exception
    error: Exception | None = None
    seconds: float = 0.0  # since the event before, or since the job was made
    is_first: bool = False


class TokenInfo(NamedTuple):
    id: int
    log_probability: float | None  # by the model, before any processor; None for the first id of a prompt
    candidates: tuple  # (id, log-probability) of the likeliest tokens
    offset: int  # where its text begins, in characters


class Awaited:
    """What Job and BeamJob have in common.

    deliver          called with each Event in the scheduler's thread; it must return at once
    n_prompt         how many ids the prompt has; n_reused: how many of them were found in the cache of another sequence
    """

    n_candidates, prompt_tokens, n_reused, error = None, (), 0, None

    def __init__(self, deliver, n_prompt):
        self.deliver, self.n_prompt, self._since, self._is_new = deliver, n_prompt, time.perf_counter(), True

    def accept(self, logits):
        """As Sequence.accept. What cannot be continued fails alone: the others in its batch go on."""
        try:
            return super().accept(logits)
        except (ValueError, FloatingPointError) as error:
            self.error, self.finish_reason = error, "error"
            return ""

    def event(self, text, tokens=()):
        """The Event after a step."""
        seconds, is_first = time.perf_counter() - self._since, self._is_new
        self._since, self._is_new = self._since + seconds, False
        return Event(self, text, tokens, self.finish_reason, self.error, seconds, is_first)


class Job(Awaited, Sequence):
    """A Sequence that somebody waits for.

    n_candidates     how many candidates to keep of each token; None: no TokenInfos at all
    prompt_tokens    the TokenInfos of the prompt, if needs_prompt_logits
    """

    def __init__(self, *args, deliver, n_candidates=None, needs_prompt_logits=False, **settings):
        Sequence.__init__(self, *args, **settings)
        Awaited.__init__(self, deliver, len(self.ids))
        self.n_candidates, self.needs_prompt_logits = n_candidates, needs_prompt_logits
        self._unsent, self._n_echoed = [], 0
        if needs_prompt_logits:
            self.prompt_tokens = [TokenInfo(self.ids[0], None, (), 0)]
            self._offsets = text_offsets(self.tokenizer, self.ids)
            self._n_echoed = len(self.tokenizer.decode(self.ids))

    def accept(self, logits):
        offset, n_before = self._n_echoed + len(self.text), len(self.new_ids)
        piece = super().accept(logits)
        if self.n_candidates is not None and len(self.new_ids) > n_before:
            self._unsent.append(TokenInfo(self.chosen, *self._look_up(self.logits, self.chosen), offset))
        return piece

    def accept_prompt(self, logits, start):
        """Keeps what the model said of the prompt's ids after `start`: logits [n, n_vocab], one row for each id."""
        for i, row in enumerate(logits[: self.n_prompt - 1 - start], start + 1):
            found = self._look_up(numpy.asarray(row, numpy.float64), self.ids[i])
            self.prompt_tokens.append(TokenInfo(self.ids[i], *found, self._offsets[i]))

    def _look_up(self, logits, chosen):
        """(the log-probability of the id `chosen`, the candidates)."""
        log_probabilities = logits - logits.max()
        log_probabilities -= numpy.log(numpy.exp(log_probabilities).sum())
        n = min(self.n_candidates, len(logits))
        best = numpy.argpartition(-logits, n - 1)[:n] if n else []
        best = sorted(best, key=lambda i: (-logits[i], i))
        return float(log_probabilities[chosen]), tuple((int(i), float(log_probabilities[i])) for i in best)

    def results(self):
        """[(text, how many new ids, finish_reason)]: one. A beam search has several."""
        return [(self.text, len(self.new_ids), self.finish_reason)]

    def event(self, text):
        """A token is held back as long as its text is, and dropped if that was cut off by a stop text."""
        limit = self.n_shown if self.finish_reason in (None, "stop") else float("inf")
        ready = [token for token in self._unsent if token.offset - self._n_echoed < limit]
        self._unsent = self._unsent[len(ready) :]
        return super().event(text, tuple(ready))


class BeamJob(Awaited, Search):
    """A beam search that somebody waits for, for its n_results best texts. They are complete in the last Event."""

    def __init__(self, tokenizer, *args, deliver, n_results, adapter=None, **settings):
        Search.__init__(self, *args, **settings)
        Awaited.__init__(self, deliver, len(self.inputs))
        self.tokenizer, self.n_results, self.adapter = tokenizer, n_results, adapter

    def results(self):
        return [
            (self.tokenizer.decode(found.ids), len(found.ids), "end_of_text" if found.ended else "length")
            for found in self.hypotheses[: self.n_results]
        ]


def text_offsets(tokenizer, ids):
    """For each id, where its text begins in the text of all, in characters."""
    decoder, offsets, n = codecs.getincrementaldecoder("utf-8")(errors="replace"), [], 0
    for i in ids:
        offsets.append(n)
        n += len(decoder.decode(tokenizer.token_bytes(i)))
    return offsets


def make_jobs(tokenizer, model, values, inputs, n_new, n_candidates, deliver, adapter=None):
    """The Jobs of a request: for each of `inputs`, lists of ids, values.n Jobs, the i-th (from 0) with seed + i,
    or a BeamJob. `values` has the parameters of the request by their names in inference/parameters.py."""
    cold = values.temperature < 1e-5 or values.use_beam_search
    words = [space + word.strip() for word in values.bad_words for space in ("", " ")]
    params = sampling.SamplingParams(
        *((0.0, 0, 1.0) if cold else (values.temperature, values.top_k, max(values.top_p, 1e-6))),
        values.repetition_penalty, values.min_tokens, tuple(tuple(tokenizer.encode(word)) for word in words),
        model.end_ids, 0.0 if cold else values.min_p, banned=ids_without_token(tokenizer, model.n_vocab, model.end_ids),
    )  # fmt: skip
    common = {"sampling_params": params, "end_ids": model.end_ids, "deliver": deliver, "adapter": adapter}
    if values.use_beam_search and (n_beams := max(values.n, values.best_of or 0)) > 1:
        common |= {"length_penalty": values.length_penalty, "n_results": values.n}
        return [BeamJob(tokenizer, ids, n_new, n_beams, **common) for ids in inputs]
    common |= {"stop": values.stop, "n_candidates": n_candidates}
    common["needs_prompt_logits"] = values.echo and n_candidates is not None
    seeds = [None if values.seed is None else (values.seed + i) % 2**64 for i in range(values.n)]
    return [Job(tokenizer, ids, n_new, seed=seed, **common) for ids in inputs for seed in seeds]
