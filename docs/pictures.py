"""Draws the pictures of docs/tutorial.md into docs/pictures/. The numbers in them are computed by the project's code.

python docs/pictures.py
"""

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, without a screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python docs/pictures.py` finds the modules of the project

import gpt2  # noqa: E402
import utils  # noqa: E402
from variants import llama  # noqa: E402
from weights.params import param_shapes  # noqa: E402

BLUE, ORANGE, GREEN, RED, GRAY, PALE = "#9ecae1", "#fdbe85", "#a8ddb5", "#e34a33", "#969696", "#f0f0f0"
TOKEN_COLOURS = (BLUE, ORANGE, GREEN)
plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 11})


# ---- The parts of a picture ----


def canvas(width, height):
    """A figure of 8 inches with axes from (0, 0) to (width, height), without ticks and frame."""
    figure, axes = plt.subplots(figsize=(8, 8 * height / width))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, text, width=22, height=6, colour=BLUE, **font):
    """A rounded box with its middle at (x, y)."""
    corner = x - width / 2, y - height / 2
    style = "round,pad=0,rounding_size=1"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor="#333333"))
    axes.text(x, y, text, ha="center", va="center", **font)


def arrow(axes, start, end, colour="#333333", width=1.5):
    style = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def plus(axes, x, y):
    """The circle with a plus sign, where a result is added to x."""
    axes.plot(x, y, "o", markersize=19, markerfacecolor="white", markeredgecolor="#333333", zorder=3)
    axes.text(x, y, "+", ha="center", va="center", fontsize=15, zorder=4)


def grid(axes, x, y, rows, colours, size=5):
    """A table of numbers with its top left corner at (x, y); `colours` has one colour for each number."""
    for i, row in enumerate(rows):
        for j, number in enumerate(row):
            corner = x + j * size, y - (i + 1) * size
            axes.add_patch(Rectangle(corner, size, size, facecolor=colours[i][j], edgecolor="white", lw=1.5))
            axes.text(corner[0] + size / 2, corner[1] + size / 2, number, ha="center", va="center")


# ---- The pictures ----


def model():
    """The whole model: the way from a text to the probabilities of the next token, and what is in a block."""
    encoder, hparams, params = utils.load_encoder_hparams_and_params("3M")
    ids = encoder.encode("Once upon a time")
    probabilities = gpt2.softmax(gpt2.gpt2(ids, **params, n_head=hparams["n_head"])[-1])
    best = [f"{encoder.decode([int(i)])!r} {probabilities[i]:.1%}" for i in np.argsort(-probabilities)[:2]]
    n, d, n_vocab = len(ids), hparams["n_embd"], hparams["n_vocab"]
    steps = [
        ("encode", GREEN, f"{n} ids: {ids}"),
        ("embed: rows of wte + rows of wpe", BLUE, f"x [n_seq, n_embd] = [{n}, {d}]"),
        ("block 1", ORANGE, "x, of the same shape"),
        (f"blocks 2 to {hparams['n_layer']}", ORANGE, ""),
        ("layer_norm ln_f, unembed", BLUE, f"logits [n_seq, n_vocab] = [{n}, {n_vocab}]"),
        ("softmax of the last row", GREEN, ",  ".join(best)),
    ]
    figure, axes = canvas(100, 80)
    axes.text(25, 78, '"Once upon a time"', ha="center", va="center", weight="bold")
    for i, (name, colour, result) in enumerate(steps):
        y = 70 - 12 * i
        arrow(axes, (25, y + 6), (25, y + 3))
        box(axes, 25, y, name, width=40, colour=colour)
        axes.plot([25, 25], [y - 3, y - 6.2], color="#333333", lw=1.5)
        axes.text(27, y - 4.7, result, ha="left", va="center", fontsize=10)
    arrow(axes, (25, y - 3), (25, y - 7))
    axes.plot([45, 61], [46, 46], color=GRAY, ls=":", lw=2)
    draw_block(axes)
    return figure


def draw_block(axes):
    """The inside of a block: x goes down on the right, each part computes from it and adds to it."""
    axes.add_patch(Rectangle((61, 5), 37, 64, facecolor=PALE, edgecolor=GRAY))
    axes.text(79.5, 72, "one block", ha="center", va="center", weight="bold")
    stream, branch = 93, 76
    arrow(axes, (stream, 68), (stream, 6), width=2.5)
    axes.text(stream - 2, 66, "x", ha="right", va="center", weight="bold")
    for y, norm, part, colour in ((59, "ln_1", "mha: attention", GREEN), (31, "ln_2", "ffn: MLP", ORANGE)):
        axes.plot([stream, branch], [y + 3, y + 3], color="#333333", lw=1.5)
        arrow(axes, (branch, y + 3), (branch, y - 1))
        box(axes, branch, y - 4, f"layer_norm {norm}", width=24, fontsize=10)
        arrow(axes, (branch, y - 7), (branch, y - 10))
        box(axes, branch, y - 13, part, width=24, colour=colour, fontsize=10)
        axes.plot([branch, branch], [y - 16, y - 20], color="#333333", lw=1.5)
        arrow(axes, (branch, y - 20), (stream - 2, y - 20))
        plus(axes, stream, y - 20)


def residual():
    """The residual stream: each part computes from a normalized copy of x and adds its result to x."""
    figure, axes = canvas(100, 36)
    arrow(axes, (13, 8), (86, 8), width=3)
    box(axes, 7, 8, "embed", width=12)
    box(axes, 92.5, 8, "ln_f,\nunembed", width=13, height=8)
    parts = ("ln_1", "attention", GREEN), ("ln_2", "MLP", ORANGE)
    for i, (norm, part, colour) in enumerate(parts + parts):
        left = 17.5 + 17.5 * i
        arrow(axes, (left, 8), (left, 14))
        box(axes, left, 17, norm, width=9, fontsize=10)
        arrow(axes, (left, 20), (left, 23))
        box(axes, left + 4, 26, part, width=14, colour=colour, fontsize=10)
        arrow(axes, (left + 9, 23), (left + 9, 10.2))
        plus(axes, left + 9, 8)
    for x, name in ((30, "block 1"), (65, "block 2")):
        axes.text(x, 33, name, ha="center", va="center", weight="bold")
    text = "the residual stream x, [n_seq, n_embd]: nothing replaces it, each part adds to it"
    axes.text(50, 2.5, text, ha="center", va="center")
    return figure


def mask():
    """The causal mask of four words: which query may see which key, and what each row predicts."""
    words = ["The", "cat", "sat", "down"]
    figure, axes = canvas(100, 56)
    axes.text(48.5, 53, "key: the position that is looked at", ha="center", va="center")
    axes.text(4, 22, "query: the position that looks", ha="center", va="center", rotation=90)
    axes.text(84, 46, "row predicts", ha="center", va="center")
    for i, row in enumerate(np.tri(4, dtype=bool)):
        y = 37.5 - 10 * i
        axes.text(29 + 13 * i, 46, words[i], ha="center", va="center", weight="bold")
        axes.text(20, y, words[i], ha="right", va="center", weight="bold")
        for j, seen in enumerate(row):
            corner = 22.5 + 13 * j, y - 5
            axes.add_patch(Rectangle(corner, 13, 10, facecolor=BLUE if seen else PALE, edgecolor="white", lw=2))
            text = "True" if seen else "False"
            axes.text(corner[0] + 6.5, y, text, ha="center", va="center", color="black" if seen else GRAY)
        arrow(axes, (76, y), (80, y))
        axes.text(82, y, [*words[1:], "the next word"][i], ha="left", va="center")
    return figure


def heads():
    """The right and the wrong way from [n_seq, n_embd] to [n_head, n_seq, d_head]."""
    x = np.array([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])
    figure, axes = canvas(100, 52)
    axes.text(14, 44, "x [3, 4]: each row\n(and colour) is a token", ha="center", va="center")
    grid(axes, 4, 38, x, token_colours(x))
    ways = (
        (
            30,
            "right: split_heads(x, 2)",
            gpt2.split_heads(x, 2),
            "head 0 and head 1 each have\na part of all three tokens",
            "#238b45",
        ),
        (
            68,
            "wrong: x.reshape(2, 3, 2)",
            x.reshape(2, 3, 2),
            "head 0 has all of token 1,\nand nothing of token 3",
            RED,
        ),
    )
    for left, title, both, comment, colour in ways:
        axes.text(left + 14, 46, title, ha="center", va="center", weight="bold", color=colour)
        for i, head in enumerate(both):
            axes.text(left + 5 + 17 * i, 41, f"head {i}", ha="center", va="center")
            grid(axes, left + 17 * i, 38, head, token_colours(head))
        axes.text(left + 14, 14, comment, ha="center", va="center")
    text = "both have the shape [n_head, n_seq, d_head] = [2, 3, 2], so no error is raised"
    axes.text(50, 4, text, ha="center", va="center")
    return figure


def token_colours(numbers):
    """The tens digit of a number says which token it belongs to."""
    return [[TOKEN_COLOURS[number // 10 - 1] for number in row] for row in numbers]


def cache():
    """The cache of one head in one block as it fills: K gains one column and V one row in each step."""
    words, d_head, n_cache = ["Once", "upon", "a", "time", ",", "there"], 3, 8
    figure, axes = canvas(100, 62)
    panels = ((4, 4, "prefill: 4 tokens"), (38, 5, 'step 1: the token ","'), (72, 6, 'step 2: the token "there"'))
    for left, n_filled, title in panels:
        axes.text(left + 12, 58.5, title, ha="center", va="center", weight="bold")
        axes.text(left + 12, 53.5, "K [d_head, n_cache]", ha="center", va="center", fontsize=10)
        axes.text(left + 12, 33.5, "V [n_cache, d_head]", ha="center", va="center", fontsize=10)
        for i in range(n_cache):
            is_new = i < n_filled == 4 or i == n_filled - 1
            colour = ORANGE if is_new else BLUE if i < n_filled else PALE
            word = words[i] if i < n_filled else ""
            for j in range(d_head):
                axes.add_patch(Rectangle((left + 3 * i, 47 - 3 * j), 3, 3, facecolor=colour, edgecolor="white"))
                axes.add_patch(Rectangle((left + 11 + 3 * j, 27.5 - 3 * i), 3, 3, facecolor=colour, edgecolor="white"))
            axes.text(left + 10, 29 - 3 * i, word, ha="right", va="center", fontsize=10)
            if word:
                axes.text(left + 3 * i + 1.5, 40, word, ha="center", va="top", fontsize=8.5, rotation=90)
    text = "orange: computed in this step   blue: kept from before   gray: still free"
    axes.text(50, 2, text, ha="center", va="center")
    return figure


def coin():
    """Inverse-CDF sampling: the coin 0.85 among four candidates."""
    words, probabilities = ["cat", "dog", "bird", "fish"], np.array([0.4, 0.3, 0.2, 0.1])
    ends = np.cumsum(probabilities)
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for i, (end, p) in enumerate(zip(ends, probabilities, strict=True)):
        chosen = end - p <= 0.85 < end
        axes.bar(i, p, bottom=end - p, width=1, color=ORANGE if chosen else BLUE, edgecolor="white")
        axes.text(i, end - p / 2 - 0.03 * chosen, f"{p:.0%}", ha="center", va="center")
        axes.plot([i - 0.5, 3.5], [end, end], color=GRAY, lw=0.7, ls=":")
    arrow(axes, (-0.5, 0.85), (1.5, 0.85), RED, 2)
    arrow(axes, (2, 0.7), (2, 0.02), RED, 2)
    axes.text(0.2, 0.875, "coin 0.85", color=RED, weight="bold", ha="center")
    axes.text(2.08, 0.3, 'falls on the piece\nof "bird"', color=RED, va="center")
    axes.set(xlim=(-0.5, 3.5), ylim=(0, 1.02), ylabel="cumulative sum of the probabilities")
    axes.set_xticks(range(4), words, weight="bold")
    axes.set_yticks([0, *ends])
    return figure


def costs():
    """Where the parameters of 124M are, and what limits its speed as more tokens are computed together."""
    shapes = param_shapes(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12)
    kinds = {"wte": BLUE, "wpe": RED, "attn": GREEN, "mlp": ORANGE}
    sizes = {kind: sum(math.prod(shape) for path, shape in shapes.items() if kind in path) for kind in kinds}
    total = sum(math.prod(shape) for shape in shapes.values())
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    names = ["wte (tokens)", "wpe (positions)", "attention", "MLP"]
    left.barh(names, [size / 1e6 for size in sizes.values()], color=list(kinds.values()))
    for i, size in enumerate(sizes.values()):
        left.text(size / 1e6 + 1, i, f"{size / total:.1%}\n{4 * size / 1e6:.0f} MB", va="center", fontsize=10)
    left.invert_yaxis()
    left.set(xlim=(0, 75), xlabel="millions of parameters")
    left.set_title(f"{total / 1e6:.1f} M parameters, {4 * total / 1e6:.0f} MB")
    n_tokens = np.array([1, 2, 4, 8, 16, 32, 64, 128])
    right.loglog(n_tokens, np.full(8, 4 * total / 25e9 * 1e3), color=BLUE, lw=3)
    right.loglog(n_tokens, 2 * total * n_tokens / 200e9 * 1e3, color=ORANGE, lw=3)
    right.text(1, 24, "reading the weights\n(25 GB per second)", va="bottom", fontsize=10)
    right.text(5, 3.2, "computing (200 billion\noperations per second)", va="center", fontsize=10)
    right.set(xlabel="tokens computed together", ylabel="milliseconds", title="what limits the speed", ylim=(1, 200))
    right.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    right.set_yticks([1, 10, 100], ["1", "10", "100"])
    right.minorticks_off()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def rotary():
    """Two pairs of numbers that turn with the position, and the score of a query and an equal key by distance."""
    config = {"d_head": 4, "rope_base": 100.0, "rope_scaling": None}
    figure, panels = plt.subplots(1, 3, figsize=(8, 3), layout="constrained", width_ratios=(1, 1, 1.5))
    x = np.array([[1.0, 1.0, 0.0, 0.0]])  # the points (1, 0) and (1, 0)
    turned = llama.rotary(np.repeat(x, 7, axis=0), *llama.rotations(np.arange(7), 7, config, x.dtype))
    for i, (axes, colour, speed) in enumerate(zip(panels, (ORANGE, BLUE), ("fast", "slow"), strict=False)):
        axes.add_patch(plt.Circle((0, 0), 1, fill=False, color=GRAY, lw=0.7))
        for position, point in enumerate(turned[:, [i, i + 2]]):
            arrow(axes, (0, 0), point, colour, 2)
            if i == 0 or position in (0, 6):  # the numbers between would overlap
                axes.text(*(1.2 * point), position, ha="center", va="center")
        axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", title=f"a {speed} pair")
        axes.axis("off")
    wide = {"d_head": 64, "rope_base": 10000.0, "rope_scaling": None}
    ones = np.ones((200, 64))
    keys = llama.rotary(ones, *llama.rotations(np.arange(200), 200, wide, ones.dtype))
    panels[2].plot(keys @ keys[0] / 64, color=RED)
    panels[2].set(xlabel="distance in tokens", ylabel="q·k / d_head", title="q = k, 32 pairs")
    panels[2].spines[["top", "right"]].set_visible(False)
    return figure


def lora():
    """LoRA: a frozen matrix w, and beside it two small ones whose product is added to it."""
    figure, axes = canvas(100, 42)
    axes.text(7, 24, "x\n[n_seq, n_in]", ha="center", va="center", weight="bold")
    parts = (
        ((20, 12, 26, 24), BLUE, "w  [n_in, n_out]\nfrozen: no gradient,\nno averages"),
        ((57, 12, 6, 24), ORANGE, "a"),
        ((68, 27, 22, 6), ORANGE, "b  [rank, n_out]"),
    )
    for (x, y, width, height), colour, text in parts:
        axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="#333333"))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center")
    axes.text(60, 9, "[n_in, rank]", ha="center", va="center")
    axes.text(51.5, 24, "+ scale *", ha="center", va="center", fontsize=12)
    axes.text(65.5, 30, "@", ha="center", va="center", fontsize=12)
    axes.text(16, 24, "@  (", ha="center", va="center", fontsize=12)
    axes.text(93, 24, ")", ha="center", va="center", fontsize=12)
    axes.text(79, 20, "trained; starts at 0, so that\nthe product a @ b is 0", ha="center", va="center", fontsize=10)
    axes.text(60, 40, "trained; starts random", ha="center", va="center", fontsize=10)
    return figure


def answer():
    """Instruction tuning: the tokens whose predictions count."""
    encoder = utils.load_encoder_hparams_and_params("3M")[0]
    prompt = [encoder.decode([i]) for i in encoder.encode("### Response:\n")]
    words = ["...", *prompt, *(encoder.decode([i]) for i in encoder.encode("red and blue")), "<|endoftext|>"]
    n_answer = len(words) - 1 - len(prompt)
    figure, axes = canvas(100, 24)
    widths = [2.4 + 1.45 * len(repr(word)) for word in words]
    x, scale = 2.0, 96 / sum(widths)
    for i, (word, width) in enumerate(zip(words, widths, strict=True)):
        colour = GREEN if i >= len(words) - n_answer else PALE
        axes.add_patch(Rectangle((x, 10), width * scale, 7, facecolor=colour, edgecolor="white", lw=2))
        axes.text(x + width * scale / 2, 13.5, repr(word)[1:-1], ha="center", va="center", fontsize=9)
        x += width * scale
    axes.text(2, 20.5, "the prompt: seen, but not counted", ha="left", va="center", color=GRAY)
    axes.text(98, 20.5, "the answer and its end: the loss", ha="right", va="center", color="#238b45", weight="bold")
    axes.text(
        50,
        5,
        "padding up to the longest text of the batch follows, and counts nothing",
        ha="center",
        va="center",
        color=GRAY,
    )
    return figure


PICTURES = (model, residual, mask, heads, cache, coin, costs, rotary, lora, answer)


def main(folder=ROOT / "docs" / "pictures"):
    """Draws all pictures into a folder: one PNG for each function of PICTURES, named as the function is."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for draw in PICTURES:
        figure = draw()
        figure.savefig(Path(folder) / f"{draw.__name__}.png", dpi=100, pil_kwargs={"optimize": True})
        plt.close(figure)


if __name__ == "__main__":
    main()
