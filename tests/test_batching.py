"""A row of a batch is what its prompt gives alone."""

import random

import numpy as np
import pytest
from conftest import GOLDEN, model_of, oracle, random_subject
from test_jax import STORY_PROMPTS

import backends
from encoder import get_encoder
from inference import batching, slot_caches
from inference.generate import Sequence, generate
from inference.model import init_cache, step
from inference.sampling import SamplingParams

jax = oracle("jax")
SETTINGS = {"greedy": SamplingParams(), "sampled": SamplingParams(0.8, 50, 0.95, bad_words=((5,),))}


def prompts_of_16_lengths(encoder):
    ids = encoder.encode(" ".join(STORY_PROMPTS))
    return [ids[3 * i : 3 * i + 1 + 2 * i] for i in range(16)]


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_each_row_equals_its_prompt_alone(storyteller, backend, settings):
    encoder, hparams, params = storyteller
    model = model_of(params, hparams["n_head"], backend)

    def rows():
        for i, ids in enumerate(prompts_of_16_lengths(encoder)):
            end_ids = encoder.encode(".") if i % 2 else []
            yield Sequence(
                encoder, ids, 12 + i, SETTINGS[settings], seed=7 + i, end_ids=end_ids, stop=[" a"] * (i % 3 == 0)
            )

    together, alone = list(rows()), list(rows())
    batching.generate_batch(model, together)
    for a, b in zip(together, alone, strict=True):
        list(generate(model, b))
        assert (a.ids, a.text, a.finish_reason) == (b.ids, b.text, b.finish_reason)
    assert {row.finish_reason for row in together} >= {"length", "stop", "end_of_text"}


def test_the_same_seed_draws_the_same_text_on_both_backends(storyteller):
    encoder, hparams, params = storyteller
    found = []
    for backend in backends.NAMES:
        model = model_of(params, hparams["n_head"], backend)
        settings = SamplingParams(0.8, 50, 0.95)
        rows = [
            Sequence(encoder, encoder.encode(prompt), 100, settings, seed=i) for i, prompt in enumerate(STORY_PROMPTS)
        ]
        batching.generate_batch(model, rows)
        found.append([row.new_ids for row in rows])
    assert len(found[0]) == 20
    assert found[0] == found[1]


def test_logits_of_a_batch_are_those_of_its_rows(storyteller):
    _, hparams, params = storyteller
    model = model_of(params, hparams["n_head"], "jax")
    cache = slot_caches.repeat(init_cache(model, 20), 3)
    logits, cache = batching.step_batch(model, [[1, 2, 3], [4], [5, 6]], cache, [0, 0, 0])
    logits, cache = batching.step_batch(model, [[7], [8], [9]], cache, [3, 1, 2])
    for i, ids in enumerate(([1, 2, 3, 7], [4, 8], [5, 6, 9])):
        alone, _ = step(model, ids, init_cache(model, 20), 0)
        assert np.abs(np.asarray(logits[i] - alone)).max() <= 2e-5


def test_rows_that_want_nothing(storyteller):
    encoder, hparams, params = storyteller
    model = model_of(params, hparams["n_head"])
    rows = [Sequence(encoder, [1, 2, 3], 0), Sequence(encoder, [4], 2)]
    batching.generate_batch(model, rows)
    batching.generate_batch(model, rows)
    assert [len(row.new_ids) for row in rows] == [0, 2]


N_SLOTS, N_TOKENS = 3, 40


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def small(request):
    """(encoder, Subject): one layer, but a vocabulary with text in it."""
    subject = random_subject(request.param, n_vocab=512, n_ctx=N_TOKENS, n_layer=1)
    return get_encoder(GOLDEN.name, GOLDEN.parent), subject


def random_sequence(words, seed):
    rng = random.Random(seed)
    n_new = rng.randrange(1, 16)
    ids = rng.choices(range(512), k=rng.choice([1, 2, 5, rng.randrange(1, N_TOKENS - n_new + 1), N_TOKENS - n_new]))
    params = SamplingParams() if rng.random() < 0.3 else SamplingParams(1.5, top_k=30)
    return Sequence(words, ids, n_new, params, end_ids=rng.sample(range(512), 20), seed=seed)


@pytest.mark.parametrize(("backend", "seed", "n"), [*(("numpy", seed, 20) for seed in range(4)), ("jax", 9, 8)])
def test_sequences_join_and_leave_at_any_time(small, backend, seed, n):
    """Each one gets what it gets alone, whoever comes and goes beside it and however full the slots are."""
    words, subject = small
    model, rng = subject.model(backend), random.Random(seed)
    batch, pieces, removed = batching.Batch(model, N_SLOTS, N_TOKENS), {}, set()
    waiting = [random_sequence(words, 100 * seed + i) for i in range(n)]
    sequences = waiting[:]
    while waiting or batch.sequences():
        active, event = batch.sequences(), rng.random()
        assert len(active) <= N_SLOTS
        if waiting and len(active) == N_SLOTS:
            with pytest.raises(ValueError, match="3 slots of 40 tokens: no room"):
                batch.add(waiting[-1])
        elif waiting and (event < 0.4 or not active):
            batch.add(waiting.pop())
            continue
        if active and event > 0.9:
            removed.add(leaving := rng.choice(active))
            batch.remove(leaving)
        elif active:
            for sequence, piece in batch.step():
                pieces[sequence] = pieces.get(sequence, "") + piece
    assert removed
    for i, sequence in enumerate(sequences):
        alone = random_sequence(words, 100 * seed + i)
        list(generate(model, alone))
        if sequence in removed:
            assert sequence.finish_reason is None
            assert sequence.new_ids == alone.new_ids[: len(sequence.new_ids)]
        else:
            found = sequence.new_ids, pieces[sequence], sequence.text, sequence.finish_reason
            assert found == (alone.new_ids, alone.text, alone.text, alone.finish_reason)


@pytest.mark.parametrize("backend", backends.NAMES)
def test_a_long_prompt_may_join_a_sequence_that_is_nearly_done(small, backend):
    words, subject = small
    model = subject.model(backend)
    batch = batching.Batch(model, 2, N_TOKENS)
    first, second = (Sequence(words, range(n), N_TOKENS - n) for n in (37, 30))
    batch.add(first)
    batch.step()
    batch.add(second)
    while batch.sequences():
        batch.step()
    for sequence, n in ((first, 37), (second, 30)):
        assert sequence.new_ids == subject.greedy(range(n), N_TOKENS - n)


@pytest.mark.parametrize("backend", backends.NAMES)
def test_a_sequence_that_no_slot_could_hold_is_refused(small, backend):
    words, subject = small
    batch = batching.Batch(subject.model(backend), 1, n_tokens=10)
    with pytest.raises(ValueError, match="1 slots of 10 tokens: no room for one more of 11"):
        batch.add(Sequence(words, range(5), 6))
    batch.add(Sequence(words, range(5), 5))
    assert len(batch.sequences()) == 1


def test_float32_is_float32_where_jax_has_64_bits_switched_on(small):
    """Positions come as integers of several widths then, which JAX does not mix where it writes into the cache."""
    words, subject = small
    expected = subject.greedy([1, 2, 3], 5)
    with jax.enable_x64(True):
        model, rows = subject.model("jax"), [Sequence(words, [1, 2, 3], 5) for _ in range(2)]
        batching.generate_batch(model, rows)
        one = Sequence(words, [1, 2, 3], 5)
        list(generate(model, one))
        assert model.init_cache(model.params, 4)[0][0].dtype == "float32"
    assert [row.new_ids for row in (*rows, one)] == [expected] * 3
