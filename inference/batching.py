"""Many sequences at once. A step reads every weight once, however many sequences it computes, so where reading the
weights is what takes the time, sixteen sequences cost little more than one.

    batch = Batch(model, n_slots=16, n_tokens=200)
    batch.add(sequence)                                # at any time
    while batch.sequences():
        for sequence, piece in batch.step(): ...       # one token for each

Each sequence has a slot, its own position and its own end. `vmap` turns the forward pass of one sequence into that of
all slots; as the position is an argument, each slot can have another. In a step all slots compute equally many tokens:
a slot that needs fewer is padded on the right. The padding is written after the slot's last token, where the mask
hides it, and later tokens overwrite it.
"""

import functools

import numpy

from backends import np
from inference.model import n_positions
from training import lora
from weights.params import tree_map


@functools.lru_cache
def batched(forward, library):
    """model.forward for a batch: the same params and adapters for all; for each slot tokens, cache, position, last, and
    which of the adapters it has (0: none)."""

    def adapted(params, adapters, tokens, cache, position, last, adapter):
        return forward(lora.choose(params, adapters, adapter), tokens, cache, position, last)

    step = library.vmap(adapted, in_axes=(None, None, 0, 0, 0, 0, 0))
    return library.tune(library.jit(step, donate_argnums=(3,)))


def init_caches(model, n_slots, n_tokens):
    """An empty cache for each slot, of at least n_tokens. Every slot reads its whole cache in each step, so a short one
    is shorter than that of one sequence."""
    n_cache = min(model.n_ctx, model.backend.bucket_length(n_tokens), model.backend.cache_capacity(n_tokens))
    return repeat(model.init_cache(model.params, n_cache), n_slots)


def repeat(cache, n_slots):
    """The cache of one sequence -> of n_slots equal ones: each array gets a batch axis in front."""
    return tree_map(lambda array: np.stack([array] * n_slots), cache)


def step_batch(model, tokens, cache, positions, adapters=None, chosen=None):
    """inference.model.step for a batch: a list of tokens and a position for each slot. (logits [n_slots, n_vocab],
    cache). With adapters, as lora.stack returns them, `chosen` has the number of each slot's."""
    longest = max(map(len, tokens))
    n_padded = min(model.backend.bucket_length(longest), n_positions(cache) - max(positions))
    padded = numpy.zeros((len(tokens), n_padded), numpy.int32)
    for row, some in zip(padded, tokens, strict=True):
        row[: len(some)] = some
    last = numpy.array([len(some) - 1 for some in tokens], numpy.int32)
    chosen = numpy.array(chosen or [0] * len(tokens), numpy.int32)
    forward = batched(model.forward, model.backend)
    return forward(model.params, adapters or {}, padded, cache, numpy.array(positions, numpy.int32), last, chosen)


class Batch:
    """Slots that sequences join and leave between steps.

    On a backend that compiles, the number of slots is fixed, as another number would be another program; a free slot
    computes a token that is not used. On one that does not, there are as many slots as sequences, so a batch that
    shrinks gets faster. `adapters` is {name: leaves}, the leaves as lora.load returns them.
    """

    def __init__(self, model, n_slots, n_tokens, adapters=None):
        n_slots += -n_slots % model.backend.N_DATA  # many devices divide the slots evenly
        self.model, self.n_slots, self.n_tokens = model, n_slots, n_tokens
        self.adapter_names = [None, *(adapters or {})]
        self.adapters = model.backend.asarray(lora.stack([*(adapters or {}).values()]))
        self.slots = [None] * n_slots if model.backend.COMPILES else []
        self.positions, self.pending = [0] * len(self.slots), [[0]] * len(self.slots)  # pending: not in the cache yet
        self.cache = None

    def sequences(self):
        """The sequences that are in a slot, none of which has finished."""
        return [sequence for sequence in self.slots if sequence is not None]

    def add(self, sequence):
        """Puts a sequence into a free slot; the next step computes its prompt. Raises ValueError if no slot is free or
        if the sequence needs more positions than a slot has, or an adapter that the batch does not have."""
        if sequence.adapter not in self.adapter_names:
            raise ValueError(f"no adapter {sequence.adapter!r:.80}: choose from {', '.join(self.adapter_names[1:])}")
        n_needed = len(sequence.ids) + sequence.n_tokens_to_generate
        if len(self.sequences()) == self.n_slots or n_needed > self.n_tokens:
            raise ValueError(f"{self.n_slots} slots of {self.n_tokens} tokens: no room for one more of {n_needed}")
        if None not in self.slots:
            self.slots, self.positions, self.pending = [*self.slots, None], [*self.positions, 0], [*self.pending, [0]]
        slot = self.slots.index(None)
        self.slots[slot], self.positions[slot], self.pending[slot] = sequence, 0, sequence.ids[:]

    def remove(self, sequence):
        """Frees the slot of a sequence. Where the number of slots may change, the last one moves into the gap."""
        slot, last = self.slots.index(sequence), len(self.slots) - 1
        self.slots[slot], self.positions[slot], self.pending[slot] = None, 0, [0]
        if self.model.backend.COMPILES:
            return
        for values in (self.slots, self.positions, self.pending):
            values[slot] = values[last]
            values.pop()
        if self.cache is not None and len(self.cache[0][0]) > last:
            for array in (array for layer in self.cache for array in layer):
                array[slot] = array[last]
            self.cache = tree_map(lambda array: array[:last], self.cache)

    def step(self):
        """Computes the pending tokens of each slot and the next token of each sequence. Returns [(sequence, new text)],
        and frees the slots of those that have finished."""
        self._fit_cache()
        # The slot with the most tokens limits how many a step can add. A longer prompt continues in the next step.
        room = n_positions(self.cache) - max(self.positions)
        tokens = [pending[:room] for pending in self.pending]
        chosen = [self.adapter_names.index(sequence and sequence.adapter) for sequence in self.slots]
        logits, self.cache = step_batch(self.model, tokens, self.cache, self.positions, self.adapters, chosen)
        logits, results = self.model.backend.to_numpy(logits), []
        for slot, sequence in enumerate(self.slots):
            if sequence is not None:
                self.positions[slot] += len(tokens[slot])
                self.pending[slot] = self.pending[slot][len(tokens[slot]) :]
                if not self.pending[slot]:
                    results.append((sequence, sequence.accept(logits[slot])))
                    self.pending[slot] = sequence.ids[-1:]
        for sequence, _ in results:
            if sequence.finish_reason:
                self.remove(sequence)
        return results

    def _fit_cache(self):
        """Gives the cache a row for each slot."""
        n_missing = len(self.slots) - (0 if self.cache is None else len(self.cache[0][0]))
        if n_missing:
            empty = init_caches(self.model, n_missing, self.n_tokens)
            joined = self.cache and tree_map(lambda old, new: np.concatenate([old, new]), self.cache, empty)
            self.cache = joined or empty


def generate_batch(model, sequences, adapters=None):
    """Generates all sequences at once until each has finished. Each must have at least one id and fit into n_ctx."""
    sequences = [sequence for sequence in sequences if sequence.finish_reason is None]
    if sequences:
        batch = Batch(model, len(sequences), max(len(s.ids) + s.n_tokens_to_generate for s in sequences), adapters)
        for sequence in sequences:
            batch.add(sequence)
        while batch.sequences():
            batch.step()
