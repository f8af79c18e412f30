"""CLIP's tokenizer: text -> byte-pair ids. The merges that come with the package are OpenAI CLIP's (MIT licence)."""

from __future__ import annotations

import gzip
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"  # marks the last symbol of a word
Merge = tuple[str, str]

_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# Unicode's White_Space; str.isspace counts four control characters too
_SPACES = {*"\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000", *map(chr, range(0x2000, 0x200B))}


def byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character that stands for it, in the order of their ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


_CHARACTER = byte_alphabet()


def vocabulary(merges: Sequence[Merge]) -> dict[str, int]:
    """Symbol -> id in CLIP's order: bytes, bytes that end a word, merges by rank, start token, end token."""
    return {symbol: i for i, symbol in enumerate([*_first_symbols(), *(a + b for a, b in merges), START, END])}


def _first_symbols() -> list[str]:
    return [*_CHARACTER.values(), *(c + WORD_END for c in _CHARACTER.values())]


def words(text: str) -> Iterator[str]:
    """The pieces within which merges happen: contractions, runs of letters, single digits, runs of other marks.

    `text` is normalised first: NFC, then lower case character by character (a final sigma stays an ordinary one).
    """
    text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
    i = 0
    while i < len(text):
        end = next((i + len(c) for c in _CONTRACTIONS if text.startswith(c, i)), 0)
        if not end:
            kind, end = _kind(text[i]), i + 1
            while kind != "N" and end < len(text) and _kind(text[end]) == kind:
                end += 1
            if kind == "space":
                i = end
                continue
        yield text[i:end]
        i = end


def _kind(character: str) -> str:
    if character in _SPACES:
        return "space"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "mark"


def parse_merges(text: str) -> list[Merge]:
    """The lines of a merges.txt, best rank first; a `#version` line is skipped. Raises ValueError for other lines."""
    merges: list[Merge] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"merges, line {number}: expected two symbols with a space between, got {line!r}")
        merges.append((pair[0], pair[1]))
    return merges


class Tokenizer:
    """Byte-pair encoding as CLIP uses it: start token, at most `length` - 2 symbols, end token, padding.

    vocab: symbol -> id. merges: pairs of symbols, best rank first. pad_token: a symbol of the vocabulary; CLIP-L pads
    with the end token, SDXL's second encoder with "!". length: ids per text, the text encoder's `max_length`.
    Raises ValueError where vocabulary and merges do not belong together.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[Merge], pad_token: str = END, length: int = 77):
        needed = [*_first_symbols(), *(a + b for a, b in merges), START, END, pad_token]
        missing = [symbol for symbol in needed if symbol not in vocab]
        if missing:
            lacks = f"the vocabulary lacks {len(missing)} symbols that are needed, first {missing[0]!r}"
            raise ValueError(f"{lacks}; vocab.json and merges.txt must be of one model")
        _check_length(length)
        self.vocab = dict(vocab)
        self.length = length
        self.bos_id, self.eos_id, self.pad_id = vocab[START], vocab[END], vocab[pad_token]
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._symbols = {i: symbol for symbol, i in vocab.items()}
        self._known: dict[str, list[int]] = {}  # ids of words seen before

    @classmethod
    def clip(cls, *, pad_token: str = END, length: int = 77) -> Tokenizer:
        """CLIP's own vocabulary of 49,408 symbols, used by SD1.5 and SDXL."""
        packed = resources.files("i2v.models").joinpath("data/clip_merges.txt.gz").read_bytes()
        merges = parse_merges(gzip.decompress(packed).decode("utf-8"))
        return cls(vocabulary(merges), merges, pad_token, length)

    @classmethod
    def from_files(cls, vocab: Path, merges: Path, *, pad_token: str = END, length: int = 77) -> Tokenizer:
        """From a model's vocab.json and merges.txt."""
        table = json.loads(Path(vocab).read_text(encoding="utf-8"))
        return cls(table, parse_merges(Path(merges).read_text(encoding="utf-8")), pad_token, length)

    def ids(self, text: str) -> list[int]:
        """The whole text, without start, end, limit and padding; special tokens written in it are taken as such."""
        out: list[int] = []
        for i, between in enumerate(text.split(END)):
            out += [self.eos_id] * (i > 0)
            for j, piece in enumerate(between.split(START)):
                out += [self.bos_id] * (j > 0)
                for word in words(piece):
                    out += self._word(word)
        return out

    @property
    def sha256(self) -> str:
        """Of vocabulary and merges, however their files are laid out; in hexadecimal."""
        merges = sorted(self._ranks, key=self._ranks.__getitem__)
        text = json.dumps([sorted(self.vocab.items()), merges])
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str | Sequence[str], length: int | None = None) -> Tensor:
        """One text or N -> LongTensor (N, length), by default the tokenizer's own length. Longer texts are cut."""
        length = self.length if length is None else length
        _check_length(length)
        rows = []
        for one in [text] if isinstance(text, str) else text:
            row = [self.bos_id, *self.ids(one)[: length - 2], self.eos_id]
            rows.append(row + [self.pad_id] * (length - len(row)))
        return torch.tensor(rows, dtype=torch.long).reshape(-1, length)

    def truncated(self, text: str, length: int | None = None) -> str:
        """The end of the text that `encode` cuts off, as the model would have read it; "" where all fits."""
        return self.decode(self.ids(text)[(self.length if length is None else length) - 2 :])

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> lower-case text with a space after each word; start and end tokens are left out."""
        byte = {c: b for b, c in _CHARACTER.items()}
        symbols = [self._symbols[i] for i in ids if i not in (self.bos_id, self.eos_id)]
        text = bytearray()
        for symbol in symbols:
            text += bytes(byte[c] for c in symbol.removesuffix(WORD_END))
            text += b" " * symbol.endswith(WORD_END)
        return text.decode("utf-8", errors="replace").strip()

    def _word(self, word: str) -> list[int]:
        """Ids of one word: the pair of the best rank is merged, everywhere, until none is left."""
        if word not in self._known:
            symbols = word_symbols(word)
            while len(symbols) > 1:
                best = min(pairwise(symbols), key=lambda p: self._ranks.get(p, len(self._ranks)))
                if best not in self._ranks:
                    break
                symbols = merged(symbols, best)
            self._known[word] = [self.vocab[s] for s in symbols]
        return self._known[word]


def word_symbols(word: str) -> list[str]:
    """A word before any merge: one character per byte of its utf-8 form, the last one marked."""
    symbols = [_CHARACTER[b] for b in word.encode("utf-8", errors="replace")]
    return [*symbols[:-1], symbols[-1] + WORD_END]


def merged(symbols: Sequence[str], pair: Merge) -> list[str]:
    """The symbols with each occurrence of the pair joined, from the left."""
    out: list[str] = []
    i = 0
    while i < len(symbols):
        if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
            out.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def _check_length(length: int) -> None:
    if length < 3:
        raise ValueError(f"length {length}: start token, end token and a symbol between need at least 3")
