"""Many sequences at once. A step reads every weight once, however many sequences it computes, so where reading the
weights is what takes the time, sixteen sequences cost little more than one.

    batch = Batch(model, n_slots=16, n_tokens=200)
    batch.add(sequence)                                # at any time
    while batch.sequences():
        for sequence, piece in batch.step(): ...       # one token for each

`vmap` turns the forward pass of one sequence into that of all slots; as the position is an argument, each slot can have
another. A sequence goes through two phases. Its prompt is computed alone, in a cache of its own (prefill); that cache
is then copied into a free slot, and from there on each step computes its next token together with those of the others
(decode). Sequences join and leave between steps, so a batch is never waited for: continuous batching (Yu et al. 2022,
"Orca: A Distributed Serving System for Transformer-Based Generative Models", section 3).

A server adds three things, each an argument of Batch:

    chunk        a long prompt is computed in parts, one for each step, so that the other sequences keep their pace
                 (Agrawal et al. 2023, "SARATHI", section 4)
    capacities   the cache is only as long as the longest sequence at the moment: each step reads all of it
    n_kept       caches of sequences that have ended are kept. A prompt that begins as one of them does, such as the
                 next turn of a conversation, continues from a copy.

Fine-tunes of one model can share a batch: Batch(..., adapters={"poet": leaves}) and Sequence(..., adapter="poet"). The
weights of the base model are read once for all slots. LoRA's small matrices are stacked side by side, and each slot
uses its own columns of them (training/lora.py; Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving").
"""

import collections
import functools
import itertools

import numpy

from inference.model import forward, n_positions, step
from inference.slot_caches import capacity, compiled, read_row, reorder, repeat, resize, write_row
from training import lora
from weights.params import tree_map


def adapted(forward):
    """forward for params with one of several adapters: `chosen` is its number, 0 for none."""

    def step(params, adapters, tokens, cache, position, last, chosen):
        return forward(lora.choose(params, adapters, chosen), tokens, cache, position, last)

    return step


@functools.lru_cache
def alone(forward, library):
    """adapted(forward), compiled for one sequence."""
    return library.jit(adapted(forward), donate_argnums=(3,))


@functools.lru_cache
def batched(forward, library):
    """adapted(forward) for a batch: the same params and adapters for all; for each slot tokens, cache, position, last
    and chosen."""
    step = library.vmap(adapted(forward), in_axes=(None, None, 0, 0, 0, 0, 0))
    return library.tune(library.jit(step, donate_argnums=(3,)))


def step_batch(model, tokens, cache, positions, adapters=None, chosen=None):
    """inference.model.step for a batch: a list of tokens and a position for each slot. (logits [n_slots, n_vocab],
    cache). A slot with fewer tokens is padded on the right: the padding is written after its last token, where the mask
    hides it, and later tokens overwrite it. With adapters, as lora.stack returns them, `chosen` has each slot's."""
    longest = max(map(len, tokens))
    n_padded = min(model.backend.bucket_length(longest), n_positions(cache) - max(positions))
    padded = numpy.zeros((len(tokens), n_padded), numpy.int32)
    for row, some in zip(padded, tokens, strict=True):
        row[: len(some)] = some
    last = numpy.array([len(some) - 1 for some in tokens], numpy.int32)
    chosen, positions = numpy.array(chosen or [0] * len(tokens), numpy.int32), numpy.array(positions, numpy.int32)
    forward = batched(model.forward, model.backend)
    return forward(model.params, adapters or lora.stack([]), padded, cache, positions, last, chosen)


# ---- The batch ----


