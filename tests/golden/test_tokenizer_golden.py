"""CLIP's ids of 5,040 strings: everyday prompts, long ones, other scripts, control characters, random characters.

No string is excepted. Characters that Unicode added after the running Python's tables are where ids may differ from those
of another tokenizer: an unknown letter counts as a mark and has no lower case. Python 3.11 (Unicode 14) differs from the
`tokenizers` package at two single characters, U+1C89 and U+1C8A; the stored strings hold neither.
"""

from __future__ import annotations

import pytest

from i2v.models import tokenizer as module
from i2v.models.tokenizer import Tokenizer

COUNT = 5040


def wrong(tokenizer: Tokenizer, stored: list) -> list[str]:
    return [text for text, ids in stored if tokenizer.ids(text) != ids]


def test_all_strings(golden_json) -> None:
    stored = golden_json("clip_tokenizer_ids")
    assert len(stored) == COUNT
    assert wrong(Tokenizer.clip(), stored) == []


@pytest.mark.parametrize("fault", ["composition", "contractions", "spaces", "ranks"])
def test_a_fault_is_seen(golden_json, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = golden_json("clip_tokenizer_ids")[:300]
    tokenizer = Tokenizer.clip()
    if fault == "composition":
        monkeypatch.setattr(module.unicodedata, "normalize", lambda form, text: text)
    elif fault == "contractions":
        monkeypatch.setattr(module, "_CONTRACTIONS", ())
    elif fault == "spaces":
        monkeypatch.setattr(module, "_SPACES", {" "})
    else:
        tokenizer._ranks = {pair: -rank for pair, rank in tokenizer._ranks.items()}
    assert wrong(tokenizer, stored)
