"""The choice of BLAS threads: on made-up machines whose step times are known, and once on this one."""

import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT, oracle

from backends import numpy_threads

ALONE, BUSY, CROWDED = {1: 33.0, 2: 28.0}, {1: 33.0, 2: 70.0}, {1: 140.0, 2: 900.0}  # milliseconds a step, measured


def spent(machine, n_steps, numbers=(1, 2), n=1, noise=0.0, seed=0):
    """How long n_steps take, and the numbers of threads that were chosen. machine(i) has the step times at step i."""
    rng, choice, total, chosen = random.Random(seed), numpy_threads.Choice(numbers, n), 0.0, []
    for i in range(n_steps):
        chosen.append(choice.n)
        seconds = machine(i)[choice.n] * (1 + noise * rng.expovariate(1))
        choice.record(seconds)
        total += seconds
    return total, chosen


@pytest.mark.parametrize("noise", [0, 0.1])
@pytest.mark.parametrize(
    ("times", "n_steps", "share"),
    [
        (ALONE, 40, 0.94),
        (ALONE, 2000, 0.97),
        (BUSY, 40, 0.85),
        (BUSY, 2000, 0.95),
        (CROWDED, 40, 0.85),
        (CROWDED, 2000, 0.95),
        ({1: 30.0, 2: 30.0}, 2000, 0.99),
    ],
)
def test_the_better_number_is_found_at_little_cost(times, n_steps, share, noise):
    """The share of the speed that always the better number would give; the mean of 20 runs with noise."""
    runs = [spent(lambda _: times, n_steps, noise=noise, seed=seed)[0] for seed in range(20 if noise else 1)]
    assert n_steps * min(times.values()) * (1 + noise) / np.mean(runs) >= share


@pytest.mark.parametrize("change", [(ALONE, BUSY), (BUSY, ALONE), (ALONE, CROWDED)])
def test_a_machine_that_changes_is_noticed(change):
    """After 500 steps. The next 500 reach 0.8 of the speed of the better number, and the last are nearly all with
    it."""
    machine = lambda i: change[i >= 500]  # noqa: E731
    before, _ = spent(machine, 500)
    total, chosen = spent(machine, 1000)
    better = min(change[1], key=change[1].get)
    assert 500 * change[1][better] / (total - before) >= 0.8
    assert chosen[-100:].count(better) >= 80


def test_more_cores_have_more_to_choose_from():
    times = {1: 100.0, 8: 20.0, 16: 30.0}
    _, chosen = spent(lambda _: times, 500, numbers=(1, 8, 16), n=16)
    assert chosen[-100:].count(8) >= 90


class Library:
    """A BLAS that remembers what it was told."""

    def __init__(self):
        self.told = []

    def set_num_threads(self, n):
        self.told.append(n)


@pytest.fixture
def blas(monkeypatch):
    library = Library()
    monkeypatch.setattr(numpy_threads, "libraries", lambda: [(library, 2)])
    return library


def test_the_number_of_threads_is_what_it_was_after_each_step(blas):
    @numpy_threads.adaptive
    def step(params, tokens, fails=False):
        assert len(blas.told) % 2 == 1, "told before the step, and not yet after it"
        if fails:
            raise ValueError("no")
        return params + 1

    assert step(1, np.zeros(1)) == 2
    assert blas.told == [1, 2], "a step of one row begins with one thread"
    with pytest.raises(ValueError, match="no"):
        step(1, np.zeros(1), fails=True)
    assert blas.told == [1, 2] * 2


def test_a_prefill_has_all_threads_and_a_shape_that_comes_back_is_timed(blas):
    step = numpy_threads.adaptive(lambda params, tokens: list(blas.told))
    assert step(0, np.zeros(5)) == []
    assert step(0, np.zeros(5)) == [2]
    assert step(0, np.zeros((4, 1))) == [2, 2]
    step(0, np.zeros((4, 1)))
    assert blas.told == [2, 2] * 2


def test_python_threads_choose_by_themselves(blas):
    """A generator that runs in one thread must not be entered by another."""
    step = numpy_threads.adaptive(lambda params, tokens: sum(range(200)))
    failures = []

    def work():
        try:
            for _ in range(3000):
                step(0, np.zeros(1))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert blas.told[-1] == 2


CODE = """
import sys, numpy
numpy.ones((1, 9)) @ numpy.ones((9, 9))
from backends import numpy_threads
step = numpy_threads.adaptive(lambda params, tokens: [n.num_threads for n, _ in numpy_threads.libraries()])
print([step(0, numpy.zeros(1)) for _ in range(3)], [most for _, most in numpy_threads.libraries()],
      step(0, numpy.zeros(5)), "threadpoolctl" in sys.modules)
"""


def in_a_process(code=CODE, **environment):
    free = {name: value for name, value in os.environ.items() if name not in numpy_threads.VARIABLES}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=free | environment).stdout


def test_the_library_of_this_machine_is_told():
    oracle("threadpoolctl")
    most = int(in_a_process("from backends import numpy_threads; print(numpy_threads.max_threads())"))
    if most == 1:
        pytest.skip("NumPy's BLAS has one thread here, or none that can be set")
    assert in_a_process() == f"{[[most // 2]] * 3} [{most}] [{most}] True\n"


@pytest.mark.parametrize("name", numpy_threads.VARIABLES)
def test_what_the_user_has_set_stays(name):
    assert in_a_process(**{name: "2"}) == "[[], [], []] [] [] False\n"


def test_without_threadpoolctl_nothing_is_changed():
    code = "import sys; sys.modules['threadpoolctl'] = None" + CODE
    assert in_a_process(code) == "[[], [], []] [] [] True\n"


def test_a_first_token_does_not_wait_for_threadpoolctl():
    code = (
        "import sys\nfrom inference.__main__ import main\nmain('Once upon', model_size='3M', n_tokens_to_generate=1)\n"
    )
    assert in_a_process(code + "print('threadpoolctl' in sys.modules)").splitlines()[1:] == ["False"]
