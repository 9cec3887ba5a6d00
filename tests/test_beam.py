"""Beam search against exhaustive search, a plain reference, the greedy loop, and transformers."""

import itertools
import math

import numpy as np
import pytest
from conftest import GOLDEN, model_of, random_params, random_subject

import backends
import gpt2
from inference import beam
from inference.sampling import SamplingParams

N_VOCAB, END, INPUTS = 5, 4, [1, 0]
PENALTIES = [-1, 0, 0.7, 1, 2]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def small(request):
    return random_subject(request.param, n_vocab=N_VOCAB, n_ctx=8, n_embd=6, n_layer=1, seed=3)


def log_probabilities(small, ids):
    row = small.logits(ids)[-1].astype(float)
    return row - row.max() - math.log(math.fsum(math.exp(x - row.max()) for x in row))


def exhaustive(small, n_new, penalty):
    """Every text of up to n_new tokens that ends, and every one of n_new that does not."""
    found = []
    for n in range(1, n_new + 1):
        for ids in itertools.product(range(N_VOCAB), repeat=n):
            if END in ids[:-1] or (n < n_new and ids[-1] != END):
                continue
            total = sum(log_probabilities(small, [*INPUTS, *ids[:i]])[ids[i]] for i in range(n))
            found.append(([i for i in ids if i != END], total / n**penalty))
    return sorted(found, key=lambda pair: -pair[1])


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_width_that_covers_the_tree_finds_what_exhaustive_search_finds(small, backend, penalty):
    model, n_new = small.model(backend), 3
    expected = exhaustive(small, n_new, penalty)
    found = beam.search(model, INPUTS, n_new, N_VOCAB**n_new, length_penalty=penalty, end_ids=[END])
    assert len(found) == len(expected)
    assert [h.score for h in found] == pytest.approx([score for _, score in expected], abs=1e-5, rel=5e-6)
    assert found[0].ids == expected[0][0]


def plain_beam_search(small, n_new, width, penalty, early_stopping, end):
    """Straight from the description, one text at a time and no cache."""
    beams, done = [(0.0, [])], []
    for step in range(1, n_new + 1):
        children = []
        for total, ids in beams:
            scores = log_probabilities(small, INPUTS + ids)
            children += [(total + scores[i], [*ids, i]) for i in range(N_VOCAB)]
        children = sorted(children, key=lambda child: -child[0])[: 2 * width]
        done += [(total / step**penalty, ids[:-1]) for total, ids in children[:width] if ids[-1] == end]
        done = sorted(done, key=lambda pair: -pair[0])[:width]
        beams = [child for child in children if child[1][-1] != end][:width]
        horizon = n_new if early_stopping == "never" and penalty > 0 else step
        content = len(done) == width and (early_stopping is True or done[-1][0] >= beams[0][0] / horizon**penalty)
        if content and step < n_new:
            return done
    return sorted(done + [(total / n_new**penalty, ids) for total, ids in beams], key=lambda pair: -pair[0])[:width]


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_narrower_widths_equal_a_plain_reference(small, backend, width):
    model = small.model(backend)
    for penalty, stopping, end in itertools.product(PENALTIES, [False, True, "never"], range(N_VOCAB)):
        expected = plain_beam_search(small, 5, width, penalty, stopping, end)
        found = beam.search(model, INPUTS, 5, width, length_penalty=penalty, early_stopping=stopping, end_ids=[end])
        assert [h.ids for h in found] == [ids for _, ids in expected], (penalty, stopping, end)
        assert [h.score for h in found] == pytest.approx([score for score, _ in expected], abs=1e-5, rel=5e-6)


@pytest.mark.parametrize("backend", backends.NAMES)
def test_one_beam_is_the_greedy_text(subject, backend):
    model = subject.model(backend)
    for case in subject.cases:
        greedy, n_new = case["greedy"], len(case["greedy"])
        end = greedy[-1]
        for stopping in (False, True, "never"):
            (found,) = beam.search(model, case["ids"], n_new, 1, early_stopping=stopping)
            assert found.ids == greedy
            (found,) = beam.search(model, case["ids"], n_new, 1, early_stopping=stopping, end_ids=[end])
            assert found.ids == greedy[: greedy.index(end)]
            assert found.ended


def test_scores_are_what_they_say(subject):
    inputs = subject.cases[0]["ids"]
    for found in beam.search(subject.model(), inputs, 6, 4, length_penalty=0.5):
        logits = subject.logits(inputs + found.ids).astype(float)
        total = np.log(gpt2.softmax(logits))[len(inputs) - 1 : -1][range(6), found.ids].sum()
        assert found.score == pytest.approx(total / 6**0.5, abs=1e-5)


def test_what_is_banned_is_not_found(golden):
    params, n_head, case = golden["params"], golden["hparams"]["n_head"], golden["cases"][0]
    model, first = model_of(params, n_head), case["greedy_24"][0]
    for found in beam.search(model, case["ids"], 6, 3, sampling_params=SamplingParams(bad_words=((first,),))):
        assert first not in found.ids
    ended = beam.search(
        model, case["ids"], 6, 3, end_ids=[first], sampling_params=SamplingParams(min_new_tokens=4, end_ids=(first,))
    )
    assert min(len(h.ids) for h in ended) >= 4


def test_what_still_runs_at_the_last_step_counts(golden):
    """A case in which enough have ended by then, yet a longer one is better: transformers finds it too."""
    model = model_of(golden["params"], golden["hparams"]["n_head"])
    found = beam.search(model, [322], 2, 2, length_penalty=5.0, early_stopping=True, end_ids=[417])
    assert found[0].score == pytest.approx(-0.1840, abs=1e-4)


def test_no_tokens():
    assert beam.search(model_of(random_params(), 2), [1], 0, 3)[0].ids == []


@pytest.mark.parametrize("stopping", [False, True, "never"])
def test_transformers_finds_the_same(golden, stopping):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(GOLDEN / "hf")
    model = model_of(golden["params"], golden["hparams"]["n_head"])
    for case, penalty, end in itertools.product(golden["cases"][:2], [-1, 0.7, 2], [8, 489]):
        found = beam.search(model, case["ids"], 12, 4, length_penalty=penalty, early_stopping=stopping, end_ids=[end])
        theirs.generation_config.eos_token_id = end
        given = theirs.generate(
            torch.tensor([case["ids"]]), num_beams=4, num_return_sequences=4, max_new_tokens=12, do_sample=False,
            length_penalty=float(penalty), early_stopping=stopping, pad_token_id=end, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        expected = [[i for i in row[len(case["ids"]) :].tolist() if i != end] for row in given.sequences]
        assert [h.ids for h in found] == expected, (case["prompt"], penalty, end)
        assert [h.score for h in found] == pytest.approx(given.sequences_scores.tolist(), abs=1e-4)
