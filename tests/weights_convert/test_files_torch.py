"""torch's own files: checkpoints of every kind of training tool give their tensors, and cost only what is used."""

from __future__ import annotations

import argparse
import subprocess
import sys
import types
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teaching import refused
from torch import nn

from weights_convert import files

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.float16)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A package of that name, as the machine had that saved the file; gone again when the file is read."""
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "omegaconf")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for module, name in (("pytorch_lightning.callbacks", "ModelCheckpoint"), ("omegaconf", "DictConfig")):
        setattr(modules[module], name, type(name, (), {"__module__": module}))
    yield modules["pytorch_lightning"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_lightning_checkpoint(
    tmp_path: Path, lightning: types.ModuleType, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = sys.modules["pytorch_lightning.callbacks"].ModelCheckpoint
    settings = sys.modules["omegaconf"].DictConfig()
    settings.content = {"lr": 1e-4}
    path = tmp_path / "sd.ckpt"
    content = {
        "state_dict": OrderedDict(TENSORS),
        "callbacks": {checkpoint: {"best_model_score": torch.tensor(1.0), "best": Path("x.ckpt")}},
        "hyper_parameters": argparse.Namespace(lr=1e-4, betas=(0.9, 0.99), name="x"),
        "config": settings,
        "lr_schedulers": [{"milestones": Counter([3, 4]), "base": np.float64(0.1), "history": np.arange(3)}],
        "optimizer_states": [
            {"state": defaultdict(dict, {0: {"exp_avg": torch.ones(2)}}), "rng": torch.get_rng_state()}
        ],
        "numpy_rng": np.random.RandomState(0).get_state(),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "loops": {
            "set": {1, 2},
            "frozen": frozenset("ab"),
            "big": 2**70,
            "none": None,
            "bytes": b"x",
            "text": "ü" * 300,
            "types": [int, str, float, range(3), defaultdict(int)],  # by protocol 2: long, unicode, xrange
        },
        "epoch": 3,
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "omegaconf"):
        monkeypatch.delitem(sys.modules, name)
    tensors, metadata = files.read(path)
    assert same(tensors, TENSORS)
    assert metadata["wrapper"] == "state_dict" and "optimizer_states" in metadata["ignored"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_protocols_and_kinds_of_tensors(tmp_path: Path, protocol: int, zipped: bool) -> None:
    base = torch.arange(24.0)
    net = nn.Linear(3, 2)
    tensors = {
        "rows": base[6:12].view(2, 3),
        "transposed": base.view(4, 6).T,
        "parameter": nn.Parameter(base.view(2, 12)),
        "frozen": nn.Parameter(base[:2], requires_grad=False),
        "scalar": torch.tensor(3),
        "nothing": torch.zeros(0, 5),
        "bfloat16": torch.tensor([1.5]).bfloat16(),
        "uint16": torch.tensor([7], dtype=torch.uint16),
        **{str(d): torch.tensor([1, 0]).to(d) for d in (torch.float64, torch.int32, torch.int16, torch.bool)},
        **{f"net.{k}": v for k, v in net.state_dict().items()},
    }
    path = tmp_path / "x.pt"
    torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found, _ = files.read(path)
    assert same(found, {k: v.detach() for k, v in tensors.items()})
    assert not any(t.requires_grad for t in found.values())


def repacked(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, data in members.items():
            out.writestr(name, data)
    return path


@pytest.mark.parametrize("root", ["archive", "v1-5-pruned", "名前", ""])
def test_the_root_of_an_archive_has_any_name(tmp_path: Path, root: str) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old:
        members = {(root + "/").lstrip("/") + n.split("/", 1)[1]: old.read(n) for n in old.namelist()}
    assert same(files.read(repacked(tmp_path / "renamed.ckpt", members))[0], TENSORS)


def test_one_storage_in_two_number_formats_is_refused(tmp_path: Path) -> None:
    """torch's own reader takes the first format for both; each would see another number."""
    torch.save({"a": torch.ones(4), "b": torch.ones(4, dtype=torch.int32)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old:
        members = {name: old.read(name) for name in old.namelist()}
    pickle = next(name for name in members if name.endswith("data.pkl"))
    assert members[pickle].count(b"X\x01\x00\x00\x001") == 1
    members[pickle] = members[pickle].replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000")
    refused(repacked(tmp_path / "y.pt", members), "storage 0 in two number formats")


def test_state_dict_of_a_module_has_no_metadata_among_its_tensors(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    torch.save(net.state_dict(), tmp_path / "x.pt")
    assert same(files.read(tmp_path / "x.pt")[0], dict(net.state_dict()))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.ones(2, 3, dtype=torch.float16))
        self.blocks = nn.Sequential(nn.Linear(2, 2).half(), nn.ReLU(), nn.LayerNorm(2))
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x.half()).float() @ self.proj.float()


def test_torchscript_archives_give_their_state_dict(tmp_path: Path) -> None:
    """OpenAI's CLIP files: code and constants stay unread, names are the paths of the modules."""
    tower = Tower()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(tower).save(tmp_path / "ViT.pt")
    tensors, metadata = files.read(tmp_path / "ViT.pt")
    assert same(tensors, {k: v.detach() for k, v in tower.state_dict().items()})
    assert metadata["wrapper"] == "TorchScript"


# --- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import pathlib, sys
from weights_convert import files
status = pathlib.Path("/proc/self/status")
for path in sys.argv[1:]:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is in use
    before = int(status.read_text().split("VmHWM:")[1].split()[0])
    tensors, _ = files.read(path)
    total = sum(t.sum().item() for t in tensors.values())
    peak = int(status.read_text().split("VmHWM:")[1].split()[0]) - before
    print(peak * 1024, sum(t.nbytes for t in tensors.values()), total)
    del tensors
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_optimizer_states_are_not_read(tmp_path: Path) -> None:
    """An optimiser of twice the model's size costs nothing: the peak is the model (and torch's code as it is used)."""
    model = {f"layer{i}": torch.full((1 << 18,), float(i)) for i in range(32)}  # 1 MiB each
    states = [{k: {"exp_avg": torch.ones(1 << 18), "exp_avg_sq": torch.ones(1 << 18)} for k in model}]
    content = {"optimizer_states": states, "state_dict": model}
    paths = [tmp_path / "zip.ckpt", tmp_path / "legacy.ckpt"]
    for path in paths:
        torch.save(content, path, _use_new_zipfile_serialization=path == paths[0])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    for line in lines:
        peak, payload, total = (float(x) for x in line.split())
        assert payload == 32 * 2**20 and total == (1 << 18) * sum(range(32))
        assert peak < 1.15 * payload + 8 * 2**20, f"{peak / 2**20:.0f} MiB for {payload / 2**20:.0f} MiB of weights"


def test_a_dict_inside_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": torch.ones(1)}
    content["state_dict"] = content
    torch.save(content, tmp_path / "x.pt")
    assert files.read(tmp_path / "x.pt")[0]["a"].tolist() == [1]
    torch.save({1: torch.ones(1), "1": torch.ones(2)}, tmp_path / "y.pt")
    refused(tmp_path / "y.pt", "two tensors named 1")


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("what", ["quantised", "sparse", "meta", "conjugated"])
def test_tensors_that_are_no_plain_numbers(tmp_path: Path, what: str) -> None:
    tensor = {
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "sparse": lambda: torch.ones(2, 2).to_sparse(),
        "meta": lambda: torch.ones(2, device="meta"),
        "conjugated": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    }[what]()
    torch.save({"a": tensor}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt")
