"""Instruction tuning: a model that continues texts learns to answer, from examples of instructions and answers.

    {"instruction": "Translate into French.", "input": "A red ball.", "output": "Une balle rouge."}

A language model only continues texts. So an example becomes a text that always has the same form, the prompt template,
and the model learns to continue it with the answer and the token that ends it:

    ### Instruction:
    Translate into French.

    A red ball.

    ### Response:
    Une balle rouge.<|endoftext|>

The loss counts the tokens of the answer and its end only (Wei et al. 2021, "Finetuned Language Models Are Zero-Shot
Learners"; the form is close to that of Stanford's Alpaca, 2023). The model need not learn to write instructions, and
without its end it would not know where to stop.

The template is saved with the model, as a Jinja template that `--chat` and transformers fill in: CHAT_TEMPLATE.
"""

import functools
import json
from pathlib import Path

import numpy as np

import utils
from backends import np as xp
from inference.batching import generate_batch
from inference.generate import Sequence
from inference.model import make_model
from training import lora, saves, tuning
from training.loss import token_losses
from training.model import dropout, forward_of, no_dropout
from training.step import join
from weights import peft
from weights.files import check_regular, new_folder, read_text, write_text
from weights.params import from_names, named_leaves

CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + '<|endoftext|>' }}
{%- else %}{{ message['content'] + '\\n\\n' }}
{%- endif %}
{%- endfor %}"""
N_ANSWER, N_SHOWN = 60, 8  # tokens of an answer, and examples, in the report


def prompt(example):
    """The text up to where the answer begins: what CHAT_TEMPLATE makes of one message, the instruction with its input
    below it."""
    message = "\n\n".join(part for part in (example["instruction"], example.get("input", "")) if part)
    return f"### Instruction:\n{message}\n\n### Response:\n"


def read_examples(path):
    """The examples in a JSON file, a list of objects. Raises ValueError naming the entry whose keys or values are
    others, OSError for a file that cannot be read or is no JSON."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no file {str(path)!r:.80}: name a JSON file with a list of instructions")
    check_regular(path)
    try:
        examples = json.loads(read_text(path).removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path}: not JSON ({error})") from None
    if not isinstance(examples, list) or len(examples) < 2:
        raise ValueError(f"{path}: a JSON list of at least two objects is needed")
    for i, example in enumerate(examples, 1):
        check_example(f"{path}, entry {i}", example)
    return [{name: text.strip() for name, text in example.items()} for example in examples]


def check_example(place, example):
    """Raises ValueError unless an example has an instruction and an output, and perhaps an input, which are texts."""
    keys = set(example) if isinstance(example, dict) else set()
    if not {"instruction", "output"} <= keys or keys - {"instruction", "input", "output"}:
        names = ", ".join(sorted(keys)) or "none"
        raise ValueError(f"{place}: the keys instruction, output and perhaps input are needed, not {names:.100}")
    for name, text in example.items():
        if not isinstance(text, str) or (name != "input" and not text.strip()):
            raise ValueError(f"{place}: {name} must be a text{' with words in it' if isinstance(text, str) else ''}")


def tokenize(encoder, example, n_ctx):
    """(ids, weights, whether they were cut) of an example. weights[i] is 1 if the prediction of ids[i + 1] counts, that
    is, if it belongs to the answer or its end, else 0. More than n_ctx + 1 ids lose their beginning."""
    start, answer = encoder.encode(prompt(example)), [*encoder.encode(example["output"]), encoder.end_of_text]
    ids = start + answer
    weights = [0] * (len(start) - 1) + [1] * len(answer)
    return ids[-n_ctx - 1 :], weights[-n_ctx:], len(ids) > n_ctx + 1


# ---- The loss ----


def row_loss(params, row, forward, scale=1.0, drop=no_dropout):
    """The sum of the losses of a text's predictions, each times its weight. row has "ids" [n_seq + 1] and "weights"
    [n_seq]; forward is that of training.model.forward_of."""
    logits = forward(lora.apply(params, scale), row["ids"][:-1], drop=drop)
    return xp.sum(row["weights"] * token_losses(logits, row["ids"][1:]))


def make_loss(library, forward, dropout_rate, scale):
    """The function that training differentiates: (trainable, rows, keys, *frozen) -> the mean loss of the rows."""

    def dropped(params, row, key):
        return row_loss(params, row, forward, scale, dropout(dropout_rate, key))

    def loss(trainable, rows, keys, *frozen):
        params = join(trainable, *frozen)
        return xp.mean(library.vmap(dropped, in_axes=(None, 0, 0))(params, rows, keys))

    return loss


