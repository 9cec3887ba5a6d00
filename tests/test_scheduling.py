"""What a server adds to a batch: prompts in parts, caches that grow, kept prefixes, beams in slots, a queue."""

import queue
import random
import threading

import numpy as np
import pytest
from conftest import GOLDEN, model_of, oracle, random_params
from test_jax import STORY_PROMPTS

import backends
from encoder import get_encoder
from inference import beam, slot_caches
from inference.batching import Batch
from inference.generate import Sequence, generate
from inference.jobs import BeamJob, Job
from inference.model import n_positions
from inference.sampling import SamplingParams
from inference.scheduling import Closed, QueueFull, Scheduler

jax = oracle("jax")
N_CTX, N_VOCAB = 150, 512


@pytest.fixture(scope="module")
def small():
    """(encoder, params): one layer, but a vocabulary with text in it, and a context of several capacities."""
    return get_encoder(GOLDEN.name, GOLDEN.parent), random_params(n_vocab=N_VOCAB, n_ctx=N_CTX, n_layer=1)


@pytest.fixture(scope="module", params=backends.NAMES)
def model(small, request):
    return model_of(small[1], 2, request.param)


def server_batch(model, n_slots=3, chunk=16, n_kept=3):
    lengths = (32, *slot_caches.capacities(model, N_CTX))
    return Batch(model, n_slots, N_CTX, chunk=chunk, capacities=lengths, n_kept=n_kept)


def random_sequence(words, seed, shared=()):
    rng = random.Random(seed)
    n_new = rng.choice([1, 2, 5, 40])
    ids = [*shared, *rng.choices(range(N_VOCAB), k=rng.choice([1, 2, 15, 16, 17, 33, 100 - len(shared)]))]
    params = SamplingParams() if rng.random() < 0.3 else SamplingParams(1.5, top_k=30)
    return Sequence(words, ids, n_new, params, end_ids=rng.sample(range(N_VOCAB), 8), seed=seed)


def alone(model, sequence):
    list(generate(model, sequence))
    return sequence


def run(batch, waiting):
    """Generates all, each as soon as there is a slot."""
    waiting = [*waiting]
    while waiting or batch.sequences():
        while waiting and batch.n_free():
            batch.add(waiting.pop(0))
        batch.step()


def test_capacities():
    model = model_of(random_params(n_ctx=1000), 2)
    assert slot_caches.capacities(model, 1000) == (64, 128, 256, 512, 1000)
    assert slot_caches.capacities(model, 128) == (64, 128)
    assert slot_caches.capacities(model, 5) == (5,)


def test_each_sequence_gets_what_it_gets_alone(small, model):
    """With prompts in parts, caches that grow and shrink, and prefixes that are found again."""
    batch = server_batch(model)
    system = random.Random(5).choices(range(N_VOCAB), k=40)
    sequences = [random_sequence(small[0], i, system if i % 3 == 0 else ()) for i in range(24)]
    run(batch, sequences)
    for i, sequence in enumerate(sequences):
        expected = alone(model, random_sequence(small[0], i, system if i % 3 == 0 else ()))
        assert (sequence.new_ids, sequence.finish_reason) == (expected.new_ids, expected.finish_reason)
    assert batch.n_used() == 0
    assert sum(sequence.n_reused >= 40 for sequence in sequences) >= 5
    assert len(batch.kept) == 3


def test_a_long_prompt_does_not_hold_up_the_others(small, model):
    """In each step every running sequence gets a token, while the prompt of 100 goes through in parts of 16."""
    batch = server_batch(model)
    running = Sequence(small[0], [1, 2], 60)
    batch.add(running)
    batch.step()
    newcomer = Sequence(small[0], range(100), 5)
    batch.add(newcomer)
    for _ in range(6):
        assert [sequence for sequence, _ in batch.step()] == [running]
    assert [sequence for sequence, _ in batch.step()] == [running, newcomer]


def test_the_cache_is_as_long_as_the_longest_sequence(small, model):
    batch = server_batch(model, n_kept=0)
    long, short = Sequence(small[0], range(100), 2), Sequence(small[0], [1], 50)
    batch.add(short)
    lengths = []
    for i in range(45):
        if i == 3:
            batch.add(long)
        batch.step()
        lengths.append(n_positions(batch.cache))
    assert lengths[0] == 32
    assert max(lengths) == 128
    assert lengths[-1] == 64
    run(batch, [])
    assert short.new_ids == alone(model, Sequence(small[0], [1], 50)).new_ids
    assert long.new_ids == alone(model, Sequence(small[0], range(100), 2)).new_ids


def test_the_next_turn_of_a_conversation_reuses_the_cache(small, model):
    batch = server_batch(model)
    first = Sequence(small[0], range(30), 10)
    run(batch, [first])
    turn = [*first.ids, 7, 8, 9]
    second = Sequence(small[0], turn, 10)
    run(batch, [second])
    assert second.n_reused == 39  # the newest id of the first turn has not been through the model
    assert second.new_ids == alone(model, Sequence(small[0], turn, 10)).new_ids
    assert len(batch.kept) == 1  # the second one holds all that the first one did


