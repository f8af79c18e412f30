"""Learns a small vocabulary from captions: `python -m i2v.data.learn_bpe --captions captions.txt --out FOLDER`.

Writes vocab.json and merges.txt as `Tokenizer.from_files` reads them, in the format and order of CLIP's own.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from i2v import config
from i2v.config import flag
from i2v.models.tokenizer import Merge, Tokenizer, merged, vocabulary, word_symbols, words


@dataclass(frozen=True)
class Learning:
    """Learn byte-pair merges from a text file of captions, one per line."""

    captions: Path = flag(Path("captions.txt"), "text file, one caption per line, utf-8")
    out: Path = flag(Path("."), "folder for vocab.json and merges.txt")
    merges: int = flag(128, "merges at most; the vocabulary has 514 symbols more")


def learn(captions: Iterable[str], merges: int) -> list[Merge]:
    """The most frequent pair of neighbouring symbols is merged, `merges` times or until each word is one symbol.

    A pair counts as often as its word occurs; of equally frequent pairs the alphabetically first one wins, so that the
    result depends on the captions alone, not on their order.
    """
    counts: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        for word in words(caption):
            counts[word] += times
    split = {word: word_symbols(word) for word in counts}
    learnt: list[Merge] = []
    while len(learnt) < merges:
        pairs: Counter[Merge] = Counter()
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learnt.append(best)
        split = {word: merged(symbols, best) for word, symbols in split.items()}
    return learnt


def write(folder: Path, merges: list[Merge]) -> None:
    """vocab.json and merges.txt, each of them complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = json.dumps(vocabulary(merges), ensure_ascii=False, separators=(",", ":"))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    for name, text in (("vocab.json", vocab), ("merges.txt", "\n".join(lines) + "\n")):
        aside = folder / f".{name}.{os.getpid()}.tmp"
        try:
            with open(aside, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, folder / name)
        finally:
            aside.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    cfg = config.from_command_line(Learning, argv)
    if not cfg.captions.is_file():
        sys.exit(f"--captions {cfg.captions}: no such file; give a text file with one caption per line")
    captions = [line for line in cfg.captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    merges = learn(captions, cfg.merges)
    write(cfg.out, merges)
    tokenizer = Tokenizer(vocabulary(merges), merges)
    longest = max((len(tokenizer.ids(c)) + 2 for c in set(captions)), default=0)
    size = len(tokenizer.vocab)
    print(f"{len(captions)} captions, {len(merges)} merges, vocabulary of {size}, longest text {longest} ids")


if __name__ == "__main__":
    main()
