"""Beam search: an approximation of the most likely text, where generate.py takes the most likely next token.

After the most likely next token there may be no likely continuation. So the num_beams best texts (beams) are kept. Each
step extends all of them by every token and keeps the best. A beam that ends (with one of end_ids) becomes a hypothesis:

    score = sum of the log-probabilities / length ** length_penalty

length counts the new tokens, the ending one included. Each log-probability is negative, so the sum falls with every
token and favours short texts. A length_penalty above 0 corrects for that: the larger it is, the longer the text.

Behaves as transformers' beam search does, early_stopping included. Source: Wu et al. 2016, "Google's Neural Machine
Translation System", section 7, for the idea of the penalty; its form here is the simpler one.
"""

import math
from typing import NamedTuple

import numpy

from gpt2 import softmax
from inference import batching, sampling
from inference.model import init_cache, step
from inference.slot_caches import reorder, repeat


class Hypothesis(NamedTuple):
    ids: list  # the new ones
    score: float
    ended: bool  # with one of end_ids, which `ids` leaves out


class Search:
    """A beam search, without the model: like a Sequence it turns logits into tokens, but into num_beams at a time, and
    a Batch gives it as many slots.

    ids              those of the prompt and of the best beam
    hypotheses       the best so far, best first; final when finish_reason is not None
    parents          for each beam the index of the beam before the newest step that it extends
    """

    needs_prompt_logits, adapter = False, None

    def __init__(self, inputs, n_tokens_to_generate, num_beams, *, length_penalty=1.0, early_stopping=False, end_ids=(),
                 sampling_params=sampling.GREEDY):  # fmt: skip
        self.inputs, self.n_tokens_to_generate, self.n_slots = list(inputs), n_tokens_to_generate, num_beams
        self.length_penalty, self.end_ids, self.sampling_params = length_penalty, end_ids, sampling_params
        self.early_stopping = True if num_beams == 1 else early_stopping
        self.beams = [([], 0.0)]  # (new ids, sum of log-probabilities), best first
        self.parents, self.hypotheses, self.n_new, self.finish_reason = [], [], 0, None
        if n_tokens_to_generate == 0:
            self._finish(self._running())

    @property
    def ids(self):
        return self.inputs + (self.beams[0][0] if self.beams else [])

    def newest(self):
        """The id that the next step reads, for each slot. Surplus slots repeat the first beam and are not used."""
        surplus = self.n_slots - len(self.beams)
        return [ids[-1] for ids, _ in self.beams + self.beams[:1] * surplus]

    def accept(self, logits):
        """Extends the beams by one token each, from the logits of each slot, [n_slots, n_vocab]. There is no text until
        the search has finished."""
        self.n_new += 1
        rows = totals(self.beams, logits, self.inputs, self.sampling_params)
        ended, self.beams, parents = extend(self.beams, rows, self.n_slots, self.end_ids)
        self.parents = parents + parents[:1] * (self.n_slots - len(parents))
        found = [Hypothesis(ids, total / self.n_new**self.length_penalty, True) for ids, total in ended]
        self.hypotheses = best(self.hypotheses + found, self.n_slots)
        at_last = self.n_new == self.n_tokens_to_generate
        if not self.beams or (self._is_done() and not at_last):  # at the last step the running beams have ended too
            self._finish([])
        elif at_last:
            self._finish(self._running())
        return ""

    def _is_done(self):
        """Whether the search may end before n_tokens_to_generate."""
        to_the_end = self.early_stopping == "never" and self.length_penalty > 0
        n_best = self.n_tokens_to_generate if to_the_end else self.n_new
        attainable = self.beams[0][1] / n_best**self.length_penalty
        enough = len(self.hypotheses) == self.n_slots
        return enough and (self.early_stopping is True or self.hypotheses[-1].score >= attainable)

    def _running(self):
        return [Hypothesis(ids, total / max(1, len(ids)) ** self.length_penalty, False) for ids, total in self.beams]

    def _finish(self, more):
        self.hypotheses, self.finish_reason = best(self.hypotheses + more, self.n_slots), "length"


def search(model, inputs, n_tokens_to_generate, num_beams, **settings):
    """Up to num_beams Hypotheses of up to n_tokens_to_generate new ids, best first. One beam gives the greedy text.

    The settings are those of Search. early_stopping: when num_beams hypotheses are enough: True, as soon as they are
    found; False, when the best beam, if it ended now, would score no better than the worst of them; "never", when no
    beam can score better at any length. Of the sampling parameters those of sampling.process apply, to the
    log-probabilities.
    """
    found = Search(inputs, n_tokens_to_generate, num_beams, **settings)
    if found.finish_reason is None:
        logits, cache = step(model, inputs, init_cache(model, len(inputs) + n_tokens_to_generate), 0)
        found.accept(model.backend.to_numpy(logits)[None])
        cache = repeat(cache, num_beams)
    while found.finish_reason is None:
        cache = reorder(cache, numpy.array(found.parents))  # each beam continues the cache of its parent
        tokens, positions = [[token] for token in found.newest()], [len(found.ids) - 1] * num_beams
        logits, cache = batching.step_batch(model, tokens, cache, positions)
        found.accept(model.backend.to_numpy(logits))
    return found.hypotheses


def best(hypotheses, n):
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)[:n]


def totals(beams, logits, inputs, sampling_params):
    """[n_beams, n_vocab]: for each beam, the sum of log-probabilities that each token would lead to."""
    rows = []
    for (ids, total), row in zip(beams, logits, strict=False):
        with numpy.errstate(divide="ignore"):  # a probability may be 0
            log_probabilities = numpy.log(softmax(numpy.asarray(row, numpy.float64)))
        rows.append(total + sampling.process(log_probabilities, inputs + ids, len(ids), sampling_params))
    return numpy.stack(rows)


def extend(beams, totals, num_beams, end_ids):
    """The best extensions of `beams` by one token, best first: (those that end, those that go on, the index of the beam
    that each of the latter extends).

    The best 2 * num_beams are considered, more if there are several end ids. One that ends counts only if it is among
    the first num_beams of them.
    """
    children = numpy.argsort(-totals, axis=None, kind="stable")[: max(2, 1 + len(end_ids)) * num_beams]
    ended, going_on, parents = [], [], []
    for rank, (parent, token) in enumerate(zip(*numpy.unravel_index(children, totals.shape), strict=True)):
        ids, total = beams[parent][0], float(totals[parent, token])
        if token in end_ids:
            ended += [(ids, total)] * (rank < num_beams and total > -math.inf)
        elif len(going_on) < num_beams and total > -math.inf:
            going_on.append(([*ids, int(token)], total))
            parents.append(int(parent))
    return ended, going_on, parents
