"""Asking a chat model: messages become the ids of a prompt, and the model's answer is the next message.

    template = load_template(path)
    ids = template.encode(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])

A chat model was trained on texts of a certain form, with special tokens around each message. The form is a program in
the language Jinja, the chat template, which comes with the model. SmolLM2's makes this of the question:

    <|im_start|>user
    What is the capital of France?<|im_end|>
    <|im_start|>assistant

The model continues with the answer and ends it with <|im_end|>. A template from a stranger's file is a stranger's
program, so it runs in Jinja's sandbox. It is rendered as transformers does it, whose users write the templates.

A special token in a message's text must stay text. Otherwise a user could end the own message and write one of the
system's. So a mark is put into each such text before the template is rendered, and is removed again when the special
tokens, which are then all the template's own, have been found.
"""

import datetime
import json
import re
import sys
from typing import Any, NamedTuple

import cli
from backends import update
from encoder import replace_lone_surrogates
from inference.model import init_cache, n_positions, step
from weights.files import read_json, read_text, write_text
from weights.gguf import read_header
from weights.params import tree_map
from weights.tokenizer import END_OF_TEXT, split_special

MIN_JINJA = (3, 1, 6)  # earlier sandboxes can be escaped from


class Template(NamedTuple):
    """A compiled chat template: where it is from, Jinja's object, and the texts of the special tokens that it may use,
    such as bos_token."""

    path: Any
    program: Any
    names: dict

    def encode(self, tokenizer, messages):
        """The ids of [{"role": ..., "content": ...}, ...] and of the beginning of an answer. Raises OSError if the
        template fails."""
        return tokenizer.encode_parts(self.parts(tokenizer.special, messages))

    def parts(self, special, messages):
        """What `encode` encodes: texts and the ids of special tokens, in turn, with a text at both ends."""
        contents = [message["content"] for message in messages]
        mark = next(chr(i) for i in range(0xF0000, 0x110000) if not any(chr(i) in text for text in contents))
        guarded = [message | {"content": guard(message["content"], special, mark)} for message in messages]
        parts = split_special(self.render(guarded), special, special)
        return [part.replace(mark, "") if isinstance(part, str) else part for part in parts]

    def render(self, messages):
        """The messages as one text, with the beginning of an answer at its end. Raises OSError as above."""
        try:
            return self.program.render(messages=messages, add_generation_prompt=True, **self.names)
        except Exception as error:  # whatever a program may raise
            raise OSError(f"{self.path}: the chat template fails: {cli.one_line(error)}") from None


def guard(text, special, mark):
    """The text with a mark behind the first character of each special token in it, and of each beginning of one at its
    end, which the template might complete."""
    import regex

    text = replace_lone_surrogates(text)
    if not special:
        return text
    pattern, end = regex.compile("|".join(map(regex.escape, special))), len(text.rstrip())
    found = (pattern.match(text, i, end, partial=True) if i < end else None for i in range(len(text)))
    return "".join(character + mark * bool(match) for character, match in zip(text, found, strict=True))


# ---- From files ----


def load_template(path):
    """The Template of a model folder or .gguf file. Raises ValueError if it has none or if jinja2 is missing, OSError
    for what is no template."""
    text, names = read_gguf_template(path) if path.suffix == ".gguf" else read_template(path)
    if text is None:
        raise ValueError(f"{path} has no chat template, so it is no chat model: leave out --chat, or choose smollm2")
    return Template(path, compile_template(path, text), names)


def read_gguf_template(path):
    """(the text of the template or None, {name: text} of special tokens) of a GGUF file."""
    fields, names = read_header(path).fields, {}
    texts = dict(enumerate(fields.get("tokenizer.ggml.tokens") or []))
    for name in ("bos", "eos"):
        if (i := fields.get(f"tokenizer.ggml.{name}_token_id")) in texts:
            names[f"{name}_token"] = texts[i]
    return fields.get("tokenizer.chat_template"), names


def read_template(folder):
    """The same of a model folder: chat_template.jinja, or an entry of tokenizer_config.json."""
    config = folder / "tokenizer_config.json"
    known = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)  # what GPT-2's are, if nothing is said
    config = read_json(config) if config.exists() else known
    text = config.get("chat_template")
    if isinstance(text, list):  # several, with names
        text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
    if (file := folder / "chat_template.jinja").exists():
        text = read_text(file, is_small=True)
    tokens = {name: token for name, token in config.items() if name.endswith("_token")}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return text, {name: token for name, token in tokens.items() if isinstance(token, str)}


def save_template(path, folder):
    """Writes the chat template of a model, if it has one, and its special tokens into a model folder."""
    text, names = read_gguf_template(path) if path.suffix == ".gguf" else read_template(path)
    if text is not None:
        write_text(folder / "chat_template.jinja", text)
        config = folder / "tokenizer_config.json"
        write_text(config, json.dumps((read_json(config) if config.exists() else {}) | names, indent=1) + "\n")


