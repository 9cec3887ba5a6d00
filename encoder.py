"""Text to token ids and back: GPT-2's byte-level byte-pair encoding (BPE).

A model counts; it cannot read. A tokenizer cuts text into pieces from a fixed vocabulary and hands over their numbers:

    "hello world"  ->  ["hello", " world"]  ->  [31373, 995]

Four steps, each a few lines below:
1. The text is split into words, numbers, runs of signs and runs of white space. No token reaches across such a border.
2. Each piece becomes bytes (UTF-8), so that 256 symbols suffice for every text in the world: nothing is ever unknown.
3. Inside a piece, neighbours are merged, the pair with the lowest rank first: the rank is its line in vocab.bpe, where
   the pair most frequent in the training text stands first. This goes on until no neighbours have a rank.
4. Each symbol that is left has an id in encoder.json.

Decoding is a concatenation of bytes. A token may end in the middle of a character: see `Encoder.stream`.

Sources: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", §3.2 (BPE);
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", §2.2 (on bytes).
"""

import functools
import heapq
from collections import defaultdict
from pathlib import Path

import regex

from weights.files import read_json, read_text

END_OF_TEXT = "<|endoftext|>"  # stands between the documents a model was trained on; the one special token of GPT-2

PIECES = regex.compile(
    "|".join(
        [
            r"'s|'t|'re|'ve|'m|'ll|'d",  # English endings: it|'s, don|'t
            r" ?\p{L}+",  # letters, with the space before them: " world" is one piece
            r" ?\p{N}+",  # digits, likewise
            r" ?[^\s\p{L}\p{N}]+",  # signs, likewise
            r"\s+(?!\S)",  # white space, but for its last character if a word follows (which takes a space along)
            r"\s+",
        ]
    )
)


def byte_spellings():
    """{byte: character}: the printable stand-in under which the vocabulary files spell each of the 256 bytes.

    Those that print well spell themselves. The other 68 (controls, space, newline, ...) take the characters from 256
    on, in order, so a space is written "Ġ" (32 -> 288) and a newline "Ċ" (10 -> 266).
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


SPELL = byte_spellings()
UNSPELL = {ord(character): byte for byte, character in SPELL.items()}


class Encoder:
    """`ids` is {spelling: id}, as in encoder.json; `merges` lists pairs of spellings, as in vocab.bpe, best first."""

    def __init__(self, ids, merges):
        self.ids = ids
        self.spellings = {i: spelling for spelling, i in ids.items()}
        self.ranks = dict(zip(merges, range(len(merges)), strict=True))
        self.end_of_text = ids.get(END_OF_TEXT)
        # Text repeats its words: remembered are the last 65,536 different pieces, but no monster among them.
        self._cached_encode_piece = functools.lru_cache(maxsize=2**16)(self._encode_piece)

    def encode(self, text, allowed_special=()):
        """str -> list of ids. Never fails on a text: a lone surrogate, which no UTF-8 can hold, counts as U+FFFD.

        "<|endoftext|>" is thirteen ordinary characters, unless allowed_special contains it: whoever typed it into a
        prompt may not know that it ends a document. Raises ValueError for any other special token.
        """
        text = replace_lone_surrogates(text)
        allowed_special = {allowed_special} if isinstance(allowed_special, str) else set(allowed_special)
        if unknown := allowed_special - {END_OF_TEXT} or allowed_special - self.ids.keys():
            raise ValueError(f"{unknown.pop()!r} is no special token of this encoder")
        if not allowed_special:
            return self._encode_ordinary(text)
        first, *others = text.split(END_OF_TEXT)
        ids = self._encode_ordinary(first)
        for part in others:
            ids += [self.end_of_text, *self._encode_ordinary(part)]
        return ids

    def decode(self, ids):
        """ids -> str. Bytes that are no UTF-8 become U+FFFD. Raises ValueError for an id outside the vocabulary."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, i):
        """One id -> its bytes, which need not be whole characters."""
        if i not in self.spellings:
            raise ValueError(f"token id {i} is not in the vocabulary of {len(self.spellings)} tokens")
        try:
            return self.spellings[i].translate(UNSPELL).encode("latin-1")
        except UnicodeEncodeError:
            raise OSError(f"token {i}, {self.spellings[i]!r}, is not spelled in the stand-ins for bytes") from None

    def _encode_ordinary(self, text):
        ids = []
        for piece in PIECES.findall(text):
            ids += self._cached_encode_piece(piece) if len(piece) <= 64 else self._encode_piece(piece)
        return ids

    def _encode_piece(self, piece):
        symbols = merge([SPELL[byte] for byte in piece.encode("utf-8")], self.ranks)
        try:
            return [self.ids[symbol] for symbol in symbols]
        except KeyError as missing:
            raise OSError(
                f"the tokenizer's two files do not match: merges lead to {missing}, which has no id"
            ) from None

    def check(self):
        """Raises OSError unless each merge leads to a token and each token is bytes. Takes longer than loading."""
        if odd := next((a + b for a, b in self.ranks if a + b not in self.ids), None):
            raise OSError(f"the tokenizer's two files do not match: merges lead to {odd!r}, which has no id")
        for i in self.spellings:
            self.token_bytes(i)


