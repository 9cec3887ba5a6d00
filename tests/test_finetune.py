"""Classifiers and instruction tuning: whole runs on a tiny model, their parts against plain loops, and bad input."""

import csv
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import GOLDEN, oracle
from test_lora import CONFIG, llama_params

import backends
import gpt2
import utils
from training import classify, finetune, instruct, labelled, lora, tuning
from training.model import forward_of, hidden_of
from weights.params import named_leaves

WORDS = {"ham": ["home", "love", "dinner", "see", "you"], "spam": ["win", "prize", "call", "now", "cash"]}


def texts(n, seed=0):
    rng = random.Random(seed)
    return [(label, " ".join(rng.choices(WORDS[label], k=rng.randint(1, 9)))) for _ in range(n) for label in WORDS]


@pytest.fixture(scope="module")
def tsv(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.tsv"
    path.write_text("".join(f"{label}\t{text}\n" for label, text in texts(40)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A LLaMA with the golden model's tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    config = CONFIG | {"n_vocab": 512, "n_ctx": 96}
    wte = np.random.default_rng(1).normal(scale=0.3, size=(512, 8)).astype(np.float32)
    utils.save_tokenizer(GOLDEN, folder, ["hf"])
    utils.save_model(folder, config, llama_params() | {"wte": wte}, ["hf"])
    return folder


@pytest.fixture
def run(command, tmp_path):
    """Runs a command of training.finetune on NumPy: (exit status, stdout, stderr)."""

    def start(name, *words, out="made", backend="numpy"):
        flags = [] if name == "predict" else ["--out", str(tmp_path / out), "--backend", backend]
        if name != "predict" and "--model_size" not in words:
            flags += ["--model_size", str(GOLDEN)]
        return command(name, *map(str, words), *flags, main=finetune.COMMANDS)

    return start


# ---- Texts with labels ----


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", 'ham\tHi, "you"\nspam\tWin\tnow\n'.replace("Win\tnow", "Win now")),
        ("a.tsv", 'text\tid\tlabel\nHi, "you"\t1\tham\r\nWin now\t2\tspam\n'),
        ("a.csv", 'label,text\nham,"Hi, ""you"""\nspam,Win now\n'),
        ("a.txt", 'ham,"Hi, ""you"""\n\nspam,Win now'),
    ],
)
def test_tables_with_and_without_a_header(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert labelled.read_table(tmp_path / name) == [("ham", 'Hi, "you"'), ("spam", "Win now")]


@pytest.mark.parametrize("balance", [False, True])
def test_the_split_is_stratified_and_uses_each_text_once(balance):
    examples = [("ham", f"h{i}") for i in range(100)] + [("spam", f"s{i}") for i in range(20)]
    parts = labelled.split(examples, seed=3, balance=balance)
    counts = {
        name: [sum(label == wanted for label, _ in part) for wanted in ("ham", "spam")] for name, part in parts.items()
    }
    assert counts == {"train": [14 if balance else 70, 14], "validation": [2 if balance else 10, 2],
                      "test": [4 if balance else 20, 4]}  # fmt: skip
    assert len({text for part in parts.values() for _, text in part}) == (40 if balance else 120)
    assert parts == labelled.split(examples, seed=3, balance=balance) != labelled.split(examples, 4, balance)


def test_naive_bayes_by_hand():
    train = [("a", "x x y"), ("b", "y z")]
    # log P(a) + log P(x|a) = log 1/2 + log 3/6; for b: log 1/2 + log 1/5. z: 1/6 against 2/5. w is unknown.
    assert labelled.naive_bayes(train, ["x", "z w", "X z", "y z z x"]) == ["a", "b", "a", "b"]
    assert math.log(3 / 6 * 1 / 6) > math.log(1 / 5 * 2 / 5), "x z"


def test_figures_by_hand():
    found = labelled.figures(["a", "b"], list("aaab"), list("aabb"))
    assert found["confusion"] == [[2, 1], [0, 1]]
    assert (found["accuracy"], found["precision"], found["recall"]) == (0.75, {"a": 1, "b": 0.5}, {"a": 2 / 3, "b": 1})


# ---- The classifier ----


def golden_classifier(golden):
    head = {"w": np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32)}
    return classify.Classifier(
        golden["encoder"], golden["hparams"], golden["params"] | {"cls_head": head}, list("abc"), 1
    )


@pytest.mark.parametrize("backend", backends.NAMES)
def test_logits_do_not_depend_on_what_a_text_is_batched_with(golden, backend):
    """They are those of the text alone, from gpt2.py's layers: the product of its last vector and the head."""
    classifier, library = golden_classifier(golden), backends.get(backend)
    rows = [[(7 * i + j) % 512 for j in range(1 + 5 * i)] for i in range(18)]
    found = classify.predict(library, classifier, rows)
    alone = np.concatenate([classify.predict(library, classifier, [row]) for row in rows[::5]])
    assert np.abs(found[::5] - alone).max() <= 1e-5
    for logits, ids in zip(found, rows, strict=True):
        x = gpt2.embed(ids, golden["params"]["wte"], golden["params"]["wpe"])
        for block in golden["params"]["blocks"]:
            x = gpt2.transformer_block(x, **block, n_head=golden["hparams"]["n_head"])
        expected = gpt2.layer_norm(x, **golden["params"]["ln_f"])[-1] @ classifier.params["cls_head"]["w"]
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_the_loss_counts_each_text_once_whatever_fills_the_batch(golden):
    classifier, rows, labels = golden_classifier(golden), [[1, 2, 3], [4], [5, 6]], [0, 2, 1]
    loss_of = classify.make_loss(backends.get("numpy"), hidden_of(golden["hparams"]), 0.0, 1.0)
    batch = classify.batch(rows, labels, [0, 1, 2, -1], 96)
    found = loss_of(classifier.params, batch, np.zeros((4, 1), np.uint32))
    logits = classify.predict(backends.get("numpy"), classifier, rows)
    expected = -np.mean([np.log(gpt2.softmax(row)[label]) for row, label in zip(logits, labels, strict=True)])
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", tuning.METHODS)
def test_from_a_table_to_a_classifier(method, run, tsv, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--train", method, "--n_epochs", 20 if method == "head" else 3, "--learning_rate", 0.01]
    status, out, err = run("classify", tsv, *flags, *["--rank", 2][: 2 * (method == "lora")])
    assert status == 0, err
    assert "train: 56 texts: 28 ham (50%), 28 spam (50%)" in err
    assert "parameters are trained" in err
    assert "naive Bayes" in out
    assert (tmp_path / "made" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "made" / "result.json").read_text())
    assert found["accuracy"] >= 0.7
    assert sum(map(sum, found["confusion"])) == 16
    status, out, _ = run("predict", tmp_path / "made", "call now win cash", "--json")
    answer = json.loads(out)
    assert status == 0
    assert answer["label"] == "spam" == max(answer["probabilities"], key=answer["probabilities"].get)
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    base, classifier = utils.load_folder(GOLDEN)[2], classify.load(tmp_path / "made")
    kept = [k for k, x in named_leaves(base).items() if np.array_equal(x, named_leaves(classifier.params)[k])]
    n_kept = {"all": 0, "last_block": 2 + 2 * 12}.get(method, 4 + 3 * 12)
    assert len(kept) == n_kept, "bit for bit, what is frozen"
    if method == "lora":
        assert classifier.params["blocks"][0]["attn"]["c_attn"]["lora_a"].shape == (48, 2)


def test_a_llama_is_a_classifier_too_on_both_backends(run, tsv, llama_folder, tmp_path):
    oracle("jax")
    losses = {}
    for backend in backends.NAMES:
        flags = ["--train", "lora", "--n_epochs", 1, "--model_size", llama_folder]
        status, _, err = run("classify", tsv, *flags, backend=backend, out=backend)
        assert status == 0, err
        losses[backend] = float(err.partition("loss ")[2].split()[0])
        assert run("predict", tmp_path / backend, "win")[0] == 0
    assert losses["numpy"] == pytest.approx(losses["jax"], abs=2e-4)


def test_train_only_trains_the_output_layer_too(run, tsv, tmp_path):
    status, _, err = run("classify", tsv, "--train_only", r"blocks.[1-2].ln_1|ln_f", "--n_epochs", 1)
    assert status == 0
    assert f"{4 * 48 + 2 * 48 + 2 * 48:,} of " in err
    base, made = (named_leaves(p) for p in (utils.load_folder(GOLDEN)[2], classify.load(tmp_path / "made").params))
    changed = {k for k in base if not np.array_equal(base[k], made[k])}
    assert changed == {f"{k}.{part}" for k in ("blocks.1.ln_1", "blocks.2.ln_1", "ln_f") for part in "gb"}


def test_the_best_epoch_is_saved_and_the_frozen_stay_out_of_the_state(golden):
    library, saved = backends.get("numpy"), []
    s = SimpleNamespace(batch_size=2, seed=0, weight_decay=0.0, n_epochs=4, learning_rate=0.1)
    scores = iter([1, 3, 2, 3])

    def loss_of(trainable, rows, keys, frozen):
        return ((trainable["w"] * frozen["x"]) ** 2).sum() + 0 * rows["ids"].sum()

    best = tuning.tune(
        library, loss_of, {"w": np.ones(3, np.float32)}, [{"x": np.arange(3, dtype=np.float32)}],
        lambda epoch: [{"ids": np.zeros((2, 1), np.float32)}], s, lambda params: {"score": next(scores)},
        lambda trained, found: saved.append((trained, found["epoch"])),
    )  # fmt: skip
    assert best["epoch"] == 2
    assert [epoch for _, epoch in saved] == [1, 2]
    assert saved[0][0].keys() == {"w"}
    assert saved[0][0]["w"][0] == 1 > saved[0][0]["w"][1], "the gradient of the first one is 0"


def test_files_of_texts(run, tsv, tmp_path):
    run("classify", tsv, "--train", "head", "--n_epochs", 1)
    (tmp_path / "lines.txt").write_text("win now\nlove dinner\n" + "you " * 500, encoding="utf-8")
    status, out, err = run("predict", tmp_path / "made", "--file", tmp_path / "lines.txt")
    assert (status, out.count("\n")) == (0, 3)
    assert "1 text is longer than 96 tokens: only the last 96 are used" in err
    assert all(line.split("\t")[0] in ("ham", "spam") for line in out.splitlines())
    status, out, err = run("predict", tmp_path / "made", "--file", tsv)
    assert (status, out.count("\n")) == (0, 80)
    assert "accuracy" in err


def mistakes(tmp_path):
    """(what is wrong, the command, a part of the message)."""
    files = {
        "one.tsv": "ham\ta\n" * 5, "columns.tsv": "ham\ta\nham\n", "header.tsv": "label\tbody\nham\ta\n",
        "empty.tsv": "ham\ta\nspam\t \n", "nothing.tsv": "\n", "rare.tsv": "ham\ta\n" * 9 + "spam\tb\n",
        "new.tsv": "ham\ta\negg\tb\n", "gap.txt": "a\n\nb\n", "keys.json": '[{"question": "a", "answer": "b"}, {}]',
        "list.json": "{}", "no.json": "[", "blank.json": '[{"instruction": "a", "output": " "}, 1]',
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    yield "one.tsv", ["classify"], "all texts have the label 'ham'"
    yield "columns.tsv", ["classify"], "line 2: 1 columns, not 2: label, text"
    yield "header.tsv", ["classify"], "the columns label and text are needed, there are label, body"
    yield "empty.tsv", ["classify"], "line 2: an empty text"
    yield "nothing.tsv", ["classify"], "no texts"
    yield "rare.tsv", ["classify"], "the label 'spam' has 1 texts"
    yield "missing.tsv", ["classify"], "no file"
    yield "keys.json", ["instruct"], "entry 1: the keys instruction, output and perhaps input are needed, not answer"
    yield "list.json", ["instruct"], "a JSON list of at least two objects is needed"
    yield "blank.json", ["instruct"], "entry 1: output must be a text with words in it"


def test_mistakes_in_files_get_one_line(run, tmp_path):
    for file, words, message in mistakes(tmp_path):
        status, out, err = run(*words, tmp_path / file)
        lines = err.removeprefix(f"{backends.get('numpy').setup()}\n")
        assert (status, out, lines.count("\n")) == (2, "", 1), (file, err)
        assert message in lines
    assert run("instruct", tmp_path / "no.json")[0] == 1
    assert not (tmp_path / "made").exists()


def test_mistakes_at_prediction_get_one_line(run, tsv, tmp_path):
    list(mistakes(tmp_path))
    run("classify", tsv, "--train", "head", "--n_epochs", 1)
    made = tmp_path / "made"
    for words, message in (
        ([made, "--file", tmp_path / "new.tsv"], "'egg' is no label of this classifier: it has ham, spam"),
        ([made, " "], "an empty text has no label"),
        ([made, "--file", tmp_path / "gap.txt"], "line 2: an empty text has no label"),
        ([GOLDEN, "a"], "has no classifier.safetensors"),
        ([made], "name a classifier, and either a text or a --file"),
    ):
        status, out, err = run("predict", *words)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert message in err
    file = made / classify.FILE
    file.write_bytes(file.read_bytes()[:-3])
    assert run("predict", made, "a")[0] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train", "most"], "--train 'most': choose head, last_block, all, lora, adapters"),
        (["--n_epochs", "0"], "--n_epochs 0"),
        (["--train", "lora", "--lora", "c_atn"], "matches no linear layer: this model has attn.c_attn, attn.c_proj"),
        (["--train_only", "blokcs"], "matches no parameter"),
        (["--train_only", "ln_f", "--train", "head"], "--train_only and --train"),
        (["--rank", "4"], "--rank has no effect without --train lora"),
        (["--dropout", "1"], "--dropout 1.0 is out of range"),
        (["--learning_rate", "0"], "--learning_rate 0.0 is out of range"),
        (["--seed", str(2**32)], "--seed"),
    ],
)
def test_flags_out_of_range(run, tsv, flags, message):
    status, _, err = run("classify", tsv, *flags)
    assert status == 2
    assert message in err.splitlines()[-1]


