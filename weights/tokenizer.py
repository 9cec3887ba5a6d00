"""The files of a byte-level BPE tokenizer, in the four layouts in which models have them:

encoder.json and vocab.bpe     OpenAI's: {spelling: id}, and the merges, one a line, best first
vocab.json and merges.txt      Hugging Face's older one: the same two; further tokens are in added_tokens.json
tokenizer.json                 Hugging Face's newer one: both in one file, and how a text is split
model.gguf                     llama.cpp's: lists of tokens, of their types and of merges, beside the weights

A tokenizer.json of another kind than GPT-2's is for library_tokenizer.py.
"""

import functools
import itertools
import json
import re
from typing import NamedTuple

from weights.files import read_json, read_text

END_OF_TEXT = "<|endoftext|>"  # stands between the documents of the training text; the one special token of GPT-2

# What a tokenizer.json must say, or leave out (None), for encoder.py to split and merge as it does.
SUPPORTED = {
    "normalizer": (None,),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (True, None),
    "model.type": ("BPE", None),
    "model.dropout": (None, 0),
    "model.continuing_subword_prefix": (None, ""),
    "model.end_of_word_suffix": (None, ""),
    "model.byte_fallback": (None, False),
    "model.ignore_merges": (None, False),
}

EACH_DIGIT = {"type": "Digits", "individual_digits": True}  # before GPT-2's pattern

NO_OTHER = "no other kind of tokenizer is supported; choose a model that has GPT-2's"
NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens in a GGUF file
GGUF_SPLITTINGS = ("gpt-2", "smollm")  # tokenizer.ggml.pre: see encoder.SPLITTINGS


class Files(NamedTuple):
    """What the files of a tokenizer say."""

    file: object  # the main one, for messages
    ids: dict  # {spelling: id}
    merges: list  # of pairs of spellings
    added: dict  # {text: id} of the tokens that are special
    splitting: str = "gpt-2"  # the key of one of encoder.SPLITTINGS


class OtherKind(OSError):
    """A tokenizer.json that is not of GPT-2's kind. `path` is the file."""

    def __init__(self, path, difference):
        super().__init__(f"{path}: {difference}")
        self.path = path


# ---- Reading ----


def read_tokenizer(folder):
    """The Files of the tokenizer of a model folder or of a .gguf file. Raises OSError naming the file that is
    missing or damaged; OtherKind for a tokenizer.json that encoder.py would not follow."""
    added, splitting = {}, "gpt-2"
    if folder.suffix == ".gguf" and folder.is_file():
        return read_gguf_tokenizer(folder)
    if (file := folder / "tokenizer.json").exists():
        ids, merges, added, splitting = read_tokenizer_json(file)
    elif (file := folder / "vocab.json").exists():
        merges, ids = read_merges(folder / "merges.txt"), read_json(file)
        if (added_file := folder / "added_tokens.json").exists():
            added = read_json(added_file)
    else:
        file = folder / "encoder.json"
        merges, ids = read_merges(folder / "vocab.bpe"), read_json(file)
    if file.name != "encoder.json" and (config := folder / "tokenizer_config.json").exists():
        for name in {"add_prefix_space", "add_bos_token"} & {key for key, value in read_json(config).items() if value}:
            if name == "add_bos_token" and file.name == "tokenizer.json":
                raise OtherKind(file, f"{name} is on in tokenizer_config.json")
            raise OSError(f"{config}: {name} is on, which GPT-2's tokenizer does not do: {NO_OTHER}")
    return Files(file, ids, merges, added, splitting)


def read_gguf_tokenizer(path):
    """The Files of the tokenizer in a GGUF file. Raises OSError as above."""
    from weights.gguf import read_header  # here, as only these files need it

    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in read_header(path).fields.items()}
    kind, splitting = fields.get("model"), fields.get("pre")
    if kind != "gpt2" or splitting not in GGUF_SPLITTINGS or fields.get("add_bos_token"):
        raise OSError(
            f"{path}: its tokenizer is {kind!r:.40}, {splitting!r:.40}; of GGUF files only 'gpt2' with "
            f"{' or '.join(GGUF_SPLITTINGS)} is read, without a token before each text: load the Hugging Face folder"
        )
    tokens, kinds, merges = (fields.get(name) for name in ("tokens", "token_type", "merges"))
    sound = isinstance(kinds, list) and set(map(type, [*(tokens or [0]), *(merges or [])])) == {str}
    if not sound or len(tokens) != len(kinds) or len(set(tokens)) != len(tokens):
        raise OSError(f"{path}: damaged: its lists of tokens, their types and merges do not match")
    if odd := [
        (token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind not in (NORMAL, CONTROL, UNUSED)
    ]:
        raise OSError(f"{path}: the token {odd[0][0]!r:.40} is of the type {odd[0][1]!r:.20}, which is not read here")
    merges = [tuple(merge.split(" ")) for merge in merges]
    require_pairs(path, merges)
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] == NORMAL}
    return Files(path, ids, merges, {token: i for i, token in enumerate(tokens) if kinds[i] == CONTROL}, splitting)


