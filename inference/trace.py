"""A table of the choices during generation, a line for each step.

    python gpt2.py "Once upon a time" --trace 5

shows the five likeliest tokens with their probabilities, the one that was chosen and its rank, and the text so far.
"""

import numpy as np

from gpt2 import softmax

N_TEXT = 32  # characters of the text so far


def lines(sequence, n_best, n_step, rich=False):
    """The line for the newest token of a Sequence; before the first step's line, the heading. rich: the chosen token in
    bold, for a terminal."""
    if n_step == 1:
        yield f"{'step':>4}  {'text so far':{N_TEXT}}  {'chosen':>12} {'rank':>5}  " + "  ".join(
            f"{f'{i + 1}.':>12} {'':>5}" for i in range(n_best)
        )
    ended = sequence.finish_reason == "end_of_text"
    probabilities = softmax(sequence.logits)
    order = np.argsort(-sequence.logits, kind="stable")
    candidates = [cell(sequence.tokenizer, i, probabilities[i], rich and i == sequence.chosen) for i in order[:n_best]]
    rank = int(np.flatnonzero(order == sequence.chosen)[0]) + 1
    written = spell(sequence.tokenizer.decode(sequence.new_ids if ended else sequence.new_ids[:-1]))[-N_TEXT:]
    chosen = "(the end)" if ended else spell(sequence.tokenizer.decode([sequence.chosen]))
    yield f"{n_step:>4}  {written:{N_TEXT}}  {chosen:>12.12} {rank:>5}  {'  '.join(candidates)}"


def cell(tokenizer, i, probability, bold):
    token = spell(tokenizer.decode([i])) if i in tokenizer.spellings else "(no token)"
    text = f"{token:>12.12} {probability:5.1%}"
    return f"\033[1m{text}\033[0m" if bold else text


def spell(text):
    """The text on one line, with visible white space and without control characters, which a terminal would execute."""
    text = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(character if character.isprintable() else "·" for character in text)