def test_a_prefix_is_taken_from_a_running_sequence(small, model):
    batch = server_batch(model)
    first, second = Sequence(small[0], [*range(40), 5], 30), Sequence(small[0], [*range(40), 6], 30)
    batch.add(first)
    while not first.new_ids:
        batch.step()
    batch.add(second)
    run(batch, [])
    assert second.n_reused == 40
    for sequence, last in ((first, 5), (second, 6)):
        assert sequence.new_ids == alone(model, Sequence(small[0], [*range(40), last], 30)).new_ids


def test_the_least_recently_used_prefix_goes_first(small, model):
    batch = server_batch(model, n_kept=2)

    def ask(start):
        sequence = Sequence(small[0], [*range(start, start + 20), 1], 1 + 1)
        run(batch, [sequence])
        return sequence.n_reused

    assert [ask(start) for start in (0, 100, 0, 200, 0, 100)] == [0, 0, 20, 0, 20, 0]


@pytest.mark.parametrize("settings", [{}, {"early_stopping": "never", "length_penalty": 2.0}])
def test_beams_in_slots_find_what_beam_search_finds(small, model, settings):
    """Beside sequences that come and go."""
    kwargs = {"end_ids": tuple(range(0, 512, 60))} | settings
    batch = server_batch(model, n_slots=6)
    searches = [beam.Search(list(range(i, i + 20)), 12, 2 + i, **kwargs) for i in range(3)]
    sequences = [random_sequence(small[0], i) for i in range(6)]
    waiting = [*sequences, *searches]
    random.Random(1).shuffle(waiting)
    while waiting or batch.sequences():
        while waiting and batch.n_free() >= waiting[-1].n_slots:
            batch.add(waiting.pop())
        batch.step()
    for i, search in enumerate(searches):
        expected = beam.search(model, list(range(i, i + 20)), 12, 2 + i, **kwargs)
        assert [hypothesis.ids for hypothesis in search.hypotheses] == [hypothesis.ids for hypothesis in expected]
    for i, sequence in enumerate(sequences):
        assert sequence.new_ids == alone(model, random_sequence(small[0], i)).new_ids


# ---- Compiled programs ----


class Compilations:
    """Counts the programs that JAX compiles, or finds in its cache on disk."""

    def __init__(self):
        self.n = 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, name, seconds, **_):
        self.n += name.endswith("backend_compile_duration")


COMPILATIONS = Compilations()


def test_nothing_is_compiled_after_the_warm_up(small):
    words, params = small
    model = model_of(params, 2, "jax")
    batch = server_batch(model, n_slots=4)
    assert list(batch.warm_up())
    before = COMPILATIONS.n
    assert before > 10
    system = [*range(45)]
    sequences = [random_sequence(words, i, system if i % 3 == 0 else ()) for i in range(30)]
    sequences += [beam.Search([*range(n)], 5, n, end_ids=(3,)) for n in (2, 3, 4)]
    jobs = [Job(words, [*range(n)], m, deliver=None, n_candidates=2, needs_prompt_logits=True)
            for n, m in ((1, 3), (16, 0), (60, 1), (149, 1))]  # fmt: skip
    random.Random(2).shuffle(sequences)
    for sequence in [*sequences, *jobs]:
        while batch.n_free() < sequence.n_slots:
            batch.step()
        batch.add(sequence)
        if sequence is sequences[7]:
            batch.step()
            batch.remove(sequence)
    run(batch, [])
    assert COMPILATIONS.n == before


# ---- The queue ----


class Heard:
    """Jobs and what they have delivered."""

    def __init__(self, words):
        self.words, self.events = words, queue.Queue()

    def job(self, ids=(1, 2, 3), n_new=5, **settings):
        return Job(self.words, ids, n_new, deliver=self.events.put, **settings)

    def until_ended(self, n):
        """The events until n jobs have ended."""
        found = []
        while n:
            found.append(self.events.get(timeout=300))
            n -= found[-1].finish_reason is not None
        return found


@pytest.fixture
def heard(small):
    return Heard(small[0])


@pytest.fixture
def scheduler(small):
    found = Scheduler(model_of(small[1], 2), 2, N_CTX, max_queue=3)
    found.start()
    yield found
    found.close(0)
    found.thread.join(300)


def test_events(scheduler, heard, small):
    scheduler.submit([heard.job(n_candidates=2)])
    events = heard.until_ended(1)
    expected = alone(scheduler.batch.model, Sequence(small[0], [1, 2, 3], 5))
    assert "".join(event.text for event in events) == expected.text
    assert [token.id for event in events for token in event.tokens] == expected.new_ids
    assert [event.finish_reason for event in events] == [None] * 4 + ["length"]
    token = events[0].tokens[0]
    assert token.candidates[0] == (token.id, token.log_probability)


def test_first_come_first_served(scheduler, heard):
    jobs = [heard.job(n_new=n) for n in (50, 4, 3, 2)]
    scheduler.submit(jobs)
    ended = [event.job for event in heard.until_ended(4) if event.finish_reason]
    assert ended == [jobs[1], jobs[2], jobs[3], jobs[0]]