# Searching all pairs for the best one after each merge would cost O(n²), minutes for a line of a million dashes. Here
# the places where a pair stands wait in a bucket by its rank, and a merge looks only at the two new pairs that it
# makes: O(n log n), the log from sorting buckets.
def merge(symbols, ranks):
    """Merges neighbours in a list of strings, lowest rank first, left to right, until no two have one in {pair: rank}.

    merge(list("hello"), {("l", "l"): 0, ("h", "e"): 1, ("he", "ll"): 2})  ->  ["hell", "o"]
    """
    symbols = [*symbols, ""]  # "" marks the end, and what was merged away: no ranked pair contains it
    # Who stands next to whom, as they become fewer: a ring, closed by the end mark, so that nobody is on the edge.
    before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), 0]
    buckets, queue = defaultdict(list), []  # {rank: places of its pairs}; a heap of these ranks

    def wait(places):
        for place in places:
            if (rank := ranks.get((symbols[place], symbols[after[place]]))) is not None:
                if rank not in buckets:
                    heapq.heappush(queue, rank)
                buckets[rank].append(place)

    wait(range(len(symbols) - 1))
    while queue:
        rank = heapq.heappop(queue)
        for left in sorted(buckets.pop(rank)):
            right = after[left]
            if ranks.get((symbols[left], symbols[right])) == rank:  # else an earlier merge took one of the two
                symbols[left], symbols[right] = symbols[left] + symbols[right], ""
                after[left], before[after[right]] = after[right], left
                wait((before[left], left))
    return [symbol for symbol in symbols if symbol]


def replace_lone_surrogates(text):
    """Half a surrogate pair (from a broken file name, say) becomes U+FFFD; two halves become their character."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def get_encoder(model_size, models_dir):
    """The Encoder of the model folder models_dir/model_size: OpenAI's encoder.json and vocab.bpe, or the same two under
    Hugging Face's names, vocab.json and merges.txt. Raises OSError naming the file that is missing or damaged."""
    folder = Path(models_dir) / model_size
    names = ("vocab.json", "merges.txt") if (folder / "vocab.json").exists() else ("encoder.json", "vocab.bpe")
    lines = read_text(folder / names[1]).splitlines()
    lines = (
        lines[1:] if lines and lines[0].startswith("#version") else lines
    )  # only there: "# #" is a merge like others
    merges = [tuple(line.split(" ")) for line in lines if line]
    if any(len(pair) != 2 for pair in merges):
        raise OSError(f"{folder / names[1]}: a line is not two symbols with a space between them")
    ids = read_json(folder / names[0])
    if set(ids.values()) != set(range(len(ids))) or not set(SPELL.values()) <= ids.keys():
        raise OSError(f"{folder / names[0]}: its ids must be 0, 1, 2, ... and the 256 bytes must be among its tokens")
    return Encoder(ids, merges)
