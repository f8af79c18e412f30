"""The networks of the paper's metrics, from the files that a user has; without one, its column stays empty."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.clip_network import CLIP, load_clip
from eval.dover.load import load_dover
from eval.dover.network import DOVER
from eval.flow_networks import Raft
from eval.raft.load import load_raft
from i2v.config import flag
from i2v.device import pick_device
from i2v.hashes import sha256


@dataclass(frozen=True)
class NetworkFiles:
    """Where the weights lie."""

    raft: Path | None = flag(None, "FlowScore, WarpingError: raft-things.pth, or torchvision's raft_large_C_T_V1")
    dover: Path | None = flag(None, "DoverVQA: DOVER.pth")
    aesthetic: bool = flag(False, "DOVER's aesthetic branch too")
    clip: Path | None = flag(None, "CLIPTemp, text alignment: OpenAI's ViT-B-32.pt, or transformers' folder")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")

    def given(self) -> dict[str, Path]:
        """The files by flag."""
        return {name: file for name in ("raft", "dover", "clip") if (file := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Networks:
    """Loaded; None: not given. `names`: what each is. `sha256`: of their files. `device`: the kind that they run on."""

    raft: Raft | None
    dover: DOVER | None
    clip: CLIP | None
    names: dict[str, str]
    sha256: dict[str, str]
    device: str = "cpu"


@functools.lru_cache(maxsize=1)
def open_networks(files: NetworkFiles) -> Networks:
    """Reads every file that is given, once per process.

    Raises OSError for a file that is not there and ValueError for one that holds something else.
    """
    device = pick_device(files.device)
    if device.type == "cuda":  # TF32, PyTorch's default for convolutions, keeps 10 bits
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    raft = None if files.raft is None else Raft(load_raft(files.raft).to(device))
    dover = None if files.dover is None else load_dover(files.dover, files.aesthetic).to(device)
    clip = None if files.clip is None else load_clip(files.clip)
    if clip is not None:
        clip.image.to(device)
        clip.text.to(device)
    names = {} if raft is None else {"raft": raft.name}
    names |= {} if dover is None else {"dover": "DOVER"}
    names |= {} if clip is None else {"clip": clip.name}
    hashes = {name: sha256(file) for name, file in files.given().items()}
    return Networks(raft, dover, clip, names, hashes, device.type)