def compile_template(path, text):
    """Jinja's object for a template, in an environment as transformers makes it."""
    try:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise ValueError("--chat needs jinja2: python3 -m pip install jinja2") from None
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < MIN_JINJA:
        raise ValueError(f"jinja2 {jinja2.__version__} is too old: python3 -m pip install --upgrade jinja2")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    try:
        return environment.from_string(text)
    except Exception as error:
        raise OSError(f"{path}: no chat template, or a damaged one: {cli.one_line(error)}") from None


# ---- A conversation ----


class Conversation:
    """Messages to a model and its answers, with one cache: each answer computes only what is new since the last one.

    messages     the conversation so far
    parts, ids   the last prompt and its answer: as Template.parts gives them, and as the model read and wrote them
    cached       the ids whose keys and values are in the cache
    """

    def __init__(self, model, tokenizer, template, system=""):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.beginning = as_messages("", system)
        self.messages, self.parts, self.ids = self.beginning, [""], []
        self.cached, self.cache = [], None

    def prompt(self, message):
        """The ids that ask for an answer to a message. When the context is full, the conversation begins anew, and
        a line on stderr says so. Raises ValueError for a message that is too long even then."""
        n_ctx = self.model.n_ctx
        ids = self.encode([*self.messages, *as_messages(message)])
        if len(ids) >= n_ctx and self.messages != self.beginning:
            print(f"the conversation has filled the context of {n_ctx} tokens: it begins anew", file=sys.stderr)
            self.messages = self.beginning
            ids = self.encode([*self.messages, *as_messages(message)])
        if len(ids) >= n_ctx:
            raise ValueError(f"the message makes a prompt of {len(ids)} tokens, the context has {n_ctx}: shorten it")
        return ids

    def encode(self, messages):
        """Template.encode, but an answer keeps the ids with which the model wrote it: its text may have others, too."""
        parts = self.template.parts(self.tokenizer.special, messages)
        n, before, ids = len(self.parts), self.parts, self.ids
        self.parts, self.ids = parts, None
        if ids and parts[: n - 1] == before[:-1] and parts[n - 1].startswith(before[-1]):
            rest = ["", parts[n - 1].removeprefix(before[-1]), *parts[n:]]  # "": the rest is not the text's beginning
            return ids + self.tokenizer.encode_parts(rest)
        return self.tokenizer.encode_parts(parts)

    def answer(self, message, sequence):
        """Yields the answer piece by piece. `sequence` is a Sequence of self.prompt(message)."""
        same = (a == b for a, b in zip(sequence.ids[:-1], self.cached, strict=False))
        n_same = next((i for i, equal in enumerate(same) if not equal), min(len(self.cached), len(sequence.ids) - 1))
        self.cached, tokens = self.cached[:n_same], sequence.ids[n_same:]
        self.make_room(len(sequence.ids) + sequence.n_tokens_to_generate)
        try:
            while sequence.finish_reason is None:
                logits, self.cache = step(self.model, tokens, self.cache, len(self.cached))
                self.cached += tokens
                yield sequence.accept(self.model.backend.to_numpy(logits))
                tokens = sequence.ids[-1:]
        finally:  # also if the caller wants no more
            self.parts, self.ids = [*self.parts[:-1], self.parts[-1] + sequence.text], sequence.ids
            self.messages = [*self.messages, *as_messages(message), {"role": "assistant", "content": sequence.text}]

    def make_room(self, n_tokens):
        """Gives the cache room for n_tokens; what it holds stays."""
        if self.cache is None or n_positions(self.cache) < n_tokens:
            larger = init_cache(self.model, n_tokens)
            old = self.cache
            self.cache = (
                larger if old is None else tree_map(lambda new, part: update(new, part, (0, 0, 0)), larger, old)
            )


def as_messages(message, system=""):
    """[a system message, a user's message], each left out if it is empty."""
    texts = {"system": system, "user": message}
    return [{"role": role, "content": text} for role, text in texts.items() if text]


def converse(conversation, make_sequence):
    """Reads messages from the terminal, a line each, and prints the answers until stdin ends (Ctrl-D).
    make_sequence(ids) is a Sequence. Ctrl-C stops an answer."""
    print("Ctrl-D ends the conversation, Ctrl-C stops an answer.", file=sys.stderr)
    while message := read_line():
        if not message.strip():
            continue
        try:
            sequence = make_sequence(conversation.prompt(message.strip()))
        except ValueError as error:
            print(cli.one_line(error), file=sys.stderr)
            continue
        with cli.noticing_ctrl_c() as stopped:
            for piece in conversation.answer(message.strip(), sequence):
                print(piece, end="", flush=True)
                if stopped:
                    break
        print(flush=True)
        hint_if_cut(sequence, conversation.model.n_ctx)


def read_line():
    """A line that the user types; "" at the end of stdin. Without the readline library, which would leave the terminal
    in disorder when Ctrl-C ends the program."""
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        print(file=sys.stderr)
    return line


def hint_if_cut(sequence, n_ctx):
    """Says on stderr why an answer ended before its end."""
    if sequence.finish_reason == "length":
        n, full = len(sequence.new_ids), len(sequence.ids) >= n_ctx
        why = f"the context of {n_ctx} tokens is full" if full else "--n_tokens_to_generate allows more"
        print(f"hint: the answer was cut after {n} tokens: {why}", file=sys.stderr)
