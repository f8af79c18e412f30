"""The tokenizer against transformers' CLIPTokenizer: rows with CLIP's files and with a small learnt vocabulary."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from i2v.data.learn_bpe import learn, write
from i2v.models.tokenizer import END, Tokenizer, parse_merges, vocabulary

transformers: ModuleType = pytest.importorskip("transformers")

CAPTIONS = [f"a {size} {color} {thing} moves {way}" for size in ("small", "big") for color in ("red", "blue")
            for thing in ("circle", "star") for way in ("left", "right", "up")]  # fmt: skip
PIECES = ["a cat", "CAFÉ", "e\u0301", "it's", "'S", " \t\n", "1234", "½", "...", "''", "日本語", "ΟΔΟΣ", "🙂",
          "<|endoftext|>", "<|startoftext|>", "\u200d", "\x1c", "\xa0", "İ", "masterpiece,", "x" * 30]  # fmt: skip


def strings(count: int) -> list[str]:
    chosen = random.Random(0)
    return ["", *(chosen.choice(["", " "]).join(chosen.choices(PIECES, k=chosen.randint(1, 40))) for _ in range(count))]


@pytest.fixture(scope="module", params=["clip", "learnt"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "clip":
        ours = Tokenizer.clip()
        write(folder, list(ours._ranks))
    else:
        write(folder, learn(CAPTIONS, 40))
        ours = Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt")
    merges = parse_merges((folder / "merges.txt").read_text(encoding="utf-8"))
    return ours, transformers.CLIPTokenizer(vocab=vocabulary(merges), merges=merges, pad_token=END)


def rows(theirs: Any, texts: Sequence[str], length: int) -> list[list[int]]:
    out = theirs(list(texts), padding="max_length", truncation=True, max_length=length)["input_ids"]
    return [list(row) for row in out]


@pytest.mark.parametrize("length", [77, 16])
def test_rows(both: tuple[Tokenizer, Any], length: int) -> None:
    ours, theirs = both
    texts = strings(300) + CAPTIONS
    assert ours.encode(texts, length).tolist() == rows(theirs, texts, length)


def test_a_lost_merge_is_seen(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    short = Tokenizer(ours.vocab, [pair for pair in ours._ranks if "".join(pair) not in ("re", "ed</w>", "red</w>")])
    assert short.encode(CAPTIONS, 16).tolist() != rows(theirs, CAPTIONS, 16)
