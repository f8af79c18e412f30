"""docs/weights.md: it names every layout, and its commands make the released model, key for key and shape for shape."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.manifests import FOLDER, manifests, write_sparse
from i2v.assemble import ModelFiles, plan
from i2v.parts import CONFIGS, open_part
from i2v.presets import PRESETS
from weights_convert import convert_file, files
from weights_convert.__main__ import run
from weights_convert.known import LAYOUTS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
MANIFESTS = {
    "v1-5-pruned-emaonly.safetensors": "sd15_single_file_emaonly",
    "animatediff_v15_v1_ipplus.pth": "animatediff_v15_v1_ipplus",
    "i2v_module.pth": "i2v_module",
    "ip-adapter-plus_sd15.safetensors": "ip_adapter_plus_sd15",
    "image_encoder/model.safetensors": "clip_vision_vit_h14_hf",
}


def test_every_layout_is_named() -> None:
    table = PAGE[: PAGE.index("## What a file is")]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")]
    assert set(re.findall(r"`([\w-]+)`", " ".join(rows))) == {layout.name for layout in LAYOUTS}


def test_every_format_that_is_written_is_named() -> None:
    for name in (convert_file.OWN, convert_file.MODULE, convert_file.DIFFUSERS):
        assert f"| `{name}` |" in PAGE


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The released files as holes of full size; what is written is a header over a hole too."""

    def write(path: Path, tensors: Mapping[str, Tensor], metadata: Any, dtype: Any, done: Any) -> None:
        entries = {key: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for key, t in sorted(tensors.items())}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sparse(path, entries, metadata)

    monkeypatch.setattr(files, "write", write)
    monkeypatch.setattr(convert_file, "sha256", lambda *_, **__: "0" * 64)
    monkeypatch.chdir(tmp_path)
    for file, name in MANIFESTS.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        write_sparse(tmp_path / file, manifests(name)[name])
    return tmp_path


def commands() -> list[list[str]]:
    (block,) = re.findall(r"<!-- commands: release -->\n```bash\n(.*?)```", PAGE, re.S)
    return [shlex.split(line)[3:] for line in block.splitlines()]


def test_the_commands_make_the_released_model(released: Path) -> None:
    """Each command's source is one of the five files; then `sample.py` finds every part, with every shape."""
    assert sorted(command[1] for command in commands()) == sorted(MANIFESTS)
    for command in commands():
        assert run(command) == 0
    folder = released / "models" / "sd15"
    made = plan(ModelFiles(preset="i2v-sd15", weights=folder))
    assert made.problems == []
    assert made.schedule == PRESETS["i2v-sd15"].networks.schedule
    assert made.parts["vae"].config == PRESETS["i2v-sd15"].networks.vae
    for path in folder.glob("*.safetensors"):
        assert open_part(path, CONFIGS[path.stem]).metadata["base"] == "sd15"
    sources = open_part(folder / "ip_adapter.safetensors", CONFIGS["ip_adapter"]).metadata["sources"]
    assert set(sources) == {"ip-adapter-plus_sd15.safetensors", "animatediff_v15_v1_ipplus.pth"}


def test_attentions_without_their_projection_are_refused(released: Path) -> None:
    with pytest.raises(ValueError, match="ip-adapter-plus_sd15"):
        run(["convert", "animatediff_v15_v1_ipplus.pth", "models/sd15", "--to", "own"])
    assert not (released / "models").exists()


def test_the_written_key_lists_are_the_published_ones(released: Path) -> None:
    """From a folder of ours into published names: keys, shapes and number formats of the published file."""
    run(["convert", "i2v_module.pth", "models/sd15", "--to", "own"])
    run(["convert", "models/sd15", "back.safetensors", "--to", "i2v-module"])
    content = json.loads(gzip.decompress((FOLDER / "i2v_module.json.gz").read_bytes()))["tensors"]
    back, _ = files.read(released / "back.safetensors")
    assert {k: (list(v.shape), v.dtype) for k, v in back.items()} == {
        k: (v["shape"], getattr(torch, v["dtype"])) for k, v in content.items()
    }
