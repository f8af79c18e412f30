"""A whole model of Stable Diffusion 1.5's size on the disk, loaded and run by us and by diffusers (Linux).

    python -m bench.whole_set --folder outputs/sd15 --dtype float32      # makes it: 8.7 GB for each side

`own` holds our part files, `diffusers` the same numbers as diffusers' folder (written by weights_convert), random ones:
UNet, AnimateDiff v2, IP-Adapter, CLIP ViT-H/14 and ViT-L/14, VAE; `own` also an I2V-Adapter, which diffusers does not
have. What they make is noise. `bench.speed`'s rows load-... and run-... start this file in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.load import memory
from i2v import assemble
from i2v.assemble import ModelFiles
from i2v.diffusion.schedule import ANIMATEDIFF_SD15
from i2v.load import build
from i2v.models.clip_text import CLIP_L
from i2v.models.clip_vision import VIT_H14
from i2v.models.ip_adapter import IP_SD15
from i2v.models.motion import MOTION_V2
from i2v.models.unet import SD15
from i2v.models.vae import SD_VAE
from i2v.networks import networks
from i2v.parts import save_part
from weights_convert.own_format import clip_tokenizer, write_text

ROOT = Path(__file__).resolve().parents[1]
PICTURE, PROMPT = ROOT / "examples/red_ball.png", "a red ball moves left over a blue sky"
CONFIGS = {
    "unet": SD15, "vae": SD_VAE, "text_encoder": CLIP_L, "image_encoder": VIT_H14, "image_projection": IP_SD15,
    "motion": MOTION_V2, "i2v_adapter": None, "ip_adapter": None,
}  # fmt: skip


def make(folder: Path, dtype: torch.dtype) -> None:
    """Both sides' files, unless they are there."""
    own, theirs = folder / "own", folder / "diffusers"
    if not (own / "merges.txt").is_file():
        built, generator = networks(CONFIGS), torch.Generator().manual_seed(0)
        files = {name: [name] for name in built.slots if name != "image_projection"}
        files["ip_adapter"] = ["ip_adapter", "image_projection"]
        for name, parts in files.items():
            tensors = {}
            for part in parts:
                start = "image_proj." if part == "image_projection" else ""
                for key, like in built.shapes(part).items():
                    tensors[start + key] = drawn(key, like.shape, generator).to(dtype)
            config = CONFIGS["image_projection"] if name == "ip_adapter" else CONFIGS[name]
            extra = {"schedule": ANIMATEDIFF_SD15} if name == "motion" else {}
            save_part(own / f"{name}.safetensors", tensors, config, dtype=dtype, family="sd15", **extra)
        for name, text in clip_tokenizer(CLIP_L).items():
            write_text(own / name, text)
    if not (theirs / "model_index.json").is_file():
        parts = ["unet", "vae", "text_encoder", "image_encoder", "motion", "ip_adapter"]
        command = [sys.executable, "-m", "weights_convert", "convert", str(own), str(theirs), "--to", "diffusers"]
        subprocess.run([*command, "--overwrite", "--parts", *parts], check=True, cwd=ROOT)


def drawn(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """What keeps the variance: uniform matrices, norms of 1, biases of 0."""
    if len(shape) < 2:
        return torch.full(shape, float("norm" in key and key.endswith("weight")))
    bound = (3 / shape[1:].numel()) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def touched(modules: Sequence[Any]) -> int:
    """Every page of every tensor read; their bytes."""
    total = 0
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            flat = tensor.detach().reshape(-1).view(torch.uint8)
            flat[::4096].sum().item()
            total += flat.numel()
    return total


def diffusers_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """AnimateDiff with IP-Adapter, as its documentation loads it."""
    from diffusers import AnimateDiffPipeline, MotionAdapter
    from transformers import CLIPVisionModelWithProjection

    motion = MotionAdapter.from_pretrained(folder / "motion_adapter", torch_dtype=dtype)
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", torch_dtype=dtype)
    pipe = AnimateDiffPipeline.from_pretrained(
        folder, motion_adapter=motion, image_encoder=encoder, torch_dtype=dtype, feature_extractor=None
    )
    pipe.load_ip_adapter(folder, subfolder="ip_adapter", weight_name="ip-adapter.safetensors",
                         image_encoder_folder=None)  # fmt: skip
    return pipe


def load(folder: Path, side: str, dtype: torch.dtype) -> dict[str, float]:
    """One load in this process: seconds, GB above what was there before, GB of tensors. Libraries are there before."""
    if side == "diffusers":
        import diffusers.pipelines.animatediff  # noqa: F401
        import transformers.models.clip  # noqa: F401
    before, began = memory("VmRSS"), time.perf_counter()
    if side == "diffusers":
        pipe = diffusers_pipeline(folder / "diffusers", dtype)
        networks = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.image_encoder]
    else:
        mine = build(assemble.plan(ModelFiles("i2v-sd15", folder / "own")), "cpu", dtype)
        networks = [mine.unet, mine.vae, mine.text_encoder, mine.image_encoder, mine.image_projection]
    size = touched(networks)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "GB": (memory("VmHWM") - before) / 1e9, "GB of tensors": size / 1e9}


