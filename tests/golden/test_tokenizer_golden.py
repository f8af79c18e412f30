"""CLIP's ids of 5,040 strings: everyday prompts, long ones, other scripts, control characters, random characters.

No string is excepted. Ids can differ only at letters and digits that Unicode gained after the running Python's tables:
to these they are marks without a lower case. Against the `tokenizers` package, Python 3.11 (Unicode 14) agrees on every
character below U+30000 that it knows, and differs at new ones such as U+1C89 or U+A7CB; the stored strings hold none.
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
