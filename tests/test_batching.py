"""A row of a batch is what its prompt gives alone."""

import numpy as np
import pytest
from conftest import model_of, oracle, random_params
from test_jax import STORY_PROMPTS

import backends
from inference import batching
from inference.generate import Sequence, generate
from inference.model import init_cache, step
from inference.sampling import SamplingParams

oracle("jax")
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


@pytest.mark.parametrize("backend", backends.NAMES)
def test_a_batch_has_the_room_it_needs_and_little_more(backend):
    """Each row reads its whole cache for each token. On JAX each size is a program, so there are few."""
    model, sizes = model_of(random_params(n_ctx=1024, n_layer=1), 2, backend), set()
    for n_tokens in range(1, 1025):
        ((keys, _),) = batching.repeat(init_cache(model, n_tokens), 2)
        assert n_tokens <= keys.shape[-1] <= max(64, min(2 * n_tokens, n_tokens + 255))
        sizes.add(keys.shape[-1])
    few = [64, 128, 256, 512, 768, 1024]
    assert sorted(sizes) == (few if backend == "jax" else list(range(1, 1025)))


def test_logits_of_a_batch_are_those_of_its_rows(storyteller):
    _, hparams, params = storyteller
    model = model_of(params, hparams["n_head"], "jax")
    cache = batching.repeat(init_cache(model, 20), 3)
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
