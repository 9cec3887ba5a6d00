"""What tools.drafts prints: the gain on prompts, and the gain that follows from the time of a pass."""

import re

import pytest

from tools import drafts


def test_prompts_are_measured_and_averaged(command, monkeypatch, tmp_path):
    monkeypatch.setattr(drafts, "N_TOKENS", 12)
    (tmp_path / "prompts").write_text("verse\none two one two one\n====\nstory\nOnce\nupon\n", encoding="utf-8")
    assert drafts.read_prompts(tmp_path / "prompts") == [("verse", "one two one two one"), ("story", "Once\nupon")]
    flags = ["3M", "--prompts", str(tmp_path / "prompts"), "--backend", "numpy", "--rounds", "1"]
    for more in ([], ["--draft_model", "3M"]):
        status, out, _ = command(*flags, *more, main=drafts.main)
        assert status == 0
        assert re.search(r"^\| 1\. verse \| 11 \| \d\.\d\d \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", out, re.MULTILINE)
        assert "| mean: story |" in out


def test_the_gain_from_times(command):
    status, out, _ = command(
        *["3M", "--draft_model", "3M", "--random", "--backend", "numpy", "--rounds", "1"], main=drafts.main
    )
    assert status == 0
    assert re.search(r"a pass of 1 rows \d+ ms \(1\.00\), .* 8 rows", out)
    assert "drafts pay from" in out
    # By hand: at rate 0.5 two rows give 1.5 tokens in 1.25 s, four give 1.875 in 2.5 s; without drafts 1 in 1 s.
    assert drafts.gain(0.5, {2: 1.25, 4: 2.5}, 1.0) == 1.2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["3M", "--random"], "choose the model and --draft_model from 3M, 124M"),
        (["3M", "--rounds", "0"], "--rounds 0"),
        (["3M", "--backend", "torch"], "unknown backend"),
    ],
)
def test_mistakes_are_one_line(arguments, word, command):
    status, _, err = command(*arguments, main=drafts.main)
    assert (status, err.count("\n"), word in err) == (2, 1, True)
