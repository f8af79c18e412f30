"""LoRA files that are written: read again to the bit, in each grammar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_files import (
    SMALL,
    TEXT,
    UNET,
    draw,
    flat,
    toy,
)

from i2v.models.lora import LoRAPair
from weights_convert import files
from weights_convert.lora import is_lora, read_lora
from weights_convert.rules import ConversionError
from weights_convert.write_lora import LAYOUTS, write_lora


def parts() -> dict[str, dict[str, LoRAPair]]:
    out: dict[str, dict[str, LoRAPair]] = {}
    for n, ((part, path), one) in enumerate(toy().items()):
        out.setdefault(part, {})[path] = LoRAPair(one.down, one.up, alpha=float(n + 1))
    out["unet"]["down_blocks.0.resnets.0.conv1"] = LoRAPair(draw(2, 32, 3, 3), draw(32, 2, 1, 1), 2.0)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout: str, tmp_path: Path) -> None:
    """To the bit, with alphas; read without the model too, since the base's config is in the metadata."""
    path = write_lora(tmp_path / "x.safetensors", parts(), SMALL, layout, recipe={"steps": 3})
    for base in (SMALL, None):
        lora = read_lora(path, base)
        assert lora.layout == layout and lora.base == "small" and json.loads(lora.metadata["recipe"]) == {"steps": 3}
        found = flat(lora)
        wanted = {(part, path): pair for part, pairs in parts().items() for path, pair in pairs.items()}
        assert found.keys() == wanted.keys()
        for target, one in wanted.items():
            assert torch.equal(found[target].down, one.down) and torch.equal(found[target].up, one.up)
            assert found[target].alpha == one.alpha
    assert is_lora(list(files.read(path)[0]))


def test_what_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    one = next(iter(toy().values()))
    with pytest.raises(ConversionError, match="no LoRA is written in the layout 'loha', expected one of"):
        write_lora(path, parts(), SMALL, "loha")
    with pytest.raises(ConversionError, match="no pair to write"):
        write_lora(path, {"unet": {}}, SMALL)
    with pytest.raises(ConversionError, match="small has no layer unet.down_blocks.7"):
        write_lora(path, {"unet": {"down_blocks.7.resnets.0.conv1": one}}, SMALL)
    for layout in LAYOUTS:
        with pytest.raises(
            ConversionError, match="small has no text_encoder_2, expected unet, motion, text_encoder; na"
        ):
            write_lora(path, {"text_encoder_2": {f"{TEXT}v_proj": one}}, SMALL, layout)
        wide = {"unet": {f"{UNET}attn1.to_q": LoRAPair(draw(2, 40), draw(32, 2))}}
        with pytest.raises(ConversionError, match=r"to_q changes a weight \(32, 40\), expected \(32, 32\), that of sm"):
            write_lora(path, wide, SMALL, layout)
    middle = {"unet": {"conv_in": LoRAPair(draw(2, 4, 1, 1), draw(32, 2, 1, 1), None, draw(2, 2, 3, 3))}}
    with pytest.raises(ConversionError, match="middle tensor, which only the layout kohya holds"):
        write_lora(path, middle, SMALL)
    assert not path.exists()
    write_lora(path, middle, SMALL, "kohya")
    mid = read_lora(path, SMALL).parts["unet"]["conv_in"].mid
    assert mid is not None and torch.equal(mid, draw(2, 2, 3, 3))


def test_a_damaged_base_in_the_metadata(tmp_path: Path) -> None:
    tensors, _ = files.read(write_lora(tmp_path / "x.safetensors", parts(), SMALL))
    large = (
        '{"name": "x", "text": [], "unet": {"channels": [32], "depths": [999999999], "heads": [4], "context_dim": 8}}'
    )
    for broken in (large, "{", "[]", '{"name": "x"}', '{"name": "x", "unet": {"depth": 3}, "text": [24]}'):
        files.write(tmp_path / "y.safetensors", tensors, {"lora_base": broken})
        with pytest.raises(ConversionError, match="y.safetensors: lora_base"):
            read_lora(tmp_path / "y.safetensors")
