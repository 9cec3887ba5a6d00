"""Speculative decoding: several tokens from one pass through the model, and the same distribution of texts.

A pass reads every weight once, whether it computes one row or eight, and reading the weights is what takes the time. So
a drafter guesses the next tokens in a cheaper way, and one pass of the model checks them: its logits after the last
token judge the first guess, its logits after the first guess judge the second, and so on. Guesses are accepted up to
the first wrong one, in whose place the model's own choice stands. So each pass gives at least one token.

    drafter = Lookup()                              # guesses come from the text itself
    drafter = DraftModel(small_model, model, seed)  # or from a smaller model with the same tokenizer
    for piece in generate(model, sequence, drafter): ...

Rejected tokens are removed from the cache by position alone: the next pass begins where the accepted tokens end. It
overwrites what the cache holds from there on, and the mask hides the rest.

How many guesses are made changes only the time that a text takes, never the text: each token has a coin of its own, and
is chosen by the same rule whether or not its guess went through the model. So the same seed gives the same text on
NumPy and on JAX, where drafts of different lengths pay.

Sources: Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding"; Chen et al. 2023,
"Accelerating Large Language Model Decoding with Speculative Sampling". Drafts from the text: Yang et al. 2023,
"Inference with Reference: Lossless Acceleration of Large Language Models".
"""

import functools
import time

import numpy

from gpt2 import softmax
from inference import sampling
from inference.model import init_cache, load, n_positions, step

N_GRAMS = (4, 3, 2)  # the lengths n of the n-grams that Lookup searches for; what follows one token says little
N_REMEMBERED = 8  # the acceptance rate is an average over about the last so many guesses


# ---- Drafters ----


class Drafter:
    """What drafters have in common. A subclass has the method propose(sequence, n). It returns up to n pairs (guess,
    q): the tokens that may follow sequence.ids, and for each the probabilities q [n_vocab] that it was drawn from, or
    None if it was not drawn at random.

    rate                the share of guesses that were right, lately
    cost                the time of one guess, as a share of the time of a pass of one row; measured, unless it is 0
    accepted_per_step   for each pass of the model, how many guesses it accepted of those that it computed
    """

    def __init__(self, cost):
        self.rate, self.cost, self.accepted_per_step = 0.5, cost, []

    def best_rows(self, row_costs):
        """How many rows the next pass should have, one of the keys of row_costs, {rows: time of a pass}: the number
        that gives the most tokens for the time (Leviathan et al. 2022, section 3.3)."""
        times = {n_rows: cost + n_rows * self.cost for n_rows, cost in row_costs.items()}
        return max(times, key=lambda n_rows: expected_tokens(self.rate, n_rows) / times[n_rows])


def expected_tokens(rate, n_rows):
    """The mean number of tokens that a pass gives which computes the last token and n_rows - 1 guesses, if each guess
    is right with probability `rate`: 1 + rate + ... + rate**(n_rows - 1) (Leviathan et al. 2022, equation 1)."""
    return sum(rate**i for i in range(n_rows))


class Lookup(Drafter):
    """Guesses from the text itself: the longest n-gram that ends the text and stood there before is searched for, and
    what followed it is proposed. Right where a text is copied, quoted or changed a little, as code often is."""

    def __init__(self):
        super().__init__(cost=0)
        self.followers, self.n_indexed = {}, 0  # {n-gram: the index of what followed it last}

    def propose(self, sequence, n):
        ids = sequence.ids
        for end in range(self.n_indexed, len(ids)):
            self.followers |= {tuple(ids[end - size : end]): end for size in N_GRAMS if size <= end}
        self.n_indexed = len(ids)
        found = (self.followers.get(tuple(ids[-size:])) for size in N_GRAMS)
        start = next(filter(None, found), len(ids))
        followed = ids[start:]  # may be shorter than n, where the text repeats itself: then the guess repeats it too
        return [(followed[i % len(followed)], None) for i in range(n if followed else 0)]


