"""Does a full-size SDXL pipeline fit, and how long is a step? `python -m bench.sdxl` (Linux; 10 GB of disk).

Writes every part of `--preset i2v-sdxl` at its full size with random numbers in bfloat16, one after the other, then, in
a fresh process, loads the folder as a user's is loaded, makes one denoising step of a video and decodes a frame. What
comes out is noise; measured are the time of each stage and the memory of the process at most, beside the prediction.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.load import memory as memory_of
from i2v import assemble, memory, picture
from i2v.assemble import ModelFiles
from i2v.diffusion.schedule import ANIMATEDIFF_SDXL
from i2v.free_memory import keep_freed_memory, used_bytes
from i2v.load import build
from i2v.memory_plans import LEAN, PLANS
from i2v.models.clip_text import CLIP_L, OPENCLIP_BIGG
from i2v.models.clip_vision import VIT_H14
from i2v.models.ip_adapter import IP_PLUS_SDXL_VIT_H
from i2v.models.motion import MOTION_SDXL
from i2v.models.unet import SDXL
from i2v.models.vae import SDXL_VAE
from i2v.networks import networks
from i2v.parts import save_part
from i2v.request import Request
from weights_convert.own_format import clip_tokenizer, write_text

CONFIGS = {
    "unet": SDXL, "vae": SDXL_VAE, "text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIGG, "image_encoder": VIT_H14,
    "image_projection": IP_PLUS_SDXL_VIT_H, "motion": MOTION_SDXL, "i2v_adapter": None, "ip_adapter": None,
}  # fmt: skip


def write(folder: Path) -> None:
    """All parts, as small random numbers around what leaves a layer's scale alone."""
    built, total = networks(CONFIGS), 0
    files = {name: [name] for name in built.slots if name != "image_projection"}
    files["ip_adapter"] = ["ip_adapter", "image_projection"]
    generator = np.random.default_rng(0)
    for name, parts in files.items():
        tensors = {}
        for part in parts:
            start = "image_proj." if part == "image_projection" else ""
            for key, like in built.shapes(part).items():
                drawn = random(like.shape, generator)
                tensors[start + key] = drawn + 1 if like.ndim == 1 and key.endswith("weight") else drawn
        config = CONFIGS["image_projection"] if name == "ip_adapter" else CONFIGS[name]
        extra = {"schedule": ANIMATEDIFF_SDXL} if name == "motion" else {}
        save_part(folder / f"{name}.safetensors", tensors, config, dtype=torch.bfloat16, family="sdxl", **extra)
        count = sum(tensor.numel() for tensor in tensors.values())
        total += count
        print(f"{name:16} {count:>14,} parameters", flush=True)
    for name, text in clip_tokenizer(CLIP_L).items():
        write_text(folder / name, text)
    print(f"{'together':16} {total:>14,} parameters", flush=True)


def random(shape: torch.Size, generator: np.random.Generator) -> torch.Tensor:
    """Numbers of 1/64 to 1/32, of either sign, bfloat16: random bits under a fixed exponent, ten times as fast."""
    bits = np.frombuffer(bytearray(generator.bytes(2 * shape.numel())), np.int16)
    return torch.from_numpy((bits & np.int16(-0x7F81)) | np.int16(0x3C80)).view(torch.bfloat16).reshape(shape)


@torch.inference_mode()
def step(folder: Path, frames: int, side: int, guidance: float, how: str) -> None:
    """One step of a video, in this process, which has done nothing else before."""
    began = time.perf_counter()

    def told(what: str) -> None:
        nonlocal began
        now = time.perf_counter()
        print(f"{what:52} {now - began:7.1f} s, at most {memory_of('VmHWM') / 1e9:5.2f} GB so far", flush=True)
        began = now

    keep_freed_memory(PLANS[how].freed != "at once")
    plan, cpu = assemble.plan(ModelFiles(preset="i2v-sdxl", weights=folder)), torch.device("cpu")
    photo = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    request = Request("a cat", steps=1, num_frames=frames, height=side, width=side, guidance_scale=guidance)
    request = request.resolved(plan.preset, photo.shape[:2], MOTION_SDXL.max_frames, SDXL_VAE.factor)
    stages = memory.predict(plan, request, PLANS[how], torch.bfloat16, cpu)
    print(memory.table(stages, used_bytes(), memory.rate(torch.bfloat16, cpu) * memory.EFFICIENCY), "\n")
    began = time.perf_counter()
    pipe = build(plan, cpu, torch.bfloat16, memory=PLANS[how])
    told("loaded and built")
    known = pipe.known_frames({0: picture.fit(photo, side, side)}, request)
    told("the picture through the VAE")
    conditions = pipe.conditions(photo, request)
    told("prompts and picture through three encoders")
    latents = pipe.denoise(known, conditions, request)
    told(f"one step of {frames} frames of {side}x{side}, guidance {guidance:g}")
    frame = pipe.decode(latents[:, :1])
    told("a frame decoded")
    fine = bool(torch.isfinite(latents).all() and torch.isfinite(frame).all())
    print(f"latents {tuple(latents.shape)}, a frame {tuple(frame.shape)}, {'all' if fine else 'NOT all'} finite")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sdxl", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the parts are kept; not given: a temporary folder")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="over 1: two calls of the UNet")
    parser.add_argument("--memory", choices=list(PLANS), default=LEAN.name, help="sample.py takes lean on a CPU")
    parser.add_argument("--step", action="store_true", help="the step alone, in this process; --folder is there")
    args = parser.parse_args()
    if args.step:
        step(args.folder, args.frames, args.side, args.guidance_scale, args.memory)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "merges.txt").is_file():
            keep_freed_memory(False)
            write(folder)
        command = [sys.executable, "-m", "bench.sdxl", "--step", "--folder", str(folder)]
        command += ["--frames", str(args.frames), "--side", str(args.side)]
        command += ["--guidance-scale", str(args.guidance_scale), "--memory", args.memory]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
