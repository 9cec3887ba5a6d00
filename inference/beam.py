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
from weights.params import tree_map


class Hypothesis(NamedTuple):
    ids: list  # the new ones
    score: float
    ended: bool  # with one of end_ids, which `ids` leaves out


def search(model, inputs, n_tokens_to_generate, num_beams, *, length_penalty=1.0, early_stopping=False, end_ids=(),
           sampling_params=sampling.GREEDY):  # fmt: skip
    """Up to num_beams Hypotheses of up to n_tokens_to_generate new ids, best first. One beam gives the greedy text.

    early_stopping: when num_beams hypotheses are enough: True, as soon as they are found; False, when the best beam, if
    it ended now, would score no better than the worst of them; "never", when no beam can score better at any length.
    Of the sampling parameters those of sampling.process apply, to the log-probabilities.
    """
    early_stopping = True if num_beams == 1 else early_stopping
    cache = init_cache(model, len(inputs) + n_tokens_to_generate)
    logits, cache = step(model, inputs, cache, 0)
    logits, cache = [model.backend.to_numpy(logits)], batching.repeat(cache, num_beams)
    beams, parents, hypotheses = [([], 0.0)], [], []  # a beam: (new ids, sum of log-probabilities); all best first
    for n_new in range(1, n_tokens_to_generate + 1):
        if n_new > 1:
            logits, cache = advance(model, beams, parents, num_beams, cache, len(inputs) + n_new - 2)
        ended, beams, parents = extend(beams, totals(beams, logits, inputs, sampling_params), num_beams, end_ids)
        hypotheses += [Hypothesis(ids, total / n_new**length_penalty, True) for ids, total in ended]
        hypotheses = best(hypotheses, num_beams)
        n_best = n_tokens_to_generate if early_stopping == "never" and length_penalty > 0 else n_new
        attainable = beams[0][1] / n_best**length_penalty if beams else -math.inf
        enough = len(hypotheses) == num_beams
        done = enough and (early_stopping is True or hypotheses[-1].score >= attainable)
        if not beams or (done and n_new < n_tokens_to_generate):  # at the last step the running beams have ended too
            return hypotheses
    running = [Hypothesis(ids, total / max(1, len(ids)) ** length_penalty, False) for ids, total in beams]
    return best(hypotheses + running, num_beams)


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


def advance(model, beams, parents, num_beams, cache, position):
    """(logits, cache) after the last token of each beam. The batch always has num_beams rows, so that JAX compiles one
    program; surplus rows repeat the first beam and are not used."""
    surplus = num_beams - len(beams)
    rows = numpy.array(parents + parents[:1] * surplus)
    cache = tree_map(lambda array: array[rows], cache)  # each beam continues the cache of the one that it extends
    tokens = [ids[-1:] for ids, _ in beams + beams[:1] * surplus]
    logits, cache = batching.step_batch(model, tokens, cache, [position] * num_beams)
    return model.backend.to_numpy(logits), cache
