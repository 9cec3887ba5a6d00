"""How wrong is a model? The one number that training lowers and evaluation reports.

A model gives each token that might come next a probability. The loss of a text is the mean of -log(probability) over
the tokens that did come, in nats: 0 for a prophet, log(n_vocab) for one who has no idea (7.6 for 2,048 tokens). Its
exponential, the perplexity, is a number of tokens: as unsure as one who guesses among so many.

Shannon 1948, "A Mathematical Theory of Communication", section 6.
"""

import math

from backends import in_float32, np
from gpt2 import gpt2


@in_float32
def token_losses(logits, targets):
    """-log(softmax(logits)[target]) for each position: logits [n_seq, n_vocab], targets [n_seq] -> [n_seq].

    As log(sum(exp(logits))) - logits[target]: no probability is computed, so none can become 0 before its logarithm is
    taken; and with the maximum subtracted first, no exp can overflow.
    """
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    chosen = np.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]  # [n_seq, n_vocab] -> [n_seq]
    return np.log(np.sum(np.exp(shifted), axis=-1)) - chosen


def lm_loss(params, inputs, n_head):
    """The mean loss of the n - 1 predictions in a text of n ids, [n] -> a number. Each id but the last is asked for the
    one after it. A batch: vmap(partial(lm_loss, n_head=...), in_axes=(None, 0)), then the mean."""
    inputs = np.asarray(inputs)
    return np.mean(token_losses(gpt2(inputs[:-1], **params, n_head=n_head), inputs[1:]))


def perplexity(loss):
    """exp(loss), and infinity where that is too large for a number."""
    return math.exp(loss) if loss < 700 else math.inf
