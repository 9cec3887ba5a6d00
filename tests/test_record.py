"""serving/'s recording of a forward pass, its costs and its broken copies, beside independent runs."""

import itertools
import math
import random
import sys
import threading
import types

import numpy as np
import pytest
from conftest import cast, random_params

import encoder
import gpt2
import gpt2_pico
from serving import arrays, broken, views
from serving.cost import count
from serving.record import RETURNED, first_sentence, record, source

SOURCE = source(gpt2.__file__)
PROMPT = "Once upon a time, there was a big dog"


@pytest.fixture(scope="module")
def found(storyteller):
    """What the page shows of PROMPT for block 4, and the ids."""
    tokenizer, hparams, params = storyteller
    ids = tokenizer.encode(PROMPT)
    return views.walkthrough(tokenizer, params, hparams["n_head"], ids, PROMPT, 4), ids


def by_hand(params, n_head, ids, block):
    """{(function, the text of the line): its values in the order in which they were made}, by calling the functions of
    gpt2.py one by one."""
    x, block = gpt2.embed(ids, params["wte"], params["wpe"]), params["blocks"][block]
    for earlier in itertools.takewhile(lambda other: other is not block, params["blocks"]):
        x = gpt2.transformer_block(x, **earlier, n_head=n_head)
    a = gpt2.layer_norm(x, **block["ln_1"])
    qkv = a @ block["attn"]["c_attn"]["w"] + block["attn"]["c_attn"]["b"]
    q, k, v = (part.reshape(len(ids), n_head, -1).transpose(1, 0, 2) for part in np.split(qkv, 3, axis=-1))
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(0, 2, 1)
    weights = gpt2.softmax(np.where(np.tri(len(ids), dtype=bool), scores, np.float32(-1e10)))
    heads = weights @ v
    merged = heads.transpose(1, 0, 2).reshape(len(ids), -1)
    middle = x + (merged @ block["attn"]["c_proj"]["w"] + block["attn"]["c_proj"]["b"])
    b = gpt2.layer_norm(middle, **block["ln_2"])
    wide = b @ block["mlp"]["c_fc"]["w"] + block["mlp"]["c_fc"]["b"]
    hidden = gpt2.gelu(wide)
    narrow = hidden @ block["mlp"]["c_proj"]["w"] + block["mlp"]["c_proj"]["b"]
    return {
        ("mha", "qkv", "qkv"): qkv,
        ("attention", "scores", "scores"): scores,
        ("attention", "weights", "weights"): weights,
        ("attention", "return", RETURNED): heads,
        ("merge_heads", "return", RETURNED): merged,
        ("transformer_block", "x = x + mha", "x"): middle,
        ("ffn", "hidden", "hidden"): hidden,
        ("gelu", "return", RETURNED): hidden,
        ("ffn", "return", RETURNED): narrow,
        ("transformer_block", "return", RETURNED): middle + narrow,
    }


def recorded(found, function, beginning, name):
    """The array that a line has made, as the page gets it."""
    for entry in found["records"]:
        text = SOURCE.lines[entry["line"] - 1].strip()
        if found["calls"][entry["call"]]["function"] == function and text.startswith(beginning):
            return found["arrays"][entry["values"][name]["array"]]
    raise AssertionError((function, beginning))


@pytest.mark.parametrize("block", [0, 3, 5])
def test_numbers_are_those_of_an_independent_run(storyteller, block):
    """Cells chosen at random, of all lines that make an array, in any head."""
    tokenizer, hparams, params = storyteller
    ids, rng = tokenizer.encode(PROMPT), random.Random(block)
    found = views.walkthrough(tokenizer, params, hparams["n_head"], ids, PROMPT, block)
    for (function, beginning, name), expected in by_hand(params, hparams["n_head"], ids, block).items():
        array = recorded(found, function, beginning, name)
        assert array["shape"] == [*expected.shape]
        for _ in range(20):
            value, cell = array["values"], []
            for n, shown in zip(expected.shape, array["shown"], strict=True):
                place = rng.randrange(len(shown or range(n)))
                cell.append(place if shown is None else shown[place])
                value = value[place]
            assert value == pytest.approx(float(expected[tuple(cell)]), rel=6e-6, abs=1e-6)


def lines_that_run(run):
    """The lines of gpt2.py that `run` runs, by a trace function that does nothing else."""
    lines = set()

    def watch(frame, event, arg):
        if frame.f_code.co_filename != gpt2.__file__ or frame.f_code.co_name.startswith("<"):
            return watch
        if event == "line":
            lines.add(frame.f_lineno)
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        run()
    finally:
        sys.settrace(before)
    return lines


