"""The comparison of two checkouts: its statistics on made-up times, and the whole program with a stand-in."""

import itertools
import json

import numpy as np
import pytest
from conftest import GOLDEN, ROOT

from tools import bench, compare


@pytest.mark.parametrize("n", [6, 7, 12, 16])
def test_the_interval_is_the_exact_one(n):
    """Each way in which n values may lie below or above the median is as likely as any other: all are tried."""
    low, high = compare.median_interval(range(n))
    below = np.array([sum(ways) for ways in itertools.product((0, 1), repeat=n)])  # how many values lie below it
    assert np.mean((below > low) & (below <= high)) >= 0.95
    assert np.mean((below > low + 1) & (below <= high - 1)) < 0.95, "the next narrower interval is too narrow"


def test_31_rounds_and_their_order():
    """The 10th and the 22nd of 31 ordered values, as tables of the sign test say."""
    shuffled = np.random.default_rng(0).permutation(31) + 1
    assert compare.median_interval(shuffled) == (10, 22)


@pytest.mark.parametrize("draw", ["normal", "exponential", "standard_cauchy"])
def test_the_true_median_is_inside_whatever_the_noise(draw):
    rng = np.random.default_rng(1)
    median = {"normal": 0, "exponential": np.log(2), "standard_cauchy": 0}[draw]
    intervals = [compare.median_interval(getattr(rng, draw)(size=31)) for _ in range(2000)]
    assert np.mean([low <= median <= high for low, high in intervals]) > 0.95


@pytest.mark.parametrize(("speed", "said"), [(0.9, 1), (0.92, 1), (1.0, 0), (1.1, 0)])
def test_a_slower_checkout_is_called_so_and_no_other(speed, said):
    """200 comparisons of 31 rounds, in which both share a noise of 20% and each has 3% of its own."""
    rng, called = np.random.default_rng(2), 0
    for _ in range(200):
        shared = rng.lognormal(0, 0.2, 31)
        own = {name: rng.lognormal(0, 0.03, 31) / s for name, s in (("this", speed), ("other", 1))}
        times = {name: (shared * noise).tolist() for name, noise in own.items()}
        line, is_slower = compare.report(times)
        assert ("SLOWER" in line) == is_slower
        called += is_slower
    assert abs(called / 200 - said) <= 0.05


def test_the_numbers_of_a_line():
    times = {"this": [1.0] * 4 + [2.0] * 4, "other": [2.0] * 4 + [1.0] * 4}
    assert compare.report(times) == ("1.250 (0.500 to 2.000; this 1.5000 s, other 1.5000 s)", False)


def test_both_are_asked_in_turn_and_the_first_rounds_do_not_count(monkeypatch):
    asked = []

    class Worker:
        def __init__(self, backend, folder, root):
            self.name = root

        def ask(self, task, argument):
            asked.append((self.name, task, argument))
            return len(asked)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            asked.append(self.name)

    monkeypatch.setattr(bench, "Worker", Worker)
    roots = {"this": "a", "other": "b"}
    found = compare.measure(roots, "numpy", "", ["decode", "prefill"], 2, "3M")
    pairs = [asked[i : i + 2] for i in range(0, 16, 2)]
    assert [pair[0][1:] for pair in pairs] == [("decode", 10), ("prefill", 128)] * 4
    assert [pair[0][0] + pair[1][0] for pair in pairs] == ["ba", "ba", "ab", "ab"] * 2
    assert found["decode"] == {"this": [10, 13], "other": [9, 14]}
    assert sorted(asked[16:]) == ["a", "b"]


WORKER = """
import json, sys
print(json.dumps("a stand-in"), flush=True)
for line in sys.stdin:
    task, *arguments = json.loads(line)
    {action}
"""


def stand_in(folder, action):
    (folder / "tools").mkdir()
    (folder / "tools" / "__init__.py").touch()
    (folder / "tools" / "bench.py").write_text(WORKER.replace("{action}", action), encoding="utf-8")
    return str(folder)


FAST = ["--size", "3M", "--rounds", "6", "--tasks", "decode", "--backends", "numpy"]


def test_a_checkout_compared_with_one_that_is_faster_and_one_that_is_slower(command, tmp_path):
    for name, seconds, status in (("fast", 1e-9, 1), ("slow", 1e9, 0)):
        (tmp_path / name).mkdir()
        other = stand_in(tmp_path / name, f"print(json.dumps({seconds}), flush=True)")
        found, out, err = command(other, *FAST, main=compare.main)
        assert (found, err, out.count("slower: numpy decode")) == (status, "", status)


def test_a_checkout_that_fails_is_one_line(command, tmp_path):
    status, _, err = command(stand_in(tmp_path, "sys.exit()"), *FAST, main=compare.main)
    assert (status, err.count("\n"), "ended without an answer" in err) == (1, 1, True)


def test_this_checkout_with_itself(command):
    status, out, _ = command(str(ROOT), *FAST, "--tasks", "decode,prefill", main=compare.main)
    assert status in (0, 1), "on a busy machine anything may seem slower"
    assert [line.split()[:2] for line in out.splitlines()[2:4]] == [["numpy", "decode"], ["numpy", "prefill"]]


def test_a_cold_start_in_either_checkout(tmp_path):
    assert bench.cold_start(GOLDEN, "numpy", ROOT) > 0
    (tmp_path / "gpt2.py").write_text("import nothing_like_this", encoding="utf-8")
    with pytest.raises(OSError, match="nothing_like_this"):
        bench.cold_start(GOLDEN, "numpy", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no checkout"),
        (["/nowhere"], "'/nowhere' is no checkout"),
        ([str(ROOT), "--rounds", "5"], "--rounds 5"),
        ([str(ROOT), "--tasks", "decode,sleep"], "--tasks 'sleep': choose from decode, batch, prefill, cold"),
        ([str(ROOT), "--backends", "torch"], "--backends 'torch'"),
        ([str(ROOT), "--size", "125M"], "--size '125M'"),
    ],
)
def test_mistakes_are_one_line(arguments, words, command):
    status, out, err = command(*arguments, main=compare.main)
    assert (status, out, err.count("\n"), words in err) == (2, "", 1, True), err


def test_the_protocol_that_older_and_newer_checkouts_share(tmp_path):
    """What a worker is asked and answers: see tools/bench.py. It may grow, but must not change."""
    other = stand_in(tmp_path, "print(json.dumps([sys.argv[1:], task, arguments]), flush=True)")
    setup = {"name": "numpy", "dtype": "float32", "folder": "folder"}
    found = compare.measure({"other": other}, "numpy", "folder", ["decode", "batch", "prefill"], 1, "124M")
    asked = [answers["other"][0] for answers in found.values()]
    assert [answer[1:] for answer in asked] == [["decode", [10]], ["batch", [16]], ["prefill", [512]]]
    assert [(argv[0], json.loads(argv[1])) for argv, *_ in asked] == [("--worker", setup)] * 3
