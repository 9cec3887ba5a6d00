"""From logits to the next token: pure functions of the logits of one position, [n_vocab], NumPy's or JAX's.

Eight of them change the logits. Each changes nothing at its neutral value. They are applied in this order:

    repetition_penalty  no_repeat_ngram  min_new_tokens  bad_words    change single tokens, given the tokens so far
    temperature  top_k  top_p  min_p                                  make the choice more or less random

A banned token gets the logit -inf, so its probability is 0. Then `sample` draws a token with a coin: a number, uniform
in [0, 1), that the caller draws. So these functions are not random themselves, and both backends choose the same token
for the same coin. In this file `params` are SamplingParams; elsewhere the word means the weights of a model.

The behaviour is that of the logits processors of Hugging Face's transformers, which users know. Where it differs from
the papers, the function says so (Keskar et al. 2019, "CTRL", section 4.1; Fan et al. 2018, "Hierarchical Neural Story
Generation", section 5.1; Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1; Nguyen et
al. 2024, "Turning Up the Heat: Min-p Sampling", section 3).
"""

import math
from typing import NamedTuple

from backends import np
from gpt2 import softmax


class SamplingParams(NamedTuple):
    """How to choose the next token. The defaults are neutral, except temperature, whose neutral value is 1."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    bad_words: tuple = ()  # sequences of ids
    end_ids: tuple = ()  # the tokens that min_new_tokens bans
    min_p: float = 0.0
    no_repeat_ngram_size: int = 0
    banned: tuple = ()  # ids without a token: a model may have more logits than its tokenizer has tokens


GREEDY = SamplingParams()


def check(params):
    """Raises ValueError for a value that is out of range, and for one that has no effect beside another."""
    temperature, top_k, top_p, penalty = params[:4]
    if not (temperature == 0 or 1e-5 <= temperature < math.inf):
        raise ValueError(f"temperature {temperature} is out of range: 0 (always the likeliest token) or from 1e-5 up")
    if top_k < 0:
        raise ValueError(f"top_k {top_k} is out of range: 0 (off) or the number of tokens to choose from")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is out of range: above 0, up to 1 (off)")
    if not 0 <= params.min_p <= 1:
        raise ValueError(f"min_p {params.min_p} is out of range: 0 (off) to 1")
    if not 0.01 <= penalty <= 100:
        raise ValueError(f"repetition_penalty {penalty} is out of range: 0.01 to 100; 1 is off")
    neutral = {"top_k": 0, "top_p": 1, "min_p": 0}
    useless = [f"{name} {getattr(params, name)}" for name, off in neutral.items() if getattr(params, name) != off]
    if temperature == 0 and useless:
        raise ValueError(
            f"{useless[0]} has no effect at temperature 0, which takes the likeliest token: set temperature too"
        )
    if any(len(sequence) == 0 for sequence in params.bad_words):
        raise ValueError("an empty bad word would ban everything")


# ---- Processors that change single tokens, given the tokens so far ----


def repetition_penalty(logits, ids, penalty):
    """Makes the tokens in `ids`, the prompt included, less likely: a positive logit is divided by the penalty, a
    negative one multiplied. (CTRL divides both, which makes a token with a negative logit more likely.) 1 is off."""
    if penalty == 1:
        return logits
    return np.where(among(ids, logits), np.where(logits > 0, logits / penalty, logits * penalty), logits)


def no_repeat_ngram(logits, ids, size):
    """Bans each token that would complete a sequence of `size` tokens that `ids` contains already. 0 is off."""
    ids = list(ids)
    last = ids[len(ids) - size + 1 :]
    starts = range(len(ids) - size + 1) if size else ()
    return ban(logits, [ids[i + size - 1] for i in starts if ids[i : i + size - 1] == last])


def min_new_tokens(logits, n_new, minimum, end_ids):
    """Bans the tokens that end a text while n_new, the number of new tokens, is less than `minimum`. 0 is off."""
    return ban(logits, end_ids) if n_new < minimum else logits


def bad_words(logits, ids, sequences):
    """Bans the last token of each sequence of ids whose other tokens stand at the end of `ids`. () is off."""
    ids = list(ids)
    return ban(logits, [last for *first, last in sequences if ids[len(ids) - len(first) :] == first])


def process(logits, ids, n_new, params):
    """The processors above, in order. ids: all so far, of which the last n_new are new; params: SamplingParams.

    Raises ValueError if no token is left, and FloatingPointError if the logits are not finite numbers, which only
    broken weights cause.
    """
    logits = ban(logits, params.banned)
    if not np.all(logits < math.inf):  # false for NaN too
        raise FloatingPointError("the model's logits are not finite numbers")
    logits = repetition_penalty(logits, ids, params.repetition_penalty)
    logits = no_repeat_ngram(logits, ids, params.no_repeat_ngram_size)
    logits = min_new_tokens(logits, n_new, params.min_new_tokens, params.end_ids)
    logits = bad_words(logits, ids, params.bad_words)
    if not np.max(logits) > -math.inf:
        raise ValueError("every token is banned: let bad_words, min_new_tokens and no_repeat_ngram_size leave some")
    return logits


# ---- Processors that make the choice more or less random ----


def temperature(logits, t):
    """Divides the logits by t. Below 1 likely tokens become more likely, above 1 less. 1 is off; 0 keeps only the
    likeliest token."""
    return keep_best(logits, 1) if t == 0 else logits if t == 1 else logits / t


def top_k(logits, k):
    """Keeps the k likeliest tokens, exactly k: of equal ones those with the lower ids. 0 is off."""
    return keep_best(logits, k) if 0 < k < len(logits) else logits


def top_p(logits, p):
    """Keeps the smallest set of likeliest tokens whose probabilities sum to p or more. The token that crosses p stays
    (in OpenAI's own code it does not). 1 is off."""
    if p == 1:
        return logits
    best_first = -np.sort(-softmax(logits))
    before = np.cumsum(best_first) - best_first  # for each token, the probability of all likelier ones
    return keep_best(logits, np.sum(before < p))


def min_p(logits, p):
    """Keeps the tokens whose probability is at least p times that of the likeliest one. 0 is off."""
    if p == 0:
        return logits
    probabilities = softmax(logits)
    return np.where(probabilities >= p * np.max(probabilities), logits, -math.inf)


def warp(logits, params):
    """The four above, in order."""
    logits = top_k(temperature(logits, params.temperature), params.top_k)
    return min_p(top_p(logits, params.top_p), params.min_p)


def keep_best(logits, k):
    """Bans all but the k likeliest tokens; of equal ones the lower ids stay."""
    threshold = -np.sort(-logits)[k - 1]
    above, equal = logits > threshold, logits == threshold
    return np.where(above | (equal & (np.cumsum(equal) <= k - np.sum(above))), logits, -math.inf)


def ban(logits, ids):
    return np.where(among(ids, logits), -math.inf, logits) if len(ids) else logits


def among(ids, logits):
    """[n_vocab] booleans: True for the tokens in `ids`."""
    return np.isin(np.arange(len(logits)), np.asarray(ids))


# ---- The choice ----


def sample(logits, coin):
    """Draws a token from the softmax of the logits: inverse-CDF sampling, as in `draw`."""
    return draw(softmax(logits), coin)


def draw(probabilities, coin):
    """Inverse-CDF sampling: the first token at which the cumulative sum of the probabilities exceeds the coin.

    The coin is scaled by the last sum, so the probabilities need not sum to 1: rounding may leave the sum just below or
    above it. The result is limited to the last token that is not banned: so no coin below 1 leads to a banned token.
    """
    sums = np.cumsum(probabilities)
    last = len(probabilities) - 1 - np.argmax(np.flip(probabilities) > 0)
    return np.minimum(np.searchsorted(sums, coin * sums[-1], side="right"), last)


def choose(logits, ids, n_new, params, coin):
    """The id of the next token: all processors, then a draw. At temperature 0 the coin has no effect."""
    logits = process(logits, ids, n_new, params)
    if params.temperature == 0:
        return int(np.argmax(logits))
    return int(sample(warp(logits, params), coin))