def test_every_line_that_runs_has_a_record(storyteller, found):
    _, hparams, params = storyteller
    ran = lines_that_run(lambda: gpt2.generate(found[1], params, hparams["n_head"], 1))
    statements = {SOURCE.statements[line].lineno for line in ran}
    assert len(statements) > 40
    assert {entry["line"] for entry in found[0]["records"]} - {*SOURCE.functions.values()} == statements
    assert {SOURCE.function_of[line] for line in statements} == SOURCE.functions.keys() - {"main"}


def test_every_recorded_line_has_a_reason_in_the_words_of_the_source(found):
    words = " ".join(" ".join(line.strip("# ").split()) for line in SOURCE.lines)
    plain = " ".join(words.replace('"""', " ").replace("# ", " ").split())
    for entry in found[0]["records"]:
        why = found[0]["source"]["lines"][entry["line"] - 1]["why"]
        assert len(why) > 10
        assert all(part in plain for part in why.split(". ")), why
    assert first_sentence("One (of a. b) thing. Another.") == "One (of a. b) thing."
    assert found[0]["source"]["lines"][SOURCE.functions["softmax"] + 4]["section"].startswith("4.")


def test_what_a_line_is_said_to_have_made(storyteller):
    params = random_params(n_ctx=16)
    recording = record(gpt2, lambda: gpt2.generate([3, 1, 4], params, 2, 2))
    by_line = {}
    for line, call, values in recording.records:
        text = SOURCE.lines[line - 1].strip()
        by_line.setdefault((recording.calls[call].function, text.partition("  #")[0]), []).append(values)
    made = by_line["generate", "ids.append(int(np.argmax(logits[-1])))"]
    assert [len(values["ids"]) for values in made] == [4, 5]
    assert [values["_"] for values in by_line["generate", "for _ in range(n_tokens_to_generate):"]] == [0, 1]
    assert by_line["check_inputs", "if n_seq + n_new > n_ctx:"] == [{"condition": False}]
    assert recording.result == gpt2.generate([3, 1, 4], params, 2, 2)
    calls = {call.text for call in recording.calls if call.function == "linear"}
    assert calls == {"linear(x, **c_attn)", "linear(x, **c_fc)", "linear(x, **c_proj)", "linear(hidden, **c_proj)"}


def test_recording_leaves_no_trace():
    params, calls = random_params(), []

    def stranger(frame, event, arg):
        calls.append(event)

    before = sys.gettrace()
    sys.settrace(stranger)
    try:
        with pytest.raises(ValueError, match="outside the vocabulary"):
            record(gpt2, lambda: gpt2.generate([99], params, 2, 1))
        assert sys.gettrace() is stranger
    finally:
        sys.settrace(before)


def test_only_its_own_thread_is_recorded():
    params, expected, done = random_params(), [], threading.Event()

    def others():
        while not done.is_set():
            gpt2.gpt2([1, 2], **params, n_head=2)

    thread = threading.Thread(target=others)
    expected = len(record(gpt2, lambda: gpt2.gpt2([1, 2], **params, n_head=2)).records)
    thread.start()
    try:
        assert len(record(gpt2, lambda: gpt2.gpt2([1, 2], **params, n_head=2)).records) == expected
    finally:
        done.set()
        thread.join()