def test_a_folder_that_is_there_is_not_overwritten(run, tsv, tmp_path):
    (tmp_path / "made").mkdir()
    status, _, err = run("classify", tsv)
    assert (status, err.count("\n")) == (2, 1)
    assert "is there already" in err


# ---- Instructions ----

EXAMPLES = [
    {"instruction": "Say cat.", "input": "", "output": "cat"},
    {"instruction": "Say it in other words.", "input": "a ball", "output": "a round thing"},
    {"instruction": "Name two colours.", "input": "", "output": "red and blue\nor green"},
]


def test_the_loss_is_that_of_the_answers_alone(golden):
    """By hand, on three examples: -log P of each token of the answer and of <|endoftext|> after it, and their mean."""
    encoder, params, n_head = golden["encoder"], golden["params"], golden["hparams"]["n_head"]
    expected, rows = [], []
    for example in EXAMPLES:
        message = example["instruction"] + ("\n\n" + example["input"] if example["input"] else "")
        start = encoder.encode(f"### Instruction:\n{message}\n\n### Response:\n")
        answer = [*encoder.encode(example["output"]), encoder.end_of_text]
        for i, token in enumerate(answer):
            logits = gpt2.gpt2(start + answer[:i], **params, n_head=n_head)[-1]
            expected.append(-math.log(gpt2.softmax(logits.astype(np.float64))[token]))
        rows.append(instruct.tokenize(encoder, example, 96)[:2])
    library, forward = backends.get("numpy"), forward_of(golden["hparams"])
    found = instruct.mean_loss(library, params, rows, forward, 96)
    assert found == pytest.approx(np.mean(expected), rel=1e-5)
    loss_of = instruct.make_loss(library, forward, 0.0, 1.0)
    batch = instruct.batch(rows, [0, 1, 2, -1], 96)
    assert loss_of(params, batch, np.zeros((4, 1), np.uint32)) == pytest.approx(np.mean(expected), rel=1e-5)
    ids, weights = rows[1]
    changed = [(ids[:i] + [9] + ids[i + 1 :], weights) for i in range(1, weights.index(1))]
    assert len({instruct.batch([row], [0], 96)["weights"].sum() for row in changed}) == 1
    assert sum(weights) == len(encoder.encode("a round thing")) + 1