def batch(rows, order, n_ctx):
    """The batch of the examples whose numbers are in `order`; -1 fills it. The weights of each text are scaled so that
    the mean over the rows is the mean over all tokens that count."""
    chosen = [rows[max(i, 0)] for i in order]
    n = tuning.bucket(max(len(weights) for _, weights in chosen), n_ctx)
    weights = tuning.pad([row[1] for row in chosen], n) * np.array([[i >= 0] for i in order], np.float32)
    return {
        "ids": tuning.pad([row[0] for row in chosen], n + 1),
        "weights": weights * np.float32(len(order) / weights.sum()),
    }


def mean_loss(library, params, rows, forward, n_ctx, scale=1.0, batch_size=16):
    """The mean loss over all tokens of the answers, a float."""
    compute = library.jit(library.vmap(functools.partial(row_loss, forward=forward, scale=scale), in_axes=(None, 0)))
    order, total, n_tokens = sorted(range(len(rows)), key=lambda i: len(rows[i][0])), 0.0, 0
    for group in tuning.groups(order, batch_size):
        n = sum(sum(rows[i][1]) for i in group if i >= 0)
        total += n * float(library.to_numpy(compute(params, batch(rows, group, n_ctx))).mean(dtype=np.float64))
        n_tokens += n
    return total / n_tokens


def split(examples, seed, share=0.1):
    """(training, held out): two lists, at random by the seed."""
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    n_held_out = max(1, round(len(examples) * share))
    return [examples[i] for i in sorted(order[n_held_out:])], [examples[i] for i in sorted(order[:n_held_out])]


# ---- Training ----


def train(library, hparams, params, scale, rows, held_out, s, save):
    """Trains by the settings s; rows and held_out are lists of (ids, weights). Calls save(trained leaves, evaluation)
    for the best so far. Returns (the held-out loss before, the best evaluation)."""
    forward, n_ctx = forward_of(hparams), hparams["n_ctx"]
    trainable, frozen = tuning.choose(library, params, s)

    def evaluate(params):
        loss = mean_loss(library, params, held_out, forward, n_ctx, scale)
        return {"held_out": loss, "score": -loss}

    def batches(epoch):
        order = tuning.shuffled([len(ids) for ids, _ in rows], s.batch_size, s.seed, epoch)
        return [batch(rows, group, n_ctx) for group in order]

    before = evaluate(library.asarray(params))["held_out"]
    loss_of = make_loss(library, forward, s.dropout, scale)
    return before, tuning.tune(library, loss_of, trainable, frozen, batches, s, evaluate, save)


# ---- Files ----


def save(out, source, encoder, hparams, base, trained, scale, s, epoch):
    """Writes the model, with LoRA merged, its tokenizer, its end token and its template; LoRA alone in out/adapter. All
    files of a folder that is there already are replaced, each in one go."""
    params = lora.merge(from_names(named_leaves(base) | trained), scale)
    ending = utils.Ending((encoder.end_of_text,), True)
    if not out.exists():
        with new_folder(out) as part:
            utils.save_tokenizer(source, part)
            write_text(part / "chat_template.jinja", CHAT_TEMPLATE)
            write_files(part, source, hparams, base, params, trained, s, epoch, ending)
    else:
        write_files(out, source, hparams, base, params, trained, s, epoch, ending)


def write_files(out, source, hparams, base, params, trained, s, epoch, ending):
    saves.save_best(out, epoch, hparams, params, ending)
    if s.train == "lora":
        (out / "adapter").mkdir(exist_ok=True)
        peft.save_lora(out / "adapter", trained, s.alpha, source, base)


def answers(params, hparams, encoder, library, examples):
    """The greedy answer to each example."""
    model = make_model(params, hparams, library)
    n_new, end_ids, sequences = min(N_ANSWER, hparams["n_ctx"] // 2), (encoder.end_of_text,), []
    for example in examples:
        ids = encoder.encode(prompt(example))[n_new - hparams["n_ctx"] :]
        sequences.append(Sequence(encoder, ids, n_new, end_ids=end_ids))
    generate_batch(model, sequences)
    return [sequence.text.strip() for sequence in sequences]


def report(examples, before, after, losses):
    """The lines of report.md: the held-out losses, and answers before and after."""
    change = losses[1] / losses[0] - 1
    yield "# Answers to instructions that were not trained on\n"
    yield f"Loss per token of the answers: {losses[0]:.4f} before, {losses[1]:.4f} after ({change:+.1%}).\n"
    for example, old, new in zip(examples, before, after, strict=True):
        yield f"## {' '.join(example['instruction'].split())}\n"
        texts = {"Input": example.get("input"), "Before": old or "(nothing)", "After": new or "(nothing)"}
        for name, text in (texts | {"Expected": example["output"]}).items():
            if text:
                yield f"**{name}:**\n\n" + "\n".join(f"> {line}" for line in text.splitlines()) + "\n"