def test_axes_have_the_names_of_the_source(storyteller):
    """With n_seq equal to d_head, and to n_head, so that sizes alone would not tell."""
    tokenizer, hparams, params = storyteller
    for n_seq in (hparams["n_embd"] // hparams["n_head"], hparams["n_head"]):
        found = views.walkthrough(tokenizer, params, hparams["n_head"], [*range(n_seq)], "", 0)
        expected = {
            ("attention", "def", "q"): ["n_head", "n_seq", "d_head"],
            ("attention", "scores", "scores"): ["n_head", "n_query", "n_key"],
            ("attention", "weights", "weights"): ["n_head", "n_query", "n_key"],
            ("mha", "mask", "mask"): ["n_query", "n_key"],
            ("mha", "qkv", "qkv"): ["n_seq", "3*n_embd"],
            ("ffn", "hidden", "hidden"): ["n_seq", "4*n_embd"],
            ("layer_norm", "variance", "variance"): ["n_seq", "1"],
            ("gpt2", "return", RETURNED): ["n_seq", "n_vocab"],
            ("linear", "def", "w"): ["n_embd", "3*n_embd"],
            ("embed", "def", "wpe"): ["n_ctx", "n_embd"],
        }
        for where, axes in expected.items():
            assert recorded(found, *where)["axes"] == axes, where


def test_the_entries_that_are_shown_are_spread_over_an_axis(found):
    """Without gaps but the last, and never more than the limits."""
    reduced = [array for array in found[0]["arrays"] if any(array["shown"])]
    assert len(reduced) > 20
    for array in reduced:
        for n, shown, axis in zip(array["shape"], array["shown"], array["axes"], strict=True):
            if shown and axis not in ("n_vocab", "n_ctx"):
                step = shown[1] - shown[0]
                assert shown == [*range(0, n, step)]
                assert 16 <= len(shown) <= arrays.MAX_COLUMNS


def test_numbers_that_json_has_not():
    assert arrays.rounded(np.array([[1.23456789, np.nan], [np.inf, -2]])) == [[1.23457, None], [None, -2.0]]
    assert arrays.rounded(np.array([True, False])) == [1, 0]


# ---- What follows from the recording ----


def test_the_lens_ends_with_the_output(storyteller, found):
    _, hparams, params = storyteller
    logits = gpt2_pico.gpt2(found[1], **params, n_head=hparams["n_head"])
    assert len(found[0]["stages"]) == hparams["n_layer"] + 1
    for row, candidates in zip(logits.astype(np.float64), found[0]["stages"][-1], strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        assert [entry["id"] for entry in candidates] == np.argsort(-p)[:3].tolist()
        assert [entry["probability"] for entry in candidates] == pytest.approx(np.sort(-p)[:3] * -1, rel=1e-4)
    assert np.allclose(found[0]["last"]["logits"], logits[-1], rtol=1e-6, atol=1e-6)


def test_losses_and_norms(storyteller, found):
    _, hparams, params = storyteller
    logits = gpt2.gpt2(found[1], **cast(params, np.float64), n_head=hparams["n_head"])
    expected = np.log(np.exp(logits).sum(-1))[:-1] - logits[range(len(found[1]) - 1), found[1][1:]]
    assert [entry["loss"] for entry in found[0]["losses"]] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    ranks = [(row > row[i]).sum() + 1 for row, i in zip(logits, found[1][1:], strict=False)]
    assert [entry["rank"] for entry in found[0]["losses"]] == ranks
    x = gpt2.embed(found[1], params["wte"], params["wpe"])
    assert found[0]["norms"][0] == pytest.approx(np.sqrt((x * x).sum(-1)), rel=1e-4)
    assert len(found[0]["norms"]) == hparams["n_layer"] + 1


@pytest.mark.parametrize("text", ["Lily saw a butterfly.", "😀 é", "", "aaaaaaaa   !!", "\ud800"])
def test_merges_end_where_the_tokenizer_does(storyteller, text):
    tokenizer = storyteller[0]
    pieces = views.pieces(tokenizer, text)
    assert [i for piece in pieces for i in piece["ids"]] == tokenizer.encode(text)
    for piece in pieces:
        assert [tokenizer.ids[symbol] for symbol in piece["steps"][-1]] == piece["ids"]
        assert piece["steps"][0] == [encoder.SPELL[byte] for byte in piece["bytes"]]
        assert all(len(a) == len(b) + 1 for a, b in itertools.pairwise(piece["steps"]))


# ---- Costs ----


def test_costs_are_those_of_the_formulas():
    n, d, n_head, n_vocab, n_layer = 5, 8, 2, 11, 3
    params = random_params(n_vocab, 8, d, n_head, n_layer)
    costs = count(gpt2, lambda counted: gpt2.gpt2([1, 2, 3, 4, 5], **counted, n_head=n_head), params)
    found = {SOURCE.lines[line - 1].strip().partition("  #")[0]: cost for line, cost in costs.items()}
    weights = 12 * d * d
    assert found["return x @ w + b"].operations == n_layer * (2 * n * weights + n * 9 * d)
    assert found["return x @ wte.T"].operations == 2 * n * d * n_vocab
    assert found["return weights @ v"].operations == n_layer * 2 * n * n * d
    assert found["return q / math.sqrt(q.shape[-1]) @ k.mT"].operations == n_layer * (2 * n * n * d + n * d)
    assert found["return x + ffn(layer_norm(x, **ln_2), **mlp)"].operations == n_layer * n * d
    assert found["centred = x - x.sum(axis=-1, keepdims=True) / x.shape[-1]"].operations == (2 * n_layer + 1) * (
        2 * n * d + n
    )
    assert found["return x @ wte.T"].bytes == 4 * (n * d + n_vocab * d + n * n_vocab)
    assert found["return wte[np.asarray(inputs)] + wpe[: len(inputs)]"].bytes == 4 * n * d * 5
    merged = found["return x.swapaxes(0, 1).reshape(n_seq, n_head * d_head)"]
    assert (merged.operations, merged.bytes) == (0, n_layer * 2 * 4 * n * d)


def test_counting_changes_no_number(storyteller):
    _, hparams, params = storyteller
    results = []
    count(gpt2, lambda counted: results.append(gpt2.gpt2([5, 6, 7], **counted, n_head=hparams["n_head"])), params)
    assert np.array_equal(np.asarray(results[0]), gpt2.gpt2([5, 6, 7], **params, n_head=hparams["n_head"]))


def test_the_costs_of_the_page_sum_to_the_total(storyteller, found):
    """Nearly all of it is 2 operations for each weight and token."""
    total = sum(entry["operations"] for entry in found[0]["cost"])
    d, n = 192, len(found[1])
    assert total == pytest.approx(2 * n * (6 * 12 * d * d + d * 2048), rel=0.05)


# ---- Broken models ----


def changed(name, ids, params, n_head=2):
    return broken.broken_module(name).gpt2(ids, **params, n_head=n_head)


def test_without_a_mask_the_first_position_sees_the_last():
    params = random_params()
    assert np.allclose(gpt2.gpt2([1, 2, 3], **params, n_head=2)[0], gpt2.gpt2([1, 2, 4], **params, n_head=2)[0])
    assert not np.allclose(changed("mask", [1, 2, 3], params)[0], changed("mask", [1, 2, 4], params)[0], atol=1e-3)


def test_without_the_scale_queries_are_longer():
    params, scaled = random_params(n_embd=6), random_params(n_embd=6)
    for block in scaled["blocks"]:
        for array in block["attn"]["c_attn"].values():
            array[..., :6] *= math.sqrt(3)
    assert np.allclose(changed("scale", [1, 2, 3], params), gpt2.gpt2([1, 2, 3], **scaled, n_head=2), atol=1e-4)


def test_without_positions_the_order_is_lost():
    params = random_params(n_layer=1)
    assert np.allclose(
        changed("positions", [1, 2, 3], params)[-1], changed("positions", [2, 1, 3], params)[-1], atol=1e-4
    )
    assert not np.allclose(*(gpt2.gpt2(ids, **params, n_head=2)[-1] for ids in ([1, 2, 3], [2, 1, 3])), atol=1e-3)


def test_without_residual_additions_and_layer_norms():
    params = random_params(n_layer=1)
    x, block = gpt2.embed([1, 2], params["wte"], params["wpe"]), params["blocks"][0]
    middle = gpt2.mha(gpt2.layer_norm(x, **block["ln_1"]), **block["attn"], n_head=2)
    last = gpt2.ffn(gpt2.layer_norm(middle, **block["ln_2"]), **block["mlp"])
    expected = gpt2.unembed(gpt2.layer_norm(last, **params["ln_f"]), params["wte"])
    assert np.allclose(changed("residual", [1, 2], params), expected, atol=1e-4)
    middle = x + gpt2.mha(x, **block["attn"], n_head=2)
    expected = gpt2.unembed(middle + gpt2.ffn(middle, **block["mlp"]), params["wte"])
    assert np.allclose(changed("layer_norm", [1, 2], params), expected, atol=1e-3)


def test_a_silenced_head_adds_nothing():
    params, x = random_params(), np.float32(np.random.default_rng(0).normal(size=(4, 6)))
    silent = broken.silenced(params, 2, block=1, head=0)
    attn = params["blocks"][1]["attn"]
    heads = [gpt2.split_heads(part, 2) for part in np.split(gpt2.linear(x, **attn["c_attn"]), 3, axis=-1)]
    result = gpt2.attention(*heads, mask=np.tri(4, dtype=bool))
    result[0] = 0
    expected = gpt2.linear(gpt2.merge_heads(result), **attn["c_proj"])
    assert np.allclose(gpt2.mha(x, **silent["blocks"][1]["attn"], n_head=2), expected, atol=1e-5)
    assert silent["blocks"][0] is params["blocks"][0]
    assert not np.array_equal(silent["blocks"][1]["attn"]["c_proj"]["w"], attn["c_proj"]["w"])


@pytest.mark.parametrize("name", broken.CHANGES)
def test_a_change_is_shown_as_it_is_and_stays_in_its_copy(name):
    before = vars(gpt2).copy()
    module = broken.broken_module(name)
    assert isinstance(module, types.ModuleType)
    assert module.gpt2 is not gpt2.gpt2
    assert vars(gpt2) == before
    assert len(broken.difference(name)) == len(broken.CHANGES[name].edits)
    for line, old, new in broken.difference(name):
        assert SOURCE.lines[line - 1].strip() == old != new
    assert "not show" in broken.CHANGES[name].shows
