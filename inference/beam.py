"""Beam search: the likeliest text, where stream.py takes the likeliest next token.

A token that is likely now may lead to where nothing likely follows. So num_beams texts (beams) are kept at a time; each
step extends all of them by every token and keeps the best. A beam that ends (with one of end_ids) becomes a hypothesis:

    score = sum of the log-probabilities / length ** length_penalty

length counts the new tokens, the ending one too. A sum of logarithms, all negative, sinks with each token: a
length_penalty above 0 makes up for it, so the larger it is, the longer the text.

Behaves as transformers' beam search does, early_stopping included. Source: Wu et al. 2016, "Google's Neural Machine
Translation System", section 7, for the idea of the penalty; its form here is the simpler one.
"""

import math
from typing import NamedTuple

import numpy

from gpt2 import softmax
from inference import batching, kv_cache, sampling


class Hypothesis(NamedTuple):
    ids: list  # the new ones
    score: float
    ended: bool  # with one of end_ids, which `ids` leaves out


def search(model, inputs, n_tokens_to_generate, num_beams, *, length_penalty=1.0, early_stopping=False, end_ids=(),
           settings=sampling.GREEDY):  # fmt: skip
    """Up to num_beams Hypotheses of up to n_tokens_to_generate new ids, best first. One beam is the greedy text.

    early_stopping: when to be content with num_beams hypotheses: True, as soon as they are there; False, when the best
    beam, were it to end now, would be no better than the worst of them; "never", when no beam can become better at all.
    Of `settings` those that depend on what has been said count (sampling.process), applied to the log-probabilities.
    """
    early_stopping = True if num_beams == 1 else early_stopping
    cache = kv_cache.start(model, len(inputs) + n_tokens_to_generate)
    logits, cache = kv_cache.read(model, inputs, cache, 0)
    logits, cache = [model.backend.to_numpy(logits)], batching.repeat(cache, num_beams)
    beams, parents, hypotheses = [([], 0.0)], [], []  # a beam: (new ids, sum of log-probabilities); all best first
    for n_new in range(1, n_tokens_to_generate + 1):
        if n_new > 1:
            logits, cache = advance(model, beams, parents, num_beams, cache, len(inputs) + n_new - 2)
        ended, beams, parents = extend(beams, word(beams, logits, inputs, settings), num_beams, end_ids)
        hypotheses += [Hypothesis(ids, total / n_new**length_penalty, True) for ids, total in ended]
        hypotheses = best(hypotheses, num_beams)
        n_best = n_tokens_to_generate if early_stopping == "never" and length_penalty > 0 else n_new
        attainable = beams[0][1] / n_best**length_penalty if beams else -math.inf
        enough = len(hypotheses) == num_beams
        content = enough and (early_stopping is True or hypotheses[-1].score >= attainable)
        if not beams or (content and n_new < n_tokens_to_generate):  # at the last step what still runs has ended too
            return hypotheses
    running = [Hypothesis(ids, total / max(1, len(ids)) ** length_penalty, False) for ids, total in beams]
    return best(hypotheses + running, num_beams)


def best(hypotheses, n):
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)[:n]


def word(beams, logits, inputs, settings):
    """[n_beams, n_vocab]: for each beam, the sum of log-probabilities that each token would lead to."""
    rows = []
    for (ids, total), row in zip(beams, logits, strict=False):
        with numpy.errstate(divide="ignore"):  # a probability may be 0
            log_probabilities = numpy.log(softmax(numpy.asarray(row, numpy.float64)))
        rows.append(total + sampling.process(log_probabilities, inputs + ids, len(ids), settings))
    return numpy.stack(rows)


def extend(beams, totals, num_beams, end_ids):
    """(the beams that end, those that go on, the row of each one's parent), best first: the children of `beams`.

    2 * num_beams children are looked at. One that ends counts only if it is among the first num_beams of them.
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


def advance(model, beams, parents, num_beams, cache, position):
    """(logits, cache) after the last token of each beam. The batch always has num_beams rows, so that JAX compiles one
    program; surplus rows repeat the first, and nobody looks at them."""
    surplus = num_beams - len(beams)
    rows = numpy.array(parents + parents[:1] * surplus)
    cache = kv_cache.map_cache(lambda array: array[rows], cache)  # each child goes on from its parent's
    tokens = [ids[-1:] for ids, _ in beams + beams[:1] * surplus]
    logits, cache = batching.read(model, tokens, cache, [position] * num_beams)
    return model.backend.to_numpy(logits), cache