def read_merges(path):
    """The pairs of spellings in a vocab.bpe. Raises OSError for a line that is no pair."""
    lines = read_text(path, is_small=True).splitlines()
    if lines and lines[0].startswith("#version"):  # elsewhere a line that begins with # is a merge like others
        lines = lines[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    require_pairs(path, merges)
    return merges


def read_tokenizer_json(path):
    """({spelling: id}, [pair of spellings], {text: id} of the added tokens, splitting) of a tokenizer.json. Raises
    OtherKind if encoder.py would encode a text differently, OSError if it is damaged."""
    found, splitting = read_json(path), "gpt-2"
    pre_tokenizers = look_up(found, "pre_tokenizer.pretokenizers")
    if isinstance(pre_tokenizers, list) and len(pre_tokenizers) == 2 and pre_tokenizers[0] == EACH_DIGIT:
        found["pre_tokenizer"], splitting = pre_tokenizers[1], "smollm"
    for name, supported in SUPPORTED.items():
        if (value := look_up(found, name)) not in supported:
            raise OtherKind(path, f"{name} is {value!r:.60}, GPT-2's is {supported[0]!r}")
    try:
        ids, added = dict(found["model"]["vocab"]), found.get("added_tokens") or []
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in found["model"]["merges"]]
        require_pairs(path, merges)
        "".join(itertools.chain.from_iterable(merges))  # a TypeError if one is no text
        in_text = [token["content"] for token in added if not token["special"]]
        added = {"".join(token["content"]): token["id"] for token in added}
        surrounds = adds_tokens(found.get("post_processor"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OSError(f"{path}: no tokenizer, or a damaged one ({type(error).__name__}: {error})") from None
    if in_text:
        raise OtherKind(path, f"the added token {in_text[0]!r:.40} is no special token but part of texts")
    if surrounds:
        raise OtherKind(path, "post_processor adds tokens to each text")
    return ids, merges, added, splitting


def look_up(tree, name):
    """The value of "a.b" in nested dicts, or None."""
    return functools.reduce(lambda part, key: part.get(key) if isinstance(part, dict) else None, name.split("."), tree)


def adds_tokens(post_processor):
    """Whether the post_processor of a tokenizer.json adds tokens before or after the text."""
    if post_processor is None or post_processor["type"] == "ByteLevel":
        return False
    if post_processor["type"] == "Sequence":
        return any(map(adds_tokens, post_processor["processors"]))
    return post_processor["type"] != "TemplateProcessing" or any("Sequence" not in p for p in post_processor["single"])


def require_pairs(path, merges):
    """Raises OSError unless each merge is a tuple of two."""
    if set(map(len, merges)) - {2}:
        odd = next(pair for pair in merges if len(pair) != 2)
        raise OSError(f"{path}: the merge {' '.join(map(str, odd))!r:.40} is not two symbols with a space between them")


def check_vocabulary(file, ids, merges, symbols):
    """Raises OSError naming the file unless the ids are whole numbers, each of one token; all `symbols` have one; each
    merge leads to a token; and each other token comes from a merge or is a special one.

    The last rule notices a list of merges that was cut short. A special token is known by its brackets, as in <|pad|>
    and [PAD].
    """
    numbers = sorted(set(ids.values())) if set(map(type, ids.values())) <= {int} else []
    if len(numbers) < len(ids) or (numbers and not 0 <= numbers[0] <= numbers[-1] < 2**24):
        raise OSError(f"{file}: its ids must be whole numbers from 0 to {2**24 - 1}, each that of one token")
    if missing := symbols - ids.keys():
        raise OSError(f"{file}: {min(missing)!r} has no id; each of the 256 bytes must be a token")
    merged = set(map("".join, merges))
    if not merged <= ids.keys():
        odd = merged - ids.keys()
        raise OSError(f"{file}: merges lead to {min(odd)!r:.40}, which has no id: is it of another tokenizer?")
    n_special = len(ids) - len(merged) - len(symbols - merged)
    if n_special == (END_OF_TEXT in ids and END_OF_TEXT not in merged and END_OF_TEXT not in symbols):
        return  # none, or <|endoftext|> alone, as in every GPT-2: the slower search below is not needed
    special = ids.keys() - merged - symbols
    if odd := set("".join(special)) - symbols:
        raise OSError(f"{file}: {min(odd)!r} in a token is none of the characters that stand for bytes")
    if lost := {token for token in special if token[:1] + token[-1:] not in ("<>", "[]")}:
        others = f" and {len(lost) - 1} others" * (len(lost) > 1)
        raise OSError(
            f"{file}: no merge leads to {min(lost)!r:.40}{others}: the merges were cut short, or do not match"
        )


# ---- Special tokens in a text ----


def split_special(text, allowed, special):
    """A text -> its parts: ordinary texts and, as ids, the special tokens among `allowed` (a text or several), whose
    ids are in `special`. Where two would match, the longer one does. Raises ValueError for what is none.

    split_special("Hi<|endoftext|>Bye", "<|endoftext|>", {"<|endoftext|>": 50256})  ->  ["Hi", 50256, "Bye"]
    """
    allowed = {allowed} if isinstance(allowed, str) else set(allowed)
    if unknown := allowed - special.keys():
        raise ValueError(f"{unknown.pop()!r} is no special token of this encoder")
    if not allowed:
        return [text]
    pattern = "|".join(map(re.escape, sorted(allowed, key=len, reverse=True)))
    return [special[part] if i % 2 else part for i, part in enumerate(re.split(f"({pattern})", text))]


# ---- Writing ----


def tokenizer_texts(ids, merges):
    """The contents of an encoder.json and a vocab.bpe."""
    return json.dumps(ids, ensure_ascii=False), "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n"


def tokenizer_json(ids, merges, special):
    """The contents of a tokenizer.json that splits texts as SmolLM2 does: ids {spelling: id}, special {text: id}."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    model |= {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    contents = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None}
    contents["added_tokens"] = [{"id": i, "content": text} | flags for text, i in special.items()]
    contents["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [EACH_DIGIT, level]}
    contents |= {"post_processor": level, "decoder": level}
    contents["model"] = model | {"vocab": ids, "merges": [list(pair) for pair in merges]}
    return json.dumps(contents, ensure_ascii=False)
