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
"""

import collections
import functools
import itertools

import numpy

from backends import np, update
from inference.model import forward, n_positions, step
from weights.params import tree_map


@functools.lru_cache
def batched(forward, library):
    """model.forward for a batch: the same params for all; tokens, cache, position and last for each slot."""
    return library.tune(library.jit(library.vmap(forward, in_axes=(None, 0, 0, 0, 0)), donate_argnums=(2,)))


def init_caches(model, n_slots, n_tokens):
    """An empty cache for each slot, of at least n_tokens. Every slot reads its whole cache in each step, so a short one
    is shorter than that of one sequence."""
    return repeat(model.init_cache(model.params, capacity(model, n_tokens)), n_slots)


def capacity(model, n_tokens):
    """The number of positions of a batch's cache that needs n_tokens."""
    return min(model.n_ctx, model.backend.bucket_length(n_tokens), model.backend.cache_capacity(n_tokens))


def capacities(model, n_tokens):
    """Few numbers of positions up to n_tokens: 64, 128, 256, ... A cache of one of these lengths is at most twice as
    long as needed, and on JAX each length is a program."""
    longest = capacity(model, n_tokens)
    return (*itertools.takewhile(lambda n: n < longest, (64 << i for i in itertools.count())), longest)


def step_batch(model, tokens, cache, positions):
    """inference.model.step for a batch: a list of tokens and a position for each slot. (logits [n_slots, n_vocab],
    cache). A slot with fewer tokens is padded on the right: the padding is written after its last token, where the mask
    hides it, and later tokens overwrite it."""
    longest = max(map(len, tokens))
    n_padded = min(model.backend.bucket_length(longest), n_positions(cache) - max(positions))
    padded = numpy.zeros((len(tokens), n_padded), numpy.int32)
    for row, some in zip(padded, tokens, strict=True):
        row[: len(some)] = some
    last = numpy.array([len(some) - 1 for some in tokens], numpy.int32)
    forward = batched(model.forward, model.backend)
    return forward(model.params, padded, cache, numpy.array(positions, numpy.int32), last)


# ---- Caches: `cache` has a batch axis, [n_slots, ...] in each array; `row` is that of one sequence, without it ----


def repeat(row, n_slots):
    """The cache of one sequence -> of n_slots equal ones."""
    return tree_map(lambda array: np.stack([array] * n_slots), row)


def write_row(cache, row, slot):
    """`cache` with `row` in a slot. Positions of the row that the cache has no room for are left out."""
    n = n_positions(cache)
    row = [(keys[..., :n], values[..., :n, :]) for keys, values in row]
    return tree_map(lambda array, new: update(array, new[None], (slot, 0, 0, 0)), cache, row)


def read_row(cache, slot):
    """A copy of the row in a slot."""
    return tree_map(lambda array: np.copy(array[slot]), cache)


def reorder(cache, slots):
    """A cache whose row i is row slots[i] of `cache`."""
    return tree_map(lambda array: array[slots], cache)


def resize(cache, n):
    """A copy of a cache or a row with room for n positions; what is beyond is cut off."""

    def along(axis, array):
        missing = n - array.shape[axis]
        widths = [(0, max(missing, 0) * (i == array.ndim + axis)) for i in range(array.ndim)]
        return np.pad(array, widths) if missing > 0 else np.copy(array[..., :n] if axis == -1 else array[..., :n, :])

    return [(along(-1, keys), along(-2, values)) for keys, values in cache]


@functools.lru_cache
def compiled(f, library, donate=(), **static):
    return library.jit(functools.partial(f, **static), donate_argnums=donate)


# ---- The batch ----