def test_more_beams_than_free_slots_wait_for_their_turn(scheduler, heard):
    jobs = [
        heard.job(n_new=30),
        BeamJob(heard.words, [1], 5, 2, deliver=heard.events.put, n_results=1),
        heard.job(n_new=1),
    ]
    scheduler.submit(jobs)
    ended = [event.job for event in heard.until_ended(3) if event.finish_reason]
    assert ended == jobs


def test_a_full_queue(scheduler, heard):
    scheduler.submit([heard.job(n_new=100) for _ in range(5)])
    with pytest.raises(QueueFull):
        scheduler.submit([heard.job()])
    heard.until_ended(5)
    scheduler.submit([heard.job()])
    heard.until_ended(1)


def test_cancelled_jobs_leave_at_once(scheduler, heard):
    jobs = [heard.job(n_new=140) for _ in range(4)]
    scheduler.submit(jobs)
    heard.events.get(timeout=300)
    scheduler.cancel(jobs)
    scheduler.submit([last := heard.job()])
    events = heard.until_ended(1)
    assert events[-1].job is last
    assert not scheduler.waiting


def test_one_job_that_fails_leaves_the_others_alone(scheduler, heard):
    bad = SamplingParams(bad_words=tuple((i,) for i in range(N_VOCAB)))
    scheduler.submit([heard.job(sampling_params=bad), good := heard.job()])
    ended = {event.job: event for event in heard.until_ended(2) if event.finish_reason}
    assert ended.pop(good).finish_reason == "length"
    ((_, event),) = ended.items()
    assert isinstance(event.error, ValueError)


def test_a_job_that_is_too_long_is_told_so(scheduler, heard):
    scheduler.submit([heard.job(n_new=N_CTX), heard.job()])
    first, *_ = heard.until_ended(2)
    assert "no room for one more of 153" in str(first.error)


def test_closing_ends_those_that_wait_and_lets_the_others_finish(small, heard):
    scheduler = Scheduler(model_of(small[1], 2), 1, N_CTX, max_queue=3)
    scheduler.start()
    running, waiting = heard.job(n_new=100), heard.job()
    scheduler.submit([running, waiting])
    heard.events.get(timeout=300)
    scheduler.close(600)
    with pytest.raises(Closed):
        scheduler.submit([heard.job()])
    ended = {event.job: event for event in heard.until_ended(2) if event.finish_reason}
    assert isinstance(ended[waiting].error, Closed)
    assert ended[running].finish_reason == "length"
    scheduler.thread.join(300)
    assert not scheduler.is_open()


def test_requests_from_many_threads(scheduler, small):
    """Whoever shares the batch: each thread gets what its request gives alone."""
    failed = []

    def ask(i):
        own = Heard(small[0])
        for k in range(3):
            settings = SamplingParams(1.0)
            job = own.job(range(i, i + 20), 10, params=settings, seed=k)
            try:
                scheduler.submit([job])
            except QueueFull:
                continue
            own.until_ended(1)
            expected = alone(
                scheduler.batch.model, Sequence(small[0], range(i, i + 20), 10, SamplingParams(1.0), seed=k)
            )
            failed.extend([(i, k)] * (job.new_ids != expected.new_ids))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not failed


# ---- Rounding: what the same sequence gets in another slot, beside others ----


@pytest.mark.trial
@pytest.mark.parametrize("backend", backends.NAMES)
def test_how_often_the_company_changes_a_token(storyteller, backend):
    """Measured: prints how far logits differ and how many tokens do. See docs/serving.md."""
    encoder, hparams, params = storyteller
    model, rng = model_of(params, hparams["n_head"], backend), random.Random(0)
    ids = encoder.encode(" ".join(STORY_PROMPTS))
    n_tokens = n_different = 0
    worst = 0.0
    for seed in range(12):
        batch = Batch(model, 16, 256, chunk=64, capacities=slot_caches.capacities(model, 256), n_kept=16)

        def make(i, seed=seed):
            cut = random.Random(100 * seed + i)
            start = cut.randrange(len(ids))
            settings = SamplingParams() if i % 2 else SamplingParams(0.9, 40, 0.95)
            return Sequence(encoder, (ids[start:] + ids)[: cut.randrange(1, 100)], 100, settings, seed=i,
                            keep_log_probabilities=True)  # fmt: skip

        together = [make(i) for i in range(32)]
        run(batch, rng.sample(together, len(together)))
        for i, sequence in enumerate(together):
            one = alone(model, make(i))
            n_tokens += len(one.new_ids)
            if one.new_ids != sequence.new_ids:
                n_different += 1
            else:
                worst = max(worst, np.abs(np.subtract(one.log_probabilities, sequence.log_probabilities)).max())
    print(f"\n{backend}: {n_tokens} tokens, {n_different} sequences differ, log-probabilities by up to {worst:.1e}")
    assert worst <= 1e-4
    assert n_different <= 1
