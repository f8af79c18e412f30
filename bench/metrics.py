"""`python -m bench.metrics`: what FlowScore, WarpingError, DoverVQA, CLIPTemp and text alignment cost for one clip.

Networks have random weights, which cost what the published ones cost; their results mean nothing and are not printed.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from eval.clip_network import CLIP
from eval.dover.convnext import ConvNeXtConfig
from eval.dover.network import DOVER, DOVERConfig
from eval.flow_networks import Dis, Raft
from eval.metrics.clip_temp import clip_temp
from eval.metrics.dover_vqa import dover_vqa
from eval.metrics.flow_score import flow_score
from eval.metrics.text_alignment import text_alignment
from eval.metrics.warping_error import warping_error
from eval.raft.network import RAFT
from i2v.models.clip_text import CLIPTextModel
from i2v.models.clip_vision import VIT_B32, CLIPVisionModel
from weights_convert.layouts.clip import CLIP_B32


def ready(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def metrics(frames: np.ndarray) -> dict[str, Callable[[], object]]:
    """Name -> a call; every network is held at once, as an evaluation holds them."""
    raft, dover = Raft(ready(RAFT())), ready(DOVER(DOVERConfig(aesthetic=ConvNeXtConfig())))  # type: ignore[arg-type]
    clip = CLIP(ready(CLIPVisionModel(VIT_B32)), ready(CLIPTextModel(CLIP_B32)), "CLIP ViT-B/32")  # type: ignore[arg-type]
    return {
        "text alignment": lambda: text_alignment(frames, clip, "a red ball moves left"),
        "CLIPTemp": lambda: clip_temp(frames, clip, frames[0]),
        "FlowScore, DIS": lambda: flow_score(frames, Dis()),
        "WarpingError, DIS": lambda: warping_error(frames, Dis()),
        "DoverVQA, both branches": lambda: dover_vqa(frames, dover),  # type: ignore[arg-type]
        "WarpingError, RAFT": lambda: warping_error(frames, raft),
        "FlowScore, RAFT": lambda: flow_score(frames, raft),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    args = parser.parse_args()
    shape = (args.frames, args.size, args.size, 3)
    frames = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    print(f"{args.frames} frames of {args.size} x {args.size}, {torch.get_num_threads()} threads\n")
    print("| metric | seconds | processor seconds | memory so far, MB |\n|---|---|---|---|")
    for name, run in tqdm(metrics(frames).items(), desc="metrics", disable=None):
        wall, busy = time.perf_counter(), time.process_time()
        run()
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB
        tqdm.write(f"| {name} | {wall:.1f} | {busy:.1f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
