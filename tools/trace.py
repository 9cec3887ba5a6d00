"""Watch a model choose: a row of a table for each step.

    python gpt2.py "Once upon a time" --trace 5

shows the five likeliest tokens with their probabilities, the one that was chosen and its rank, and the text so far.
"""

import numpy as np

from gpt2 import softmax

N_TEXT = 32  # characters of the text so far


def lines(row, n_best, n_step, rich=False):
    """The table's line for the token that `row`, an inference.stream.Row, took; at the first step the heading too."""
    if n_step == 1:
        yield f"{'step':>4}  {'text so far':{N_TEXT}}  {'chosen':>12} {'rank':>5}  " + "  ".join(
            f"{f'{i + 1}.':>12} {'':>5}" for i in range(n_best)
        )
    ended = row.stop_reason == "end_of_text"
    probabilities = softmax(row.logits)
    order = np.argsort(-row.logits, kind="stable")
    candidates = [cell(row.encoder, i, probabilities[i], rich and i == row.chosen) for i in order[:n_best]]
    rank = int(np.flatnonzero(order == row.chosen)[0]) + 1
    written = spell(row.encoder.decode(row.new if ended else row.new[:-1]))[-N_TEXT:]
    taken = "(the end)" if ended else spell(row.encoder.decode([row.chosen]))
    yield f"{n_step:>4}  {written:{N_TEXT}}  {taken:>12.12} {rank:>5}  {'  '.join(candidates)}"


def cell(encoder, i, probability, bold):
    text = f"{spell(encoder.decode([i])):>12.12} {probability:5.1%}"
    return f"\033[1m{text}\033[0m" if bold else text


def spell(text):
    """The text on one line, its white space visible, and nothing in it that a terminal would obey."""
    text = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(character if character.isprintable() else "·" for character in text)
