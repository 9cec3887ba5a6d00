"""Tokenizers of other kinds than GPT-2's, as a LLaMA's tokenizer.json describes them, by the `tokenizers` library.

The two kinds that LLaMAs have are both byte-pair encodings, as in encoder.py, with other rules for the pieces:

    byte-level      Llama 3: another pattern splits the text; spellings are those of encoder.py
    SentencePiece   Llama 1 and 2: "▁" stands for a space, <0x0A> for a byte that is part of no token

A LibraryTokenizer has the methods and attributes of encoder.Encoder that inference uses.

Sources: Kudo and Richardson 2018, "SentencePiece: A simple and language independent subword tokenizer and detokenizer
for Neural Text Processing", section 3; https://huggingface.co/docs/tokenizers.
"""

import json
import operator
import re

from weights.files import read_json
from weights.tokenizer import END_OF_TEXT, look_up, split_special

A_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"  # U+2581, which SentencePiece writes for a space


class LibraryTokenizer:
    """The tokenizer in the tokenizer.json that the exception `other`, a weights.tokenizer.OtherKind, names. `unspell`
    is encoder.UNSPELL, {code of a character: byte}.

    ids {spelling: id}, spellings {id: spelling}, special {text: id}, n_vocab, end_of_text and the methods are as in
    Encoder. `prefix` are the ids that the model expects before every text.
    """

    splitting = None  # none of encoder.SPLITTINGS

    def __init__(self, other, unspell):
        path = other.path
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise OSError(f"{other}: python3 -m pip install tokenizers reads such a tokenizer") from None
        found = read_json(path)
        try:
            self._first = tokenizers.Tokenizer.from_str(json.dumps(found))
            self._other = tokenizers.Tokenizer.from_str(json.dumps(without_first_space(found)))
        except Exception as error:  # the library raises nothing more special
            raise OSError(f"{other}; and for the tokenizers library it is no tokenizer ({error})") from None
        self._first.encode_special_tokens = self._other.encode_special_tokens = True  # they stay text in texts
        self._unspell = unspell
        self._is_byte_level = '"ByteLevel"' in json.dumps([found.get("decoder"), found.get("pre_tokenizer")])
        self.ids = self._first.get_vocab(with_added_tokens=True)
        self.spellings = {i: spelling for spelling, i in self.ids.items()}
        self.n_vocab = max(self.spellings, default=-1) + 1
        added = self._first.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self._plain = {i: token.content for i, token in added.items()}  # added tokens are not spelled
        self.end_of_text = self.special.get(END_OF_TEXT)
        self.prefix = self._prefix(path)

    def _prefix(self, path):
        """The ids that tokenizer.json, or else tokenizer_config.json, puts before every text."""
        empty, around = self._first.encode("").ids, self._first.encode("a", add_special_tokens=True).ids
        plain = self._first.encode("a", add_special_tokens=False).ids
        if around[len(around) - len(plain) :] != plain:
            raise OSError(f"{path}: post_processor adds tokens after each text, after which no model goes on writing")
        config = path.with_name("tokenizer_config.json")
        config = read_json(config) if config.exists() else {}
        bos = config.get("bos_token")
        bos = self.special.get(bos.get("content") if isinstance(bos, dict) else bos)
        if config.get("add_bos_token") is True and not empty and bos is not None:
            return (bos,)
        return () if config.get("add_bos_token") is False else tuple(empty)

    def encode(self, text, allowed_special=()):
        """str -> list of ids, as Encoder.encode. `prefix` is not among them."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.encode_parts(split_special(text, allowed_special, self.special))

    def encode_parts(self, parts):
        """The ids of a list of ordinary texts and of ids, which stay as they are."""
        ids = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += (self._other if i else self._first).encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, ids):
        """ids -> str. Bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id without a token."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, i):
        """One id -> its bytes, which need not be whole characters. Raises ValueError for an id without a token."""
        i = operator.index(i)
        if i in self._plain:
            return self._plain[i].encode()
        if i not in self.spellings:
            raise ValueError(f"token id {i} is not in the vocabulary of {len(self.spellings)} tokens")
        spelling = self.spellings[i]
        if self._is_byte_level and all(ord(character) in self._unspell for character in spelling):
            return spelling.translate(self._unspell).encode("latin-1")
        if a_byte := A_BYTE.fullmatch(spelling):
            return bytes([int(a_byte[1], 16)])
        return spelling.replace(SPACE, " ").encode()


def without_first_space(found):
    """The contents of a tokenizer.json for a text that stands behind a special token: there SentencePiece's space
    before a text is left out, if the file says "first"."""
    if look_up(found, "pre_tokenizer.prepend_scheme") == "first":
        return found | {"pre_tokenizer": found["pre_tokenizer"] | {"prepend_scheme": "never"}}
    return found
