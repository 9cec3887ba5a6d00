"""The model with one thing changed: what becomes of the prediction, and what that shows.

    model = broken_module("mask")               # a copy of gpt2.py with one line changed
    model.gpt2(ids, **params, n_head=n_head)

A change replaces text of gpt2.py's source, which is then run as a module of its own. The module gpt2, which computes
the answers of the server, is not touched. A head is silenced in the params instead, as a copy of them.
"""

import functools
import types
from typing import NamedTuple

import numpy

import gpt2


class Change(NamedTuple):
    """`edits` are (old, new) texts of the source. `shows` says what the change shows of a trained model, and what it
    does not."""

    label: str
    edits: tuple
    shows: str


CHANGES = {
    "mask": Change(
        "no causal mask",
        (("mask = np.tri(len(x), dtype=bool)", "mask = np.ones((len(x), len(x)), dtype=bool)"),),
        "Each position now sees the later ones too. The weights were never trained for that, so the loss rises. This "
        "does not show that seeing more is bad: a model trained without the mask would have a loss near 0, as it could "
        "copy the next token, but then it could not write.",
    ),
    "scale": Change(
        "no 1/sqrt(d_head)",
        (("return q / math.sqrt(q.shape[-1]) @ k.mT", "return q @ k.mT"),),
        "The scores are sqrt(d_head) times as large as in training, so softmax gives nearly all weight to one key. "
        "This shows that the trained queries and keys are of a size that needs the division. It does not show why it "
        "helps training: a model could learn smaller queries, but at its start softmax would be saturated, with "
        "hardly any gradient.",
    ),
    "residual": Change(
        "no residual additions",
        (("x = x + mha(", "x = mha("), ("return x + ffn(", "return ffn(")),
        "Each block now replaces x instead of adding to it, so the token and all that earlier blocks found are lost. "
        "This shows that a trained block computes a correction, not a new x. It does not show how well a model could "
        "be trained without the additions; that deep stacks hardly learn is another finding (He et al. 2015).",
    ),
    "layer_norm": Change(
        "no layer norm",
        (("return g * (centred / np.sqrt(variance + eps)) + b", "return x"),),
        "Every layer now gets x as large or as small as it is. This shows that the trained layers need inputs of the "
        "size that they had in training. It does not show that no model could do without layer norm: its main use is "
        "that training is stable.",
    ),
    "positions": Change(
        "no positions",
        (("return wte[np.asarray(inputs)] + wpe[: len(inputs)]", "return wte[np.asarray(inputs)]"),),
        "No vector says where its token stands, so only the mask tells the order. The change of the loss shows how "
        "much this trained model uses positions. It does not show how much a model needs them: one that is trained "
        "without them learns more of the order from the mask (Haviv et al. 2022).",
    ),
    "head": Change(
        "one head silenced",
        (),
        "The head's result is left out: the rows of c_proj that read it are set to 0. A large change shows that this "
        "head matters for this prompt. A small change does not show that it is useless: it may matter for other "
        "prompts, or other heads may do the same.",
    ),
}


@functools.cache
def broken_module(name):
    """A module made from gpt2.py's source with a change of CHANGES."""
    with open(gpt2.__file__, encoding="utf-8") as opened:
        code = opened.read()
    for old, new in CHANGES[name].edits:
        assert code.count(old) == 1, f"gpt2.py no longer has {old!r} once"
        code = code.replace(old, new)
    module = types.ModuleType("broken_gpt2")
    module.__file__ = f"{gpt2.__file__} without {name}"
    exec(compile(code, module.__file__, "exec"), vars(module))
    return module


def silenced(params, n_head, block, head):
    """A copy of params in which nothing of a head reaches x. All other arrays are the same."""
    blocks = [*params["blocks"]]
    c_proj = blocks[block]["attn"]["c_proj"]
    d_head, w = len(c_proj["w"]) // n_head, numpy.array(c_proj["w"])
    w[head * d_head : (head + 1) * d_head] = 0
    blocks[block] = blocks[block] | {"attn": blocks[block]["attn"] | {"c_proj": c_proj | {"w": w}}}
    return params | {"blocks": blocks}


def difference(name):
    """[(line, old text, new text)] of the source lines that a change replaces."""
    with open(gpt2.__file__, encoding="utf-8") as opened:
        lines, found = opened.read().splitlines(), []
    for i, line in enumerate(lines, 1):
        for old, new in CHANGES[name].edits:
            if old in line:
                found.append((i, line.strip(), line.replace(old, new).strip()))
    return found
