"""The loop: read, choose, print; until there is a reason to stop.

    row = Row(encoder, ids, n_tokens_to_generate=40)
    for piece in stream(model, row):
        print(piece, end="", flush=True)

A Row is one text in the making: what to do with the logits that a model gives for it. It does not know the model, and
so serves the loop here, which has one row, as well as the one in batching.py, which has many.
"""

import codecs

import numpy

from gpt2 import softmax
from inference import kv_cache, sampling


class Row:
    """One text in the making.

    ids                 the prompt's and the new ones; `new`: the latter alone
    text                what they say so far, up to where a stop text begins
    stop_reason         None, "length" (n_tokens_to_generate are there), "end_of_text", "stop" (one of `stop` was
                        written) or "n_ctx" (the model can see no further)
    logits, chosen      the model's last word, before the settings had theirs, and the id that came of it
    log_probabilities   of the new tokens by the model (natural logarithms, before the settings), or None if not kept
    """

    def __init__(self, encoder, inputs, n_tokens_to_generate, settings=sampling.GREEDY, *, end_ids=(), stop=(),
                 seed=None, keep_log_probabilities=False):  # fmt: skip
        self.encoder, self.ids, self.new, self.logits = encoder, list(inputs), [], None
        self.chosen = None
        self.settings, self.end_ids, self.stop = settings, set(end_ids), tuple(stop)
        self.n_tokens_to_generate = n_tokens_to_generate
        self.stop_reason = None if n_tokens_to_generate else "length"
        self.text, self.n_shown = "", 0
        self.log_probabilities = [] if keep_log_probabilities else None
        self._coins = numpy.random.default_rng(seed)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def take(self, logits):
        """The model's logits [n_vocab] for what comes next -> the text that is certain now, maybe none."""
        self.logits = numpy.asarray(logits, numpy.float64)
        self.chosen = chosen = sampling.choose(
            self.logits, self.ids, len(self.new), self.settings, self._coins.random()
        )
        if chosen in self.end_ids:
            return self.end("end_of_text")
        self.ids.append(chosen)
        self.new.append(chosen)
        if self.log_probabilities is not None:
            self.log_probabilities.append(float(numpy.log(softmax(self.logits)[chosen])))
        if len(self.new) == self.n_tokens_to_generate:
            self.stop_reason = "length"
        return self._show(self.encoder.token_bytes(chosen), final=self.stop_reason is not None)

    def end(self, stop_reason):
        """Stops the row -> the text that was still held back."""
        self.stop_reason = stop_reason
        return self._show(final=True)

    def _show(self, data=b"", final=False):
        """Adds to the text; returns what of it has not been shown and cannot become part of a stop text any more."""
        self.text += self._characters.decode(data, final)
        found = [place for place in map(self.text.find, self.stop) if place >= 0]
        if found:
            self.text, self.stop_reason, final = self.text[: min(found)], "stop", True
        end = len(self.text) if final else len(self.text) - self._n_doubtful()
        piece, self.n_shown = self.text[self.n_shown : end], max(end, self.n_shown)
        return piece

    def _n_doubtful(self):
        """How many characters at the end may be the beginning of a stop text."""
        lengths = range(1, max(map(len, self.stop), default=0))
        return max((n for n in lengths if any(len(s) > n and self.text.endswith(s[:n]) for s in self.stop)), default=0)


def stream(model, row, overflow=None):
    """Yields the row's text, a piece for each token ("" if that completes no character), until row.stop_reason says why
    it ends. A step is computed when its piece is asked for, and none for nothing.

    When the model has seen n_ctx tokens it can see no more, and that is the end, unless there is an `overflow`: it is
    called, and the text goes on from the last n_ctx/2 tokens, in a new cache, as their positions are others now.
    """
    n_all = min(len(row.ids) + row.n_tokens_to_generate, model.n_ctx)
    tokens, position, cache = row.ids[:], 0, kv_cache.start(model, n_all)
    while row.stop_reason is None:
        if position + len(tokens) > model.n_ctx:
            if overflow is None:
                yield row.end("n_ctx")
                return
            overflow()
            tokens, position, cache = row.ids[-max(1, model.n_ctx // 2) :], 0, kv_cache.start(model, model.n_ctx)
        logits, cache = kv_cache.read(model, tokens, cache, position)
        yield row.take(model.backend.to_numpy(logits))
        tokens, position = row.ids[-1:], position + len(tokens)