class DraftModel(Drafter):
    """Guesses of a smaller model that has the same tokenizer as `model`.

    It has a cache of its own, with `position` tokens of the text from sequence.ids[start] on. Where the text is longer
    than its n_ctx, it sees the last part of the text.
    """

    def __init__(self, draft_model, model, seed=None):
        super().__init__(cost=0.1)
        self.model, self.n_vocab = draft_model, model.n_vocab
        self.cache, self.start, self.position = None, 0, 0
        self._entropy = numpy.random.SeedSequence(seed).entropy  # the seed, or a random number

    def propose(self, sequence, n):
        ids, n_before, draft = sequence.ids[:], len(sequence.new_ids), []
        self.cache = self.cache or init_cache(self.model, len(ids) + sequence.n_tokens_to_generate)
        for n_new in range(n_before, min(n_before + n, sequence.n_tokens_to_generate)):
            try:
                logits = sampling.process(self._logits(ids), ids, n_new, sequence.sampling_params)
            except ValueError:  # every token is banned: a mistake of the user's only if the text really comes to this
                break
            draft.append(self._guess(logits, n_new, sequence.sampling_params))
            ids.append(draft[-1][0])
        return draft

    def _logits(self, ids):
        """The model's logits after the last of ids, with the length of the large model's: a vocabulary may be padded.

        Only tokens that the cache lacks are computed. After rejected guesses it can hold all but the last of ids.
        """
        n_ctx, half = self.model.n_ctx, max(1, self.model.n_ctx // 2)
        start = max(0, -(-(len(ids) - n_ctx) // half)) * half  # depends on the length of the text alone
        self.position = min(self.position, len(ids) - 1 - start) if start == self.start else 0
        logits, self.cache = step(self.model, ids[start + self.position :], self.cache, self.position)
        self.start, self.position = start, len(ids) - start
        logits = numpy.asarray(self.model.backend.to_numpy(logits)[: self.n_vocab], numpy.float64)
        return numpy.pad(logits, (0, self.n_vocab - len(logits)), constant_values=-numpy.inf)

    def _guess(self, logits, n_new, params):
        """(token, q) from processed logits. The coin belongs to the place of the token in the text: when it is guessed
        again, because a token before it was rejected, the coin is the same."""
        if params.temperature == 0:
            return int(numpy.argmax(logits)), None
        coin = numpy.random.default_rng(numpy.random.SeedSequence(self._entropy, spawn_key=(n_new,))).random()
        q = softmax(sampling.warp(logits, params))
        return int(sampling.draw(q, coin)), q


def load_draft_model(tokenizer, model, seed, model_size, *where):
    """The DraftModel for `model` that inference.model.load(model_size, *where) finds. Raises as that does, and
    ValueError if its tokens are not those of `tokenizer`."""
    draft_tokenizer, draft_model = load(model_size, *where)
    if draft_tokenizer.ids != tokenizer.ids:
        raise ValueError(f"--draft_model {model_size} has another tokenizer than the model: it needs the same")
    return DraftModel(draft_model, model, seed)


# ---- Verification ----


def choose(logits, ids, n_new, params, coin, *, guess, q):
    """sampling.choose where a token `guess` was drawn from the probabilities q [n_vocab]; p are the model's own, after
    all processors.

    The rule of both papers: accept the guess with probability min(1, p(guess) / q(guess)); if it is rejected, draw from
    max(0, p - q), scaled to sum 1. The result has the distribution p: token x is guessed and accepted with probability
    q(x) * min(1, p(x) / q(x)) = min(p(x), q(x)), and what this lacks of p(x) is max(0, p(x) - q(x)), which is what the
    rejected cases are given to.

    One coin serves both draws: if the coin is at least `accepted`, it is uniform in [accepted, 1), so scaled to [0, 1)
    it is a new coin. A guess without q needs no rule of its own: let q be 1 for it and 0 for the others, then the rule
    is to draw from p and to see whether the guess was drawn.
    """
    p = softmax(sampling.warp(sampling.process(logits, ids, n_new, params), params))
    accepted, rest = min(1.0, p[guess] / q[guess]), numpy.maximum(p - q, 0)
    if coin < accepted or not rest.any():  # nothing is left if p and q are equal up to rounding
        return guess
    return int(sampling.draw(rest, (coin - accepted) / (1 - accepted)))


def verify(model, tokens, cache, position, n_rows):
    """(logits [len(tokens), n_vocab] after each of the tokens, cache), in a pass of n_rows rows. A prompt is computed
    by inference.model.step, for the logits after its last token alone."""
    if n_rows == 1:
        logits, cache = step(model, tokens, cache, position)
        return model.backend.to_numpy(logits)[None], cache
    padded = numpy.zeros(n_rows, numpy.int32)
    padded[: len(tokens)] = tokens
    logits, cache = model.forward(model.params, padded, cache, position, None)
    return model.backend.to_numpy(logits)[: len(tokens)], cache


def accept(sequence, logits, draft, drafter):
    """Yields the text of each token that a pass gives, up to the first one that was not guessed right. Returns how many
    guesses of those that were computed were right."""
    for n_right, (row, (guess, q)) in enumerate(zip(logits, [*draft, (None, None)], strict=False)):  # noqa: B007
        yield sequence.accept(row, sampling.choose if q is None else functools.partial(choose, guess=guess, q=q))
        right = sequence.chosen == guess
        drafter.rate += (right - drafter.rate) / N_REMEMBERED * (guess is not None)
        if sequence.finish_reason or not right:
            break
    return n_right


def generate(model, sequence, drafter, overflow=None):
    """generate.generate with a drafter, which is a new one for each sequence: yields the text, a piece for each token,
    until sequence.finish_reason is set. Lazy: at most one pass of the model for each next().

    The drafter guesses one token more than goes through the model: it is compared with the choice after the last row.
    """
    row_costs, compiles = model.backend.ROW_COSTS, model.backend.COMPILES
    n_tokens = len(sequence.ids) + sequence.n_tokens_to_generate + max(row_costs)
    tokens, position, cache = sequence.ids[:], 0, init_cache(model, n_tokens)
    while sequence.finish_reason is None:
        if position + len(tokens) > model.n_ctx:
            if overflow is None:
                yield sequence.finish("n_ctx")
                return
            overflow()
            tokens, position, cache = sequence.ids[-max(1, model.n_ctx // 2) :], 0, init_cache(model, model.n_ctx)
        room = n_positions(cache) - position if len(tokens) == 1 else 1  # a prompt is computed without guesses
        costs = {n_rows: cost for n_rows, cost in row_costs.items() if n_rows <= room}
        # The first pass after the prompt has all rows even without a guess: so JAX compiles now, not later in the text.
        first = compiles and len(drafter.accepted_per_step) == 1
        n_rows, started = max(costs) if first else drafter.best_rows(costs), time.perf_counter()
        draft = drafter.propose(sequence, n_rows)
        n_rows, drafted = n_rows if draft or first else 1, time.perf_counter()
        logits, cache = verify(model, tokens + [guess for guess, _ in draft[:-1]], cache, position, n_rows)
        if drafter.cost:
            drafter.cost = (drafted - started) / n_rows * costs[n_rows] / (time.perf_counter() - drafted)
        n_accepted = yield from accept(sequence, logits, draft, drafter)
        drafter.accepted_per_step.append(n_accepted)
        tokens, position = sequence.ids[-1:], position + len(tokens) + n_accepted
