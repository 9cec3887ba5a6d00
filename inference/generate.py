"""The generation loop for one sequence: a model step, a choice, text; until there is a reason to stop.

    sequence = Sequence(tokenizer, ids, n_tokens_to_generate=40)
    for piece in generate(model, sequence):
        print(piece, end="", flush=True)

A Sequence is a text that is being generated: it turns a model's logits into tokens and text. It has no reference to the
model, so the loop for one sequence here and the one for many in batching.py both use it.
"""

import codecs

import numpy

from gpt2 import softmax
from inference import sampling
from inference.model import init_cache, step


class Sequence:
    """A text that is being generated.

    ids                 the ids of the prompt and the new ones; new_ids: the new ones alone
    text                the new text so far, up to where a stop text begins
    finish_reason       None until it ends; "length" (n_tokens_to_generate new tokens), "end_of_text" (one of end_ids
                        was chosen), "stop" (one of the stop texts appeared) or "n_ctx" (the context is full)
    logits, chosen      the model's logits for the newest token, before any processor, and the id that was chosen
    adapter             the name of one of the adapters of a Batch, or None: see batching.py
    log_probabilities   of the new tokens by the model (natural logarithms, before any processor), or None if not kept
    """

    n_slots = 1  # of a Batch; a beam search has more
    needs_prompt_logits = False  # whether a Batch is to call accept_prompt

    def __init__(self, tokenizer, inputs, n_tokens_to_generate, sampling_params=sampling.GREEDY, *, end_ids=(), stop=(),
                 seed=None, keep_log_probabilities=False, adapter=None):  # fmt: skip
        self.tokenizer, self.ids, self.new_ids = tokenizer, list(inputs), []
        self.logits = self.chosen = None
        self.sampling_params, self.end_ids, self.adapter = sampling_params, set(end_ids), adapter
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self.n_tokens_to_generate = n_tokens_to_generate
        self.finish_reason = None if n_tokens_to_generate else "length"
        self.text, self.n_shown = "", 0
        self.log_probabilities = [] if keep_log_probabilities else None
        self._seed, self._coins = seed, None
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back an incomplete character

    def accept(self, logits, choose=sampling.choose):
        """Chooses the next token from the model's logits [n_vocab], by sampling.choose or a function with the same
        arguments. Returns the new text that no later token can change, which may be ""."""
        self.logits = numpy.asarray(logits, numpy.float64)
        self.chosen = choose(self.logits, self.ids, len(self.new_ids), self.sampling_params, self._coin())
        if self.chosen in self.end_ids:
            return self.finish("end_of_text")
        self.ids.append(self.chosen)
        self.new_ids.append(self.chosen)
        if self.log_probabilities is not None:
            self.log_probabilities.append(float(numpy.log(softmax(self.logits)[self.chosen])))
        if len(self.new_ids) == self.n_tokens_to_generate:
            self.finish_reason = "length"
        return self._show(self.tokenizer.token_bytes(self.chosen), final=self.finish_reason is not None)

    def newest(self):
        """The id that the next model step reads, as a list."""
        return self.ids[-1:]

    def _coin(self):
        """A number that is uniform in [0, 1), the next of the seed's. Greedy decoding needs none."""
        if self.sampling_params.temperature == 0:
            return 0.0
        self._coins = self._coins or numpy.random.default_rng(self._seed)  # numpy.random takes a while to import
        return self._coins.random()

    def finish(self, reason):
        """Ends the sequence. Returns the text that was still held back."""
        self.finish_reason = reason
        return self._show(final=True)

    def _show(self, data=b"", final=False):
        """Adds bytes to the text. Returns the part that has not been shown yet and cannot become part of a stop
        text."""
        self.text += self._utf8.decode(data, final)
        found = [place for place in map(self.text.find, self.stop) if place >= 0]
        if found:
            self.text, self.finish_reason, final = self.text[: min(found)], "stop", True
        end = len(self.text) if final else len(self.text) - self._n_held_back()
        piece, self.n_shown = self.text[self.n_shown : end], max(end, self.n_shown)
        return piece

    def _n_held_back(self):
        """The number of characters at the end of the text that may be the beginning of a stop text."""
        lengths = range(1, max(map(len, self.stop), default=0))
        return max((n for n in lengths if any(len(s) > n and self.text.endswith(s[:n]) for s in self.stop)), default=0)


def generate(model, sequence, overflow=None):
    """Yields the text of a sequence, a piece for each token ("" where no character is complete yet), until
    sequence.finish_reason is set. Lazy: one model step for each next().

    When n_ctx tokens have passed through the model, the sequence ends, unless there is an `overflow` function: that is
    called, and the text goes on from the last n_ctx/2 tokens, in a new cache, as their positions have changed.
    """
    n_tokens = min(len(sequence.ids) + sequence.n_tokens_to_generate, model.n_ctx)
    tokens, position, cache = sequence.ids[:], 0, init_cache(model, n_tokens)
    while sequence.finish_reason is None:
        if position + len(tokens) > model.n_ctx:
            if overflow is None:
                yield sequence.finish("n_ctx")
                return
            overflow()
            tokens, position, cache = sequence.ids[-max(1, model.n_ctx // 2) :], 0, init_cache(model, model.n_ctx)
        logits, cache = step(model, tokens, cache, position)
        yield sequence.accept(model.backend.to_numpy(logits))
        tokens, position = sequence.ids[-1:], position + len(tokens)