def test_a_long_example_loses_its_beginning(golden):
    example = {"instruction": "word " * 200, "output": "the end"}
    ids, weights, is_cut = instruct.tokenize(golden["encoder"], example, 96)
    whole = golden["encoder"].encode(instruct.prompt(example))
    answer = [*golden["encoder"].encode("the end"), golden["encoder"].end_of_text]
    assert is_cut
    assert (len(ids), len(weights), sum(weights)) == (97, 96, len(answer))
    assert ids == (whole + answer)[-97:]


@pytest.mark.parametrize("method", ["all", "lora"])
def test_from_instructions_to_a_model_that_answers(method, run, command, tmp_path):
    words = ["cat", "dog", "ball", "red", "blue", "tree"]
    examples = [
        {"instruction": f"Say {word}.", "input": "now" * (i % 2), "output": word} for i, word in enumerate(words * 4)
    ]
    (tmp_path / "tasks.json").write_text(json.dumps(examples), encoding="utf-8")
    flags = ["--train", method, "--n_epochs", 4, "--learning_rate", 0.01, "--json"]
    status, out, err = run("instruct", tmp_path / "tasks.json", *flags)
    assert status == 0, err
    found, made = json.loads(out), tmp_path / "made"
    assert found["after"] < found["before"] - 0.5
    report = (made / "report.md").read_text()
    assert report.count("**Before:**") == report.count("**After:**") == report.count("**Expected:**") == 2
    encoder, hparams, params = utils.load_folder(made)
    assert utils.read_ending(made, encoder, hparams) == ((encoder.end_of_text,), True)
    held_out = instruct.split(instruct.read_examples(tmp_path / "tasks.json"), 0)[1]
    rows = [instruct.tokenize(encoder, example, 96)[:2] for example in held_out]
    after = instruct.mean_loss(backends.get("numpy"), params, rows, forward_of(hparams), 96)
    assert after == pytest.approx(found["after"], abs=1e-4), "what was saved is what was measured"
    if method == "lora":
        merged = lora.merge_folder(utils.load_folder(GOLDEN)[2], made / "adapter")
        for name, leaf in named_leaves(params).items():
            np.testing.assert_allclose(leaf, named_leaves(merged)[name], atol=1e-6)
    else:
        assert not (made / "adapter").exists()


def test_chat_renders_the_prompt_of_training(golden, tmp_path):
    pytest.importorskip("jinja2")
    from inference import chat

    (tmp_path / "chat_template.jinja").write_text(instruct.CHAT_TEMPLATE, encoding="utf-8")
    template = chat.load_template(tmp_path)
    for example in [*EXAMPLES, {"instruction": " Odd <|endoftext|>\n\n### Response:", "output": "x"}]:
        content = "\n\n".join(part for part in (example["instruction"], example.get("input")) if part)
        ids = template.encode(golden["encoder"], [{"role": "user", "content": content}])
        assert ids == golden["encoder"].encode(instruct.prompt(example))


def test_reading_csv_as_python_writes_it(tmp_path):
    rows = [("a", 'He said "no", twice'), ("b", "two\nlines"), ("a", "é; ,")]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    assert labelled.read_table(tmp_path / "a.csv") == rows
