"""How many threads NumPy's matrix products use, chosen while a program runs. For speed only.

NumPy leaves matrix products to a library, BLAS, which gives each core a thread. After each product the threads wait for
each other, and a decode step consists of many products that take less than a millisecond. On two idle cores two threads
are faster than one, by a fifth. But when another program needs one of the cores, each product waits until the operating
system lets the second thread run, and a step takes two to eight times as long as with one thread.

So steps are timed now and then with one thread, with half of the threads and with all, and the fastest number is kept.
The last bits of the logits depend on the number of threads, because the terms of a sum are added in another order.
"""

import collections
import concurrent.futures
import functools
import itertools
import math
import os
import threading
import time

import numpy

SHARE = 0.01  # the part of the time that trials of slower numbers of threads may cost
VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def adaptive(step):
    """The function step(params, tokens, ...), run with the number of BLAS threads that is fastest at the moment.

    Each shape of tokens has a choice of its own: a step of many rows may be worth more threads than a step of one. When
    step returns, the number of threads is what it was. Nothing is changed where one of VARIABLES is set, where there is
    one thread only, and without threadpoolctl.
    """
    local = threading.local()  # Python threads that generate at the same time choose by themselves

    @functools.wraps(step)
    def timed_step(params, tokens, *args, **kwargs):
        if not (choice := find_choice(vars(local), numpy.shape(tokens))):
            return step(params, tokens, *args, **kwargs)
        set_threads(choice.n)
        started = time.perf_counter()
        try:
            result = step(params, tokens, *args, **kwargs)
        finally:
            set_threads(max_threads())
        choice.record(time.perf_counter() - started)
        return result

    return timed_step


def parallel_map(f, items):
    """Yields f(item) for each of the list `items`, in their order. For work of seconds, such as a micro-batch.

    Most operations of NumPy use one core, only matrix products use all. So here each Python thread computes an item,
    with one BLAS thread. These threads do not wait for each other, so one that has to share its core with another
    program does not delay the other one. Nothing runs in parallel where `adaptive` would change nothing.
    """
    if max_threads() == 1:
        yield from map(f, items)
        return
    set_threads(1)
    try:
        with concurrent.futures.ThreadPoolExecutor(max_threads()) as pool:
            yield from pool.map(f, items)
    finally:
        set_threads(max_threads())


def shares(n):
    """A slice for each thread, which together cover range(n)."""
    bounds = [n * i // current() for i in range(current() + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def find_choice(choices, shape):
    """The Choice for steps with tokens of this shape, from the dict `choices`; None if the step is not to be timed."""
    if shape not in choices and numpy.prod(shape) > 1:
        choices[shape] = None  # a prefill has all threads, and may be the only step of its shape
        return None
    if max_threads() == 1:
        return None
    if not choices.get(shape):
        most = max_threads()
        choices[shape] = Choice({1, most // 2, most}, most if numpy.prod(shape) > 1 else most // 2)
    return choices[shape]


class Choice:
    """n: the number of threads for the next step. record(seconds) says how long that step took."""

    def __init__(self, numbers, n):
        self._numbers = choose(sorted(numbers), n)
        self.n = next(self._numbers)

    def record(self, seconds):
        self.n = self._numbers.send(seconds)


def choose(numbers, n):
    """A generator: yields how many threads the next step is to have, and is sent how many seconds that step took.

    It begins with n, and tries each other of `numbers` in turn, for three steps. Then it waits (extra time of the
    trial) / SHARE seconds, so the slower a trial was, the later comes the next. After each change some steps do not
    count: BLAS threads that are not needed any more keep their cores busy for a while.
    """
    usual = collections.deque((yield from run(n, 8))[2:], maxlen=8)
    for other in itertools.cycle(numbers):
        if other == n:
            continue
        expected = numpy.median(usual)
        tried = yield from run(other, 3, at_most=2 * expected)
        remaining = max((sum(tried) - len(tried) * expected) / SHARE, 16 * expected)
        if numpy.mean(tried[-2:]) < 0.95 * expected:
            n, usual = other, collections.deque(tried[-1:], maxlen=8)
        else:
            yield from run(n, 2)
        while remaining > 0:
            usual.append((yield n))
            remaining -= usual[-1]


def run(n, n_steps, at_most=math.inf):
    """Yields n for n_steps steps, or until one takes more than at_most seconds. Returns the seconds of each."""
    taken = []
    while len(taken) < n_steps and not (taken and taken[-1] > at_most):
        taken.append((yield n))
    return taken


def max_threads():
    return max((most for _, most in libraries()), default=1)


def set_threads(n):
    set_to[0] = n
    for library, most in libraries():
        library.set_num_threads(min(n, most))


def current():
    """The number of threads that a matrix product has at the moment."""
    return set_to[0] or max_threads()


set_to = [None]  # the number that was set last
pool = concurrent.futures.ThreadPoolExecutor()  # its threads start when the first work is shared out


@functools.cache
def libraries():
    """(library, its number of threads) for each BLAS in this process whose number of threads may be changed."""
    if any(name in os.environ for name in VARIABLES):
        return []
    try:
        import threadpoolctl
    except ModuleNotFoundError:
        return []
    found = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    return [(library, library.num_threads) for library in found if library.num_threads]
