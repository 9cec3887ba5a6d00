"""Text to token ids and back: byte-level byte-pair encoding (BPE), the tokenizer of GPT-2.

A language model works on numbers. A tokenizer cuts a text into tokens, strings from a fixed vocabulary, and replaces
each by its number, the token id:

    "hello world"  ->  ["hello", " world"]  ->  [31373, 995]

Why not one token for each word, or for each letter? Words would need an endless vocabulary, and a new word would have
no token. Letters would make every text four times as long, and a model computes as much for each token, however short.
BPE lies between: it starts from single symbols and merges the most frequent pair of neighbours into a new token, again
and again, until the vocabulary has the wanted size. Frequent words become one token, rare ones several.

Encoding takes four steps, each a few lines below:
1. The text is split into pieces: words, numbers, runs of signs, runs of white space. No token crosses the border of a
   piece, so that "dog", "dog." and "dog!" share the token "dog" instead of each having a token of its own.
2. Each piece becomes bytes, in UTF-8. There are only 256 bytes, all of them tokens, so there is no text that has no
   encoding. Most emoji are four bytes: two to four tokens, unless it was frequent enough for a token of its own.
3. Within a piece, neighbouring symbols are merged: first the pair with the lowest rank, which is its place in the list
   of merges, the order in which training found it. This is repeated until no two neighbours have a rank.
4. Each symbol that is left has an id in encoder.json.

Decoding joins the bytes of the tokens. A token may end in the middle of a character (the first token of an emoji does),
so the bytes are decoded as UTF-8 only when they are all there.

Sources: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2 (BPE);
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2 (on bytes).
"""

import functools
import heapq
import itertools
import operator
from pathlib import Path

import regex

from weights.tokenizer import END_OF_TEXT, OtherKind, check_vocabulary, read_tokenizer, split_special

PIECES = regex.compile(
    "|".join(
        [
            r"'s|'t|'re|'ve|'m|'ll|'d",  # English endings: it|'s, don|'t
            r" ?\p{L}+",  # letters, with the space before them: " world" is one piece
            r" ?\p{N}+",  # digits, likewise
            r" ?[^\s\p{L}\p{N}]+",  # signs, likewise
            r"\s+(?!\S)",  # white space, without its last character if a word follows: a word takes a space along
            r"\s+",
        ]
    )
)
DIGITS = regex.compile(r"\p{N}|\P{N}+")  # each digit alone, so that a model meets few tokens for numbers
SPLITTINGS = {"gpt-2": (PIECES,), "smollm": (DIGITS, PIECES)}  # name -> the patterns that split a text, one by one


def byte_spellings():
    """{byte: character}: the printable character with which the vocabulary files spell each of the 256 bytes.

    A byte that is a printable character spells itself. The other 68 (controls, space, newline, ...) are spelled with
    the characters from 256 on, in order: a space is "Ġ" (32 -> 288), a newline "Ċ" (10 -> 266).
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


SPELL = byte_spellings()
UNSPELL = {ord(character): byte for byte, character in SPELL.items()}


def spell(text):
    """str -> one printable character for each byte of its UTF-8. " é" -> "ĠÃ©" """
    return "".join(SPELL[byte] for byte in text.encode("utf-8", "surrogatepass"))


class Encoder:
    """`ids` is {spelling: id}, as in encoder.json; `merges` lists pairs of spellings, as in vocab.bpe, best first.

    `special` is {text: id} of the tokens that no text contains by itself, such as <|endoftext|>, `splitting` the key
    of one of SPLITTINGS. n_vocab is the largest id + 1; an id below it need not have a token.
    """

    prefix = ()  # ids that the model expects before every text; others than GPT-2 have some

    def __init__(self, ids, merges, special=None, splitting="gpt-2"):
        self.ids = ids
        self.spellings = {i: spelling for spelling, i in ids.items()}
        self.n_vocab = max(self.spellings, default=-1) + 1
        self.ranks = dict(zip(merges, range(len(merges)), strict=True))
        self.end_of_text = ids.get(END_OF_TEXT)
        self.special = {END_OF_TEXT: self.end_of_text} if special is None and END_OF_TEXT in ids else special or {}
        self.splitting = splitting
        # Text repeats its words, so the last 65,536 different pieces are remembered.
        self._cached_encode_piece = functools.lru_cache(maxsize=2**16)(self._encode_piece)

    def encode(self, text, allowed_special=()):
        """str -> list of ids. Every text has an encoding. A lone surrogate (half of the pair of codes by which UTF-16
        writes some characters) cannot be written in UTF-8: it counts as U+FFFD, the replacement character.

        "<|endoftext|>" is thirteen ordinary characters, unless allowed_special contains it: a user who types it into a
        prompt may not know that it ends a document. Raises ValueError for what is no special token.
        """
        return self.encode_parts(split_special(replace_lone_surrogates(text), allowed_special, self.special))

    def encode_parts(self, parts):
        """The ids of a list of ordinary texts and of ids, which stay as they are."""
        ids = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._encode_ordinary(part)
        return ids

    def decode(self, ids):
        """ids -> str. `ids` is a list or an array of whole numbers. Bytes that are not UTF-8 become U+FFFD. Raises
        ValueError for an id without a token."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, i):
        """One id -> its bytes, which need not be whole characters. Raises ValueError for an id without a token."""
        i = operator.index(i)  # JAX's numbers cannot be looked up in a dict
        if i not in self.spellings:
            raise ValueError(f"token id {i} is not in the vocabulary of {len(self.spellings)} tokens")
        try:
            return self.spellings[i].translate(UNSPELL).encode("latin-1")
        except UnicodeEncodeError:
            raise OSError(f"token {i}, {self.spellings[i]!r}, contains a character that spells no byte") from None

    def split(self, text):
        """The pieces of a text, whose borders no token crosses."""
        pieces = [text]
        for pattern in SPLITTINGS[self.splitting]:
            pieces = [part for piece in pieces for part in pattern.findall(piece)]
        return pieces

    def _encode_ordinary(self, text):
        ids = []
        for piece in self.split(text):  # long pieces seldom come twice, and would fill the memory
            ids += self._cached_encode_piece(piece) if len(piece) <= 64 else self._encode_piece(piece)
        return ids

    def _encode_piece(self, piece):
        # SmolLM2 has no token for 21 of the bytes, among them control characters: these are left out.
        symbols = [symbol for symbol in spell(piece) if symbol in self.ids]
        try:
            return [self.ids[symbol] for symbol in merge(symbols, self.ranks)]
        except KeyError as missing:
            raise OSError(f"the tokenizer's files do not match: merges lead to {missing}, which has no id") from None


