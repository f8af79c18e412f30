"""Who may import whom: the layers of the code, held as a dict and checked against every import statement."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"train", "sample"}

MODELS = {"torch", "einops"}
SHARED = {*MODELS, "i2v.models.conditioning", "i2v.models.layers", "i2v.models.unet"}
NUMERIC = {"torch", "numpy"}
RUNTIME = {"torch", "einops", "safetensors", "numpy", "cv2", "tqdm", "av"}
ANYTHING = {*RUNTIME, "i2v", "weights_convert", "eval"}

# Module prefix -> what it may import besides the standard library. The longest prefix that fits decides.
# An entry covers everything below it, so "i2v.models" allows "i2v.models.layers".
MAY_IMPORT: dict[str, set[str]] = {
    "i2v": {*RUNTIME, "i2v", "weights_convert"},
    "i2v.models": {*MODELS, "i2v.models"},
    "i2v.models.cpu": MODELS,
    "i2v.models.frozen": {*MODELS, "i2v.models.cpu"},
    "i2v.models.chunks": MODELS,
    "i2v.models.conditioning": MODELS,
    "i2v.models.norms": {*MODELS, "i2v.models.chunks", "i2v.models.cpu"},
    "i2v.models.layers": {
        *MODELS,
        "i2v.models.chunks",
        "i2v.models.conditioning",
        "i2v.models.cpu",
        "i2v.models.frozen",
        "i2v.models.norms",
    },
    # Adapters are slots of the UNet: they share leaf modules and never import each other.
    "i2v.models.unet": {*MODELS, "i2v.models.chunks", "i2v.models.conditioning", "i2v.models.cpu", "i2v.models.layers"},
    "i2v.models.motion": {*SHARED, "i2v.models.chunks", "i2v.models.norms"},
    "i2v.models.i2v_adapter": SHARED,
    "i2v.models.ip_adapter": SHARED,
    "i2v.models.controlnet": SHARED,
    # A model is a callable here.
    "i2v.diffusion": {"torch", "i2v.diffusion"},
    "i2v.noise": NUMERIC,
    "i2v.video": {"numpy", "cv2", "i2v.media"},
    "i2v.media": {"numpy", "cv2", "av", "i2v.media"},
    "i2v.picture": {"numpy", "cv2", "torch", "i2v.color"},
    "i2v.color": {"numpy", "cv2"},
    "i2v.config": {"i2v.media.output_file"},
    # The config dataclasses of the models, nothing else of i2v.
    "weights_convert": {"torch", "numpy", "safetensors", "weights_convert", "i2v.models"},
    # It writes our own format, which i2v.parts reads: the metadata hold configs and the noise schedule.
    "weights_convert.own_format": {"torch", "weights_convert", "i2v.models", "i2v.parts", "i2v.diffusion.schedule"},
    "weights_convert.convert_file": {"torch", "tqdm", "weights_convert", "i2v.models", "i2v.parts", "i2v.hashes"},
    "eval": ANYTHING,
    "train": ANYTHING,
    "sample": ANYTHING,
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    folders = [p for name in ("i2v", "weights_convert", "eval") for p in sorted((ROOT / name).rglob("*.py"))]
    return folders + [ROOT / f"{name}.py" for name in sorted(SCRIPTS) if (ROOT / f"{name}.py").exists()]


def imports(path: Path, source: str | None = None) -> set[str]:
    """Dotted names that a file imports, relative ones resolved; `from a import b` gives a.b where that is a module."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source if source is not None else path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{stem}.{alias.name}"
                file = ROOT / Path(*full.split("."))
                found.add(full if file.with_suffix(".py").exists() or file.is_dir() else stem)
    return found


def allowed(name: str) -> set[str]:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in MAY_IMPORT:
            return MAY_IMPORT[prefix]
    raise AssertionError(f"{name} has no entry in MAY_IMPORT: add the layer that it belongs to")


def violations(path: Path, source: str | None = None) -> list[str]:
    name = module_name(path)
    may = allowed(name)
    wrong = []
    for target in sorted(imports(path, source)):
        if target.split(".")[0] in sys.stdlib_module_names or target == name:
            continue
        if not any(target == entry or target.startswith(entry + ".") for entry in may):
            wrong.append(f"{name} imports {target}; it may import {sorted(may) or 'the standard library only'}")
    return wrong


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_layers(path: Path) -> None:
    assert not violations(path)


def test_nothing_imports_a_script() -> None:
    for path in sources():
        if path.stem not in SCRIPTS:
            assert not {t.split(".")[0] for t in imports(path)} & SCRIPTS, path


def test_a_forbidden_import_is_seen() -> None:
    """The check fails where it should: an adapter that imports another, a model that imports cv2, a relative climb."""
    path = ROOT / "i2v" / "models" / "i2v_adapter.py"
    assert violations(path, "from i2v.models import ip_adapter")
    assert violations(path, "import cv2")
    assert violations(path, "from ..diffusion import schedule")
    assert violations(ROOT / "i2v" / "pipeline.py", "import eval.metrics")
    assert violations(ROOT / "weights_convert" / "rules.py", "from i2v import pipeline")
    assert not violations(path, "import torch\nfrom i2v.models.layers import Attention")