class Batch:
    """Slots that sequences join and leave between steps. n_tokens: how many ids a sequence may have in the end.

    On a backend that compiles, all n_slots are computed in each step, as another number would be another program; a
    free slot computes a token that is not used. On one that does not, the sequences fill the first slots, and only
    those are computed, so a batch that shrinks gets faster.
    """

    def __init__(self, model, n_slots, n_tokens, *, chunk=None, capacities=None, n_kept=0):
        self.model, self.n_slots, self.n_tokens, self.chunk = model, n_slots, n_tokens, chunk
        self.capacities = capacities or (capacity(model, n_tokens),)
        self.joining = collections.deque()  # sequences whose prompts are computed next, first come, first served
        self.prompt = None  # (cache of its own, how many ids are in it) of joining[0]
        self.slots = {}  # sequence: its slots, one, or as many as it has beams
        self.cache = None
        self.kept, self.n_kept = [], n_kept  # (ids, row) of sequences that have left, the last used one last

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
        needs more positions than a slot has."""
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
                self._keep(sequence.ids[:-1], compiled(read_row, self.model.backend)(self.cache, slot))
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
                _, row = forward(self.model, [0] * n, row, 0, all_logits)
                yield f"prompts of {n} tokens"
        for n in (*self.capacities, *reversed(self.capacities)):
            self._fit_cache(n)
            self._forward([[0]] * self.n_slots, [0] * self.n_slots)
            self._follow_parents([0], [0])
            self.cache = compiled(write_row, self.model.backend, (0,))(self.cache, row, 0)
            found = compiled(read_row, self.model.backend)(self.cache, 0)
            compiled(resize, self.model.backend, n=self._n_prompt(None))(found)
            yield f"a cache of {n} tokens"

    # ---- Decode ----

    def _decode(self):
        n_rows = self.n_slots if self.model.backend.COMPILES else sum(map(len, self.slots.values()))
        tokens, positions = [[0]] * n_rows, [0] * n_rows
        for sequence, slots in self.slots.items():
            for slot, token in zip(slots, sequence.newest(), strict=True):
                tokens[slot], positions[slot] = [token], len(sequence.ids) - 1
        self._fit_cache(max(positions) + 1)
        logits = self.model.backend.to_numpy(self._forward(tokens, positions))
        results = []
        for sequence, slots in self.slots.items():
            results.append((sequence, sequence.accept(logits[slots[0]] if sequence.n_slots == 1 else logits[slots])))
            if sequence.n_slots > 1:
                self._follow_parents(slots, sequence.parents)
        return results

    def _forward(self, tokens, positions):
        """The logits of a step for all rows. It writes into the cache: NumPy's vmap in place, also into its first rows
        alone."""
        if self.model.backend.COMPILES:
            logits, self.cache = step_batch(self.model, tokens, self.cache, positions)
        else:
            first = tree_map(lambda array: array[: len(tokens)], self.cache)
            logits, _ = step_batch(self.model, tokens, first, positions)
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

    def _forward_prompt(self, sequence, ids, row, start):
        if not sequence.needs_prompt_logits:
            logits, row = step(self.model, ids, row, start)
            return self.model.backend.to_numpy(logits), row
        logits, row = forward(self.model, ids, row, start, all_logits=True)
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
            n, row = self._longest_prefix(sequence.ids[:-1])  # the last one is computed in any case, for its logits
        sequence.n_reused = n
        if row is None:
            return self.model.init_cache(self.model.params, self._n_prompt(sequence)), 0
        return compiled(resize, self.model.backend, n=self._n_prompt(sequence))(row), n

    def _n_prompt(self, sequence):
        """Where each length is a program, all prompts have caches of one length, with room for the padding."""
        return self.capacities[-1] + (self.chunk or 0) if self.model.backend.COMPILES else len(sequence.ids)

    def _longest_prefix(self, ids):
        """(n, row): the row that begins with the first n ids, of all that are kept and all in slots. A short prefix is
        not worth the copy: (0, None)."""
        n, row = max(((n_common(ids, known), row) for known, row in self.kept), default=(0, None), key=lambda p: p[0])
        for other, slots in self.slots.items():
            if other.n_slots == 1 and n_common(ids, other.ids[:-1]) > n:
                n, row = n_common(ids, other.ids[:-1]), slots[0]
        if n < 16:
            return 0, None
        if isinstance(row, int):
            return n, compiled(read_row, self.model.backend)(self.cache, row)
        self.kept.sort(key=lambda kept: kept[1] is row)  # the one that was used comes last
        return n, row

    def _keep(self, ids, row):
        """Keeps a row. Rows with no more than the beginning of its ids, and the least recently used one, are
        dropped."""
        self.kept = [kept for kept in self.kept if n_common(kept[0], ids) < len(kept[0])]
        self.kept = [*self.kept, (ids, row)][-self.n_kept :]


def n_common(first, second):
    """How many ids two lists have in common at their beginnings."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def generate_batch(model, sequences):
    """Generates all sequences at once until each has finished. Each must have at least one id and fit into n_ctx."""
    sequences = [sequence for sequence in sequences if sequence.finish_reason is None]
    if sequences:
        batch = Batch(model, len(sequences), max(len(s.ids) + s.n_tokens_to_generate for s in sequences))
        for sequence in sequences:
            batch.add(sequence)
        while batch.sequences():
            batch.step()
