"""The loss of a language model: the number that training lowers and evaluation reports.

A model gives a probability to each token that might come next. The loss of a text is the mean of -log(probability) over
the tokens that did come next, in nats. Why the logarithm: the probability of a whole text is the product of these
probabilities, and the logarithm of a product is a sum, so the lowest loss means the highest probability of the text
(maximum likelihood). Why the mean: it is the loss per token, so texts of different lengths compare.

    loss 0             each next token had probability 1
    loss log(n_vocab)  all tokens had the same probability: log(2048) = 7.6, about the loss of a model before training

exp(loss) is the perplexity: a model with perplexity 10 is as uncertain as one that chooses among 10 equally likely
tokens (Shannon 1948, "A Mathematical Theory of Communication", section 6: entropy; Jelinek et al. 1977: perplexity).
"""

import math

from backends import np
from gpt2 import gpt2


def token_losses(logits, targets):
    """-log(softmax(logits)[target]) for each position: logits [n_seq, n_vocab], targets [n_seq] -> [n_seq].

    Computed as log(sum(exp(logits))) - logits[target]. A probability too small for a float would become 0, and its
    logarithm infinite; here no probability is computed. The maximum is subtracted first, so that no exp overflows.
    Losses of bfloat16 logits are float32.
    """
    if logits.dtype.itemsize == 2:
        logits = logits.astype(np.float32)
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    chosen = np.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]  # [n_seq, n_vocab] -> [n_seq]
    return np.log(np.sum(np.exp(shifted), axis=-1)) - chosen


def lm_loss(params, inputs, n_head):
    """The mean loss of the n - 1 predictions in a text of n ids, [n] -> a number: each id but the first is predicted
    from those before it. A batch: vmap(partial(lm_loss, n_head=...), in_axes=(None, 0)), then the mean."""
    inputs = np.asarray(inputs)
    return np.mean(token_losses(gpt2(inputs[:-1], **params, n_head=n_head), inputs[1:]))


def perplexity(loss):
    """exp(loss), or infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
