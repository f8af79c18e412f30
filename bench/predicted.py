"""Memory as `--dry-run` predicts it beside what a run takes at most: `python -m bench.predicted` (Linux).

Each setting is a run of sample.py with one step, in a fresh process, on a whole model of Stable Diffusion 1.5's size
made of random numbers (bench/whole_set.py, 4.4 GB in bfloat16). No setting was used to make the prediction.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.whole_set import PICTURE, ROOT, fresh, make

SETTINGS: dict[str, tuple[str, ...]] = {  # plan, frames, side, number format, other flags
    "1": ("full", "8", "256", "bfloat16"),
    "2": ("lean", "16", "256", "bfloat16"),
    "3": ("low", "16", "256", "bfloat16"),
    "4": ("least", "16", "256", "bfloat16"),
    "5": ("lean", "16", "256", "bfloat16", "--deep-every", "2"),
    "6": ("lean", "4", "256", "float32"),
    "7": ("least", "8", "256", "float32"),
    "8": ("lean", "8", "512", "bfloat16"),
    "9": ("least", "16", "512", "bfloat16"),
    "10": ("lean", "16", "512", "bfloat16"),
    "11": ("lean", "4", "256", "bfloat16", "--int8"),
}


def compare(folder: Path, plan: str, frames: str, side: str, dtype: str, *more: str) -> tuple[float, float]:
    """GB predicted and measured."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "sample.py", "--preset", "i2v-sd15", "--weights", str(folder / "own"), "--image",
                   str(PICTURE), "--memory", plan, "--num-frames", frames, "--height", side, "--width", side, "--steps",
                   "1", "--dtype", dtype, *more, "--output", f"{place}/x.mp4"]  # fmt: skip
        said = re.search(r"^peak ([\d.]+) GB", fresh([*command, "--dry-run"])[2], re.M)
        if said is None:
            raise RuntimeError("sample.py --dry-run told no peak")
        return float(said[1]), fresh(command)[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.predicted", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("setting", nargs="*", default=list(SETTINGS), help=f"of {', '.join(SETTINGS)}; default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/bench/sd15-bfloat16", help="of the model")
    given = parser.parse_args(argv)
    make(given.folder, torch.bfloat16)
    print("| plan | video | number format | predicted | measured | off by |\n|---|---|---|---|---|---|")
    for name in given.setting:
        plan, frames, side, dtype, *more = SETTINGS[name]
        said, held = compare(given.folder, plan, frames, side, dtype, *more)
        video = f"{frames} x {side}x{side} {' '.join(more)}".strip()
        print(f"| {plan} | {video} | {dtype} | {said:.2f} GB | {held:.2f} GB | {said / held - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
