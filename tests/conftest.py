"""Fixtures that the whole suite shares: goldens, manifests, shared media and the device under test."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: a core each, for what they start too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "golden" / "data"


def shared_root() -> Path:
    """The folder of large reference data: `I2V_SHARED`, by default `../shared` beside the checkout."""
    return Path(os.environ.get("I2V_SHARED", ROOT.parent / "shared"))


def missing(what: str) -> NoReturn:
    """Skips the test with a reason; fails it where `I2V_REQUIRE_SHARED=1` says that the data must be there."""
    reason = f"{what}: neither in {DATA.relative_to(ROOT)} nor under {shared_root()} (set I2V_SHARED to its folder)"
    if os.environ.get("I2V_REQUIRE_SHARED") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True)
class Golden:
    """One reference file: tensors of an original implementation, loaded when asked for.

    `meta` is the JSON stored under the metadata key "golden"; files without that key give their metadata as it
    is, with values that are JSON objects decoded.
    """

    path: Path
    meta: dict[str, Any]
    _cache: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors stored under `prefix/`, without the prefix; float16 is cast to float32, other types kept."""
        if prefix not in self._cache:
            start = prefix + "/"
            found: dict[str, torch.Tensor] = {}
            with safe_open(self.path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    if key.startswith(start):
                        tensor = file.get_tensor(key)
                        found[key[len(start) :]] = tensor.float() if tensor.dtype == torch.float16 else tensor
            self._cache[prefix] = found
        return dict(self._cache[prefix])

    def weights(self, prefix: str = "weight") -> dict[str, torch.Tensor]:
        """The network's parameters; `prefix` names one of several sets, e.g. "weight_mm" or "weight/shared"."""
        found = self.group(prefix)
        if not found:
            raise KeyError(f"{self.path.name} holds no tensor under {prefix}/")
        return found

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the original implementation was given."""
        return self.group("input")

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        """What it returned."""
        return self.group("output")


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`golden("ddim")` finds the file in tests/golden/data, then under `I2V_SHARED`; absent, the test is skipped."""

    def find(name: str) -> Golden:
        for folder in (DATA, shared_root() / "goldens"):
            path = folder / f"{name}.safetensors"
            if path.is_file():
                with safe_open(path, framework="pt") as file:
                    raw = file.metadata() or {}
                meta = json.loads(raw["golden"]) if "golden" in raw else {k: _decoded(v) for k, v in raw.items()}
                return Golden(path, meta)
        return missing(f"golden {name}.safetensors")

    return find


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    """`golden_json("clip_tokenizer_ids")`: a reference file that is plain JSON (or .json.gz)."""
    return lambda name: _json(name, "goldens")


@pytest.fixture(scope="session")
def manifest() -> Callable[[str], dict[str, Any]]:
    """`manifest("mm_sd_v15_v2")["tensors"]`: key -> {shape, dtype} of a published checkpoint file."""
    return lambda name: _json(name, "manifests")


def _json(name: str, kind: str) -> Any:
    packed = DATA / ("manifests" if kind == "manifests" else ".") / f"{name}.json.gz"
    if packed.is_file():
        return json.loads(gzip.decompress(packed.read_bytes()))
    plain = shared_root() / kind / f"{name}.json"
    if plain.is_file():
        return json.loads(plain.read_text(encoding="utf-8"))
    return missing(f"{kind} {name}.json")


@pytest.fixture(scope="session")
def shared_media() -> Callable[[str], Path]:
    """`shared_media("images/bear.png")`: the path of a real picture or clip; absent, the test is skipped."""

    def find(relative: str) -> Path:
        path = shared_root() / "media" / relative
        return path if path.exists() else missing(f"media {relative}")

    return find


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test: `I2V_TEST_DEVICE`, by default the CPU. Comparisons want float32, not TF32."""
    chosen = torch.device(os.environ.get("I2V_TEST_DEVICE", "cpu"))
    if chosen.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return chosen


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's root."""
    return ROOT


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own operations on the CPU, for bounds that another order of sums would pass by a little.

    That the quicker ones (i2v/models/cpu.py) give the same to 1e-5 is held by tests/models/test_cpu.py.
    """
    monkeypatch.setattr("i2v.models.cpu.applies", lambda x: False)