class Batch:
    """Slots that sequences join and leave between steps. n_tokens: how many ids a sequence may have in the end;
    adapters: {name: leaves}, the leaves as lora.load returns them.

    On a backend that compiles, all n_slots are computed in each step, as another number would be another program; a
    free slot computes a token that is not used. On one that does not, the sequences fill the first slots, and only
    those are computed, so a batch that shrinks gets faster.
    """

    def __init__(self, model, n_slots, n_tokens, adapters=None, *, chunk=None, capacities=None, n_kept=0):
        n_slots += -n_slots % model.backend.N_DATA  # many devices divide the slots evenly
        self.model, self.n_slots, self.n_tokens, self.chunk = model, n_slots, n_tokens, chunk
        self.capacities = capacities or (capacity(model, n_tokens),)
        self.joining = collections.deque()  # sequences whose prompts are computed next, first come, first served
        self.prompt = None  # (cache of its own, how many ids are in it) of joining[0]
        self.slots = {}  # sequence: its slots, one, or as many as it has beams
        self.cache = None
        self.kept, self.n_kept = [], n_kept  # (key, row) of sequences that have left, the last used one last
        self.adapter_names = [None, *(adapters or {})]
        self.adapters = model.backend.asarray(lora.stack([*(adapters or {}).values()]))

    def sequences(self):
        """The sequences that have been added, none of which has finished."""
        return [*self.slots, *self.joining]

    def n_used(self):
        """How many slots have been given to sequences."""
        return sum(sequence.n_slots for sequence in self.sequences())

    def n_free(self):
        return self.n_slots - self.n_used()

    def add(self, sequence):
        """Adds a sequence; the next steps compute its prompt. Raises ValueError if no slot is free or if the sequence
        needs more positions than a slot has, or an adapter that the batch does not have."""
        if sequence.adapter not in self.adapter_names:
            raise ValueError(f"no adapter {sequence.adapter!r:.80}: choose from {', '.join(self.adapter_names[1:])}")
        n_needed = len(sequence.ids) + sequence.n_tokens_to_generate
        if self.n_free() < sequence.n_slots or n_needed > self.n_tokens:
            raise ValueError(f"{self.n_slots} slots of {self.n_tokens} tokens: no room for one more of {n_needed}")
        self.joining.append(sequence)

    def remove(self, sequence):
        """Frees the slots of a sequence that has finished or is not wanted any more."""
        if sequence in self.joining:
            self.prompt = None if sequence is self.joining[0] else self.prompt
            self.joining.remove(sequence)
        for slot in sorted(slots := self.slots.pop(sequence, []), reverse=True):
            if self.n_kept and slot == slots[0] and sequence.n_slots == 1:
                self._keep(key_of(sequence), compiled(read_row, self.model.backend)(self.cache, slot))
            self._fill_gap(slot)

    def _fill_gap(self, slot):
        """Moves the last row into a free slot, where only the first slots are computed."""
        moved = [places for places in self.slots.values() if max(places) > slot]
        if self.model.backend.COMPILES or not moved:
            return
        last = max(map(max, moved))
        write_row(self.cache, tree_map(lambda array: array[last], self.cache), slot)
        places = next(places for places in moved if last in places)
        places[places.index(last)] = slot

    def step(self):
        """Computes the next token of each sequence, and prompts. Returns [(sequence, new text)] of the sequences that
        have a new token, and frees the slots of those that have finished."""
        results = (self._decode() if self.slots else []) + self._prefill()
        for sequence, _ in results:
            if sequence.finish_reason:
                self.remove(sequence)
        return results

    def warm_up(self):
        """Runs each program that this batch can need once, so that JAX compiles it now. Yields after each length of the
        cache, which is a matter of seconds for a large model. The batch must be empty."""
        if not self.model.backend.COMPILES:
            return
        row = self.model.init_cache(self.model.params, self._n_prompt(None))
        for n in sorted({self.model.backend.bucket_length(n) for n in range(1, self.chunk + 1)}):
            for all_logits in (False, True):
                _, row = forward(self._model_with(None), [0] * n, row, 0, all_logits)
                yield f"prompts of {n} tokens"
        for n in (*self.capacities, *reversed(self.capacities)):
            self._fit_cache(n)
            self._forward([[0]] * self.n_slots, [0] * self.n_slots, [0] * self.n_slots)
            self._follow_parents([0], [0])
            self.cache = compiled(write_row, self.model.backend, (0,))(self.cache, row, 0)
            found = compiled(read_row, self.model.backend)(self.cache, 0)
            compiled(resize, self.model.backend, n=self._n_prompt(None))(found)
            yield f"a cache of {n} tokens"

    # ---- Decode ----

    def _decode(self):
        n_rows = self.n_slots if self.model.backend.COMPILES else sum(map(len, self.slots.values()))
        tokens, positions, chosen = [[0]] * n_rows, [0] * n_rows, [0] * n_rows
        for sequence, slots in self.slots.items():
            for slot, token in zip(slots, sequence.newest(), strict=True):
                tokens[slot], positions[slot] = [token], len(sequence.ids) - 1
                chosen[slot] = self.adapter_names.index(sequence.adapter)
        self._fit_cache(max(positions) + 1)
        logits = self.model.backend.to_numpy(self._forward(tokens, positions, chosen))
        results = []
        for sequence, slots in self.slots.items():
            results.append((sequence, sequence.accept(logits[slots[0]] if sequence.n_slots == 1 else logits[slots])))
            if sequence.n_slots > 1:
                self._follow_parents(slots, sequence.parents)
        return results

    def _forward(self, tokens, positions, chosen):
        """The logits of a step for all rows. It writes into the cache: NumPy's vmap in place, also into its first rows
        alone."""
        if self.model.backend.COMPILES:
            logits, self.cache = step_batch(self.model, tokens, self.cache, positions, self.adapters, chosen)
        else:
            first = tree_map(lambda array: array[: len(tokens)], self.cache)
            logits, _ = step_batch(self.model, tokens, first, positions, self.adapters, chosen)
        return logits

    def _follow_parents(self, slots, parents):
        """Each beam of a beam search continues the cache of the beam that it extends: parents[i] for the one in
        slots[i]."""
        order = numpy.arange(self.n_slots)
        order[slots] = numpy.array(slots)[parents]
        self.cache = compiled(reorder, self.model.backend)(self.cache, order)

    def _fit_cache(self, n):
        """Gives the cache the least of the capacities that has room for n positions."""
        if self.cache is None:
            self.cache = repeat(self.model.init_cache(self.model.params, self.capacities[0]), self.n_slots)
        wanted = next(level for level, most in enumerate(self.capacities) if most >= n)
        while (level := self.capacities.index(n_positions(self.cache))) != wanted:
            level += 1 if level < wanted else -1
            self.cache = compiled(resize, self.model.backend, n=self.capacities[level])(self.cache)

    # ---- Prefill ----

    def _prefill(self):
        """Computes prompts, the oldest first, all of them or, if there is a limit, until it is reached. A prompt is
        always cut at the same places, so that its numbers do not depend on the others."""
        n_done, results = 0, []
        while self.joining and (self.chunk is None or n_done < self.chunk):
            sequence = self.joining[0]
            row, start = self.prompt or self._first_row(sequence)
            ids = sequence.ids[start:][: self.chunk]
            logits, row = self._forward_prompt(sequence, ids, row, start)
            n_done, self.prompt = n_done + len(ids), (row, start + len(ids))
            if start + len(ids) == len(sequence.ids):
                results.append((sequence, self._join(sequence, row, logits)))
        return results

    def _model_with(self, adapter):
        """The model with an adapter. If the batch has none, it is the model itself."""
        if len(self.adapter_names) == 1:
            return self.model
        step, chosen = alone(self.model.forward, self.model.backend), self.adapter_names.index(adapter)
        return self.model._replace(forward=lambda params, *args: step(params, self.adapters, *args, chosen))

    def _forward_prompt(self, sequence, ids, row, start):
        model = self._model_with(sequence.adapter)
        if not sequence.needs_prompt_logits:
            logits, row = step(model, ids, row, start)
            return self.model.backend.to_numpy(logits), row
        logits, row = forward(model, ids, row, start, all_logits=True)
        logits = self.model.backend.to_numpy(logits)
        sequence.accept_prompt(logits[: len(ids)], start)
        return logits[len(ids) - 1], row

    def _join(self, sequence, row, logits):
        """The prompt is complete: the sequence gets its first token and its slots. Returns the new text."""
        self.joining.popleft()
        self.prompt = None
        piece = "" if sequence.finish_reason else sequence.accept(logits if sequence.n_slots == 1 else logits[None])
        if sequence.finish_reason is None:
            used = {slot for slots in self.slots.values() for slot in slots}
            self._fit_cache(max([len(sequence.ids), *(len(other.ids) for other in self.slots)]))
            self.slots[sequence] = [slot for slot in range(self.n_slots) if slot not in used][: sequence.n_slots]
            for slot in self.slots[sequence]:
                self.cache = compiled(write_row, self.model.backend, (0,))(self.cache, row, slot)
        return piece

    # ---- Prefixes ----

    def _first_row(self, sequence):
        """(a cache for the prompt of a sequence, how many of its ids are in it already)."""
        n, row = 0, None
        if self.n_kept and not sequence.needs_prompt_logits:
            n, row = self._longest_prefix(key_of(sequence))
        sequence.n_reused = n
        if row is None:
            return self.model.init_cache(self.model.params, self._n_prompt(sequence)), 0
        return compiled(resize, self.model.backend, n=self._n_prompt(sequence))(row), n

    def _n_prompt(self, sequence):
        """Where each length is a program, all prompts have caches of one length, with room for the padding."""
        return self.capacities[-1] + (self.chunk or 0) if self.model.backend.COMPILES else len(sequence.ids)

    def _longest_prefix(self, key):
        """(n, row): the row that begins with the first n ids of a key, of all that are kept and all in slots. A short
        prefix is not worth the copy: (0, None)."""
        known = [*self.kept, *((key_of(other), slots[0]) for other, slots in self.slots.items() if other.n_slots == 1)]
        n, row = max(((n_common(key, k) - 1, row) for k, row in known), default=(0, None), key=lambda pair: pair[0])
        if n < 16:
            return 0, None
        if isinstance(row, int):
            return n, compiled(read_row, self.model.backend)(self.cache, row)
        self.kept.sort(key=lambda kept: kept[1] is row)  # the one that was used comes last
        return n, row

    def _keep(self, key, row):
        """Keeps a row. Rows with no more than the beginning of its ids, and the least recently used one, are
        dropped."""
        self.kept = [kept for kept in self.kept if n_common(kept[0], key) < len(kept[0])]
        self.kept = [*self.kept, (key, row)][-self.n_kept :]


def key_of(sequence):
    """What a row with the keys and values of a sequence is found by: the adapter and all ids but the newest, which has
    not been through the model (or, of a prompt, has to go through it for its logits)."""
    return [sequence.adapter, *sequence.ids[:-1]]


def n_common(first, second):
    """How many entries two lists have in common at their beginnings."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def generate_batch(model, sequences, adapters=None):
    """Generates all sequences at once until each has finished. Each must have at least one id and fit into n_ctx."""
    sequences = [sequence for sequence in sequences if sequence.finish_reason is None]
    if sequences:
        batch = Batch(model, len(sequences), max(len(s.ids) + s.n_tokens_to_generate for s in sequences), adapters)
        for sequence in sequences:
            batch.add(sequence)
        while batch.sequences():
            batch.step()
