"""From logits to the next token: pure functions on one row of logits, [n_vocab], NumPy's or JAX's.

Six of them change the row, each leaving it as it is at its neutral value, in this order:

    repetition_penalty  min_new_tokens  bad_words     what may be said: by what has been said
    temperature  top_k  top_p                         how much of the rest is left to chance

A banned token has the logit -inf. Then `sample` takes one, by a coin: a number in [0, 1) that the caller draws, so that
there is no randomness in here, and both backends give the same token for the same coin.

Source: the processors and warpers of Hugging Face's transformers, whose behaviour users know; where they differ from
their papers (Keskar et al. 2019, "CTRL", section 4.1; Fan et al. 2018; Holtzman et al. 2020, section 3.1), it says so.
"""

import math
from typing import NamedTuple

from backends import np
from gpt2 import softmax


class Settings(NamedTuple):
    """How to choose. These are the neutral values, but for temperature, whose neutral value is 1."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    bad_words: tuple = ()  # of sequences of ids
    end_ids: tuple = ()  # what min_new_tokens bans


GREEDY = Settings()


def check(settings):
    """Raises ValueError for a value out of its range, or one that another makes useless."""
    temperature, top_k, top_p, penalty = settings[:4]
    if not (temperature == 0 or 1e-5 <= temperature < math.inf):
        raise ValueError(f"temperature {temperature} is out of range: 0 (the likeliest token, always) or from 1e-5 up")
    if top_k < 0:
        raise ValueError(f"top_k {top_k} is out of range: 0 (off) or the number of tokens to choose from")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is out of range: above 0, up to 1 (off)")
    if not 0.01 <= penalty <= 100:
        raise ValueError(f"repetition_penalty {penalty} is out of range: 0.01 to 100; 1 is off")
    if temperature == 0 and (top_k or top_p != 1):
        name = f"top_k {top_k}" if top_k else f"top_p {top_p}"
        raise ValueError(f"{name} has no effect at temperature 0, which takes the likeliest token: set temperature too")
    if any(len(sequence) == 0 for sequence in settings.bad_words):
        raise ValueError("an empty bad word would ban everything")


def repetition_penalty(logits, ids, penalty):
    """Makes tokens that stand in `ids`, the prompt among them, less likely: a positive logit is divided by the penalty,
    a negative one multiplied (dividing that too, as CTRL has it, would make it likelier). 1 is off."""
    if penalty == 1:
        return logits
    return np.where(among(ids, logits), np.where(logits > 0, logits / penalty, logits * penalty), logits)


def min_new_tokens(logits, n_new, minimum, end_ids):
    """Bans the tokens that would end the text until `minimum` tokens are new; n_new are by now. 0 is off."""
    return ban(logits, end_ids) if n_new < minimum else logits


def bad_words(logits, ids, sequences):
    """Bans, of each sequence of ids, the last one, if the others are what `ids` end with. () is off."""
    ids = list(ids)
    return ban(logits, [last for *first, last in sequences if ids[len(ids) - len(first) :] == first])


def temperature(logits, t):
    """Below 1 likely tokens become likelier still, above 1 they become less so. 1 is off; 0 leaves the likeliest."""
    return keep_best(logits, 1) if t == 0 else logits if t == 1 else logits / t


def top_k(logits, k):
    """Leaves the k likeliest tokens, exactly k: among equals the lower ids. 0 is off."""
    return keep_best(logits, k) if 0 < k < len(logits) else logits


def top_p(logits, p):
    """Leaves the smallest set of likeliest tokens with a probability of p or more together: so the token that crosses p
    stays (in OpenAI's own code it went). 1 is off."""
    if p == 1:
        return logits
    best_first = -np.sort(-softmax(logits))
    before = np.cumsum(best_first) - best_first  # the probability of all likelier ones
    return keep_best(logits, np.sum(before < p))


def keep_best(logits, k):
    """Bans all but the k likeliest tokens; among equals the lower ids stay."""
    threshold = -np.sort(-logits)[k - 1]
    above, equal = logits > threshold, logits == threshold
    return np.where(above | (equal & (np.cumsum(equal) <= k - np.sum(above))), logits, -math.inf)


def ban(logits, ids):
    return np.where(among(ids, logits), -math.inf, logits) if len(ids) else logits


def among(ids, logits):
    """[n_vocab] booleans: True for the tokens in `ids`."""
    return np.isin(np.arange(len(logits)), np.asarray(ids))


def process(logits, ids, n_new, settings):
    """The first three. ids: all so far, the last n_new of them new. Raises ValueError if no token is left."""
    logits = repetition_penalty(logits, ids, settings.repetition_penalty)
    logits = min_new_tokens(logits, n_new, settings.min_new_tokens, settings.end_ids)
    logits = bad_words(logits, ids, settings.bad_words)
    if not np.max(logits) > -math.inf:
        raise ValueError("every token is banned: let bad_words and min_new_tokens leave some")
    return logits


def warp(logits, settings):
    """The last three."""
    return top_p(top_k(temperature(logits, settings.temperature), settings.top_k), settings.top_p)


def sample(logits, coin):
    """The token in whose stretch the coin falls, when the tokens lie side by side, each as long as it is likely.

    No rounding of the sum can lead past the last token that is allowed, nor to one that is banned.
    """
    ends = np.cumsum(softmax(logits))
    last = len(logits) - 1 - np.argmax(np.flip(logits) > -math.inf)
    return np.minimum(np.searchsorted(ends, coin * ends[-1], side="right"), last)


def choose(logits, ids, n_new, settings, coin):
    """All six, then sample. At temperature 0 one token is left and the coin decides nothing."""
    logits = process(logits, ids, n_new, settings)
    if settings.temperature == 0:
        return int(np.argmax(logits))
    return int(sample(warp(logits, settings), coin))