def merge(symbols, ranks):
    """Merges neighbours in a sequence of strings, lowest rank first, then from left to right, until no two neighbours
    have a rank in {pair: rank}. Returns the list of symbols that are left.

    merge("hello", {("l", "l"): 0, ("h", "e"): 1, ("he", "ll"): 2})  ->  ["hell", "o"]

    Takes O(n log n) time: after a merge only the two new pairs are looked up. Searching all pairs again would be
    O(n^2), minutes for a line of a million dashes.
    """
    n, symbols = len(symbols), [*symbols, ""]  # "" marks the end, and what was merged away: no pair with it has a rank
    before, after = [*range(-1, n)], [*range(1, n + 1), 0]  # the neighbours of each symbol: a circular linked list
    # A heap of (rank, left): the pair with the lowest rank, and of equal ones the leftmost, comes out first. The two
    # are packed into one number, which is quicker to compare.
    heap = [ranks[pair] * n + left for left, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, left = divmod(heapq.heappop(heap), n)
        right = after[left]
        if ranks.get((symbols[left], symbols[right])) != rank:
            continue  # an earlier merge took one of the two
        symbols[left], symbols[right] = symbols[left] + symbols[right], ""
        after[left], before[after[right]] = after[right], left
        for place in (before[left], left):
            if (rank := ranks.get((symbols[place], symbols[after[place]]))) is not None:
                heapq.heappush(heap, rank * n + place)
    return [symbol for symbol in symbols if symbol]


def replace_lone_surrogates(text):
    """Half a surrogate pair (from a broken file name, say) becomes U+FFFD; two halves become their character."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- From files ----


def get_encoder(model_size, models_dir):
    """The tokenizer of the model folder or the .gguf file models_dir/model_size, from one of the layouts in
    weights/tokenizer.py: an Encoder, or for other kinds than GPT-2's an object with the same methods. Raises OSError
    naming the file that is missing or damaged."""
    try:
        file, ids, merges, added, splitting = read_tokenizer(Path(models_dir) / model_size)
    except OtherKind as other:
        from weights.library_tokenizer import LibraryTokenizer

        return LibraryTokenizer(other, UNSPELL)
    # The files spell ordinary tokens byte by byte; the tokens that were added later stand there as plain text.
    for text in added:
        ids.pop(text, None)
    ids |= {spell(text): i for text, i in added.items()}
    symbols = {*SPELL.values()} if splitting == "gpt-2" else SPELL.values() & ids.keys()
    check_vocabulary(file, ids, merges, {*symbols, *map(spell, added)})
    special = {END_OF_TEXT: ids[END_OF_TEXT]} if END_OF_TEXT in ids else {}
    return Encoder(ids, merges, special | added, splitting)
