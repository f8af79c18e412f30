"""What every refusal says, checked wherever a test provokes one: file, found, expected, what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from weights_convert import files

ADVICE = re.compile(
    r"\b(choose|convert|download|fetch|give|keep|leave|name|run|save|say|start again|take|unpack|use|wait|write)\b"
)


def teaches(text: str, file: str) -> None:
    """Fails unless a message names the file, what was expected and something to do."""
    assert file in text, text
    assert "expected" in text, text
    assert ADVICE.search(text.replace(file, "")), text


def refused(path: Path, *says: str) -> None:
    """Reading the file is refused; the message teaches, and has these words."""
    with pytest.raises(files.ConversionError) as caught:
        files.read(path)
    teaches(str(caught.value), path.name)
    for word in says:
        assert word in str(caught.value), str(caught.value)