def run_diffusers(folder: Path, dtype: torch.dtype, frames: int, size: int, steps: int) -> None:
    """Picture and prompt to a file; everything that is not given is diffusers' default."""
    from diffusers import DDIMScheduler
    from diffusers.utils import export_to_gif, load_image

    pipe = diffusers_pipeline(folder / "diffusers", dtype)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear", clip_sample=False,
                                               timestep_spacing="linspace", steps_offset=1)  # fmt: skip
    pipe.set_ip_adapter_scale(1.0)
    made = pipe(PROMPT, num_frames=frames, height=size, width=size, num_inference_steps=steps,
                ip_adapter_image=load_image(str(PICTURE)))  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        export_to_gif(made.frames[0], f"{place}/x.gif")


def fresh(command: Sequence[str]) -> tuple[float, float, str]:
    """Seconds of a process, GB that it held at most, and what it printed; raises RuntimeError where it fails."""
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        out = process.stdout.read() if process.stdout is not None else ""
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - began, 1024 * used.ru_maxrss / 1e9, out


def this(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "bench.whole_set", "--folder", str(folder), *more]


def measure_load(folder: Path, dtype: str, repeats: int) -> dict[str, Any]:
    """Medians of fresh processes in turn, after a round that fills the system's cache."""
    make(folder, getattr(torch, dtype))
    found: dict[str, list[dict[str, float]]] = {"diffusers": [], "ours": []}
    for _ in range(repeats + 1):
        for side, runs in found.items():
            runs.append(json.loads(fresh(this(folder, "--dtype", dtype, "--load", side))[2].splitlines()[-1]))
    times = {side: statistics.median(run["seconds"] for run in runs[1:]) for side, runs in found.items()}
    peaks = {side: max(run["GB"] for run in runs) for side, runs in found.items()}
    size = {side: runs[0]["GB of tensors"] for side, runs in found.items()}
    return {"seconds": times, "ratio": times["diffusers"] / times["ours"], "GB": peaks, "GB of tensors": size}


def measure_run(folder: Path, frames: int, size: int, steps: int, repeats: int, more: Sequence[str]) -> dict[str, Any]:
    """A whole run of each side's defaults in fresh processes, in turn; `more`: flags of sample.py."""
    make(folder, torch.float32)
    sizes = ["--num-frames", str(frames), "--height", str(size), "--width", str(size), "--steps", str(steps)]
    found: dict[str, list[tuple[float, float, str]]] = {"diffusers": [], "ours": []}
    with tempfile.TemporaryDirectory() as place:
        ours = [sys.executable, "sample.py", "--preset", "i2v-sd15", "--weights", str(folder / "own"), "--image",
                str(PICTURE), "--prompt", PROMPT, *sizes, "--output", f"{place}/x.mp4", "--overwrite",
                *more]  # fmt: skip
        theirs = this(folder, "--dtype", "float32", "--run", "diffusers", *sizes)
        for _ in range(repeats):
            found["diffusers"].append(fresh(theirs))
            found["ours"].append(fresh(ours))
    times = {side: statistics.median(run[0] for run in runs) for side, runs in found.items()}
    peaks = {side: max(run[1] for run in runs) for side, runs in found.items()}
    return {"seconds": times, "ratio": times["diffusers"] / times["ours"], "GB": peaks, "steps": steps}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the files are, or are made")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--load", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=["diffusers"], help=argparse.SUPPRESS)
    for name, value in (("num-frames", 4), ("height", 256), ("width", 256), ("steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=value, help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.load:
        with torch.inference_mode():
            print(json.dumps(load(args.folder, args.load, dtype)))
    elif args.run:
        run_diffusers(args.folder, dtype, args.num_frames, args.height, args.steps)
    else:
        make(args.folder, dtype)


if __name__ == "__main__":
    main()
