"""Picture and prompt -> video: `python sample.py --image cat.png --prompt "the cat moves left"`."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

STOPPED = "sample.py: stopped; no half-written file is left"


def stop_at_once(*_: object) -> None:
    """Ctrl-C while torch is imported, which takes seconds and would end in Python's traceback."""
    os.write(2, f"\n{STOPPED}\n".encode())
    os._exit(130)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_at_once)

from i2v import assemble, load, presets, replay
from i2v.assemble import ModelFiles
from i2v.config import ConfigError, flag, from_command_line, from_dict
from i2v.diffusion.frame_similarity_prior import timesteps_from
from i2v.request import Request
from i2v.video import check_output, read_image, settings_beside, write_video


@dataclass(frozen=True)
class SampleConfig(ModelFiles, Request):
    """Make a video from a picture and a prompt."""

    image: Path | None = flag(None, "the picture that the video begins with", "-i", "--first-frame-path",
                              "--image-path", "--input", "--input-image", "--img")  # fmt: skip
    output: Path | None = flag(None, "the video: .mp4, .gif, .webp or a folder of .png; not given: <image>_<seed>.mp4",
                               "-o", "--out", "--output-path", "--save-path", "--save-file")  # fmt: skip
    overwrite: bool = flag(False, "replace the output if it exists")
    release: bool = flag(False, "every setting as in the authors' script, but for those that you give")
    from_: Path | None = flag(None, "make this video again, from the settings inside it; other flags change them")
    check: bool = flag(False, "tell which weight files are found, missing, and fit together; make nothing")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = flag("auto", "number format of the networks",
                                                                    "--precision")  # fmt: skip
    decode_chunk: int = flag(8, "frames that the VAE decodes at once", "--decode-chunk-size")
    guidance_in_turn: bool = flag(False, "run the two halves of guidance one after the other: less memory")


def parse(argv: Sequence[str] | None) -> tuple[SampleConfig, replay.Recipe | None]:
    """The config, and the recipe of the video that `--from` names."""
    cfg = from_command_line(SampleConfig, argv, "sample.py")
    recipe = replay.recipe(cfg.from_) if cfg.from_ is not None else None
    base = recipe.flags() if recipe else {}
    from_dict(SampleConfig, base, f"--from {cfg.from_}")
    if cfg.release:
        base |= presets.released_settings()
    return (from_command_line(SampleConfig, argv, "sample.py", base) if base else cfg), recipe


def output_of(cfg: SampleConfig, image: Path) -> Path:
    """The given output, or <image>_<seed>.mp4 here, with the first free number appended where that exists."""
    if cfg.output is not None:
        return check_output(cfg.output, cfg.overwrite, cfg.fps)
    target = Path(f"{image.stem}_{cfg.seed}.mp4")
    number = 1
    while not cfg.overwrite and (target.exists() or settings_beside(target).exists()):
        number += 1
        target = Path(f"{image.stem}_{cfg.seed}_{number}.mp4")
    return check_output(target, cfg.overwrite)


def run(argv: Sequence[str] | None = None) -> int:
    """Everything that can be wrong is looked at before the weights are read; returns the exit code."""
    cfg, recipe = parse(argv)
    files = ModelFiles(**{f.name: getattr(cfg, f.name) for f in fields(ModelFiles)})
    if cfg.check:
        plan = assemble.plan(files)
        print(plan.report())
        return 0 if plan.complete else 2
    if cfg.image is None:
        if recipe is None:
            raise ConfigError("--image is missing: the picture that the video begins with")
        made_from = recipe.settings["picture"].get("file") or "a picture without a name"
        raise ConfigError(f"{cfg.from_} was made from {made_from}, which is not there; give it with --image")
    if cfg.decode_chunk < 1:
        raise ConfigError(f"--decode-chunk {cfg.decode_chunk}: expected at least 1 frame")
    picture = read_image(cfg.image)
    plan = assemble.plan(files)
    plan.refuse()
    motion, vae = plan.parts["motion"].config, plan.parts["vae"].config
    request = Request(**{f.name: getattr(cfg, f.name) for f in fields(Request)})
    full = request.resolved(plan.preset, picture.shape[:2], motion.max_frames, vae.factor)
    timesteps_from(plan.schedule, full.steps, float(full.t0 or 0))
    output = output_of(cfg, cfg.image)

    pipe = load.build(plan, cfg.device, cfg.dtype, progress=True)
    pipe.decode_chunk, pipe.guidance_in_turn = cfg.decode_chunk, cfg.guidance_in_turn
    for facts in pipe.weights.values():
        if "layers" in facts:
            print(f"LoRA {facts['file']}: {facts['layers']} layers changed, scale {facts['scale']:g}")
    print(f"{cfg.image} -> {full.num_frames} frames of {full.width}x{full.height}, seed {full.seed}, "
          f"{plan.preset.name} on {pipe.device.type}")  # fmt: skip
    result = pipe.run(cfg.image, request, progress=True)
    written = write_video(output, result.frames, result.fps, result.settings, overwrite=cfg.overwrite)
    print(f"{written.path} ({written.codec})" + (f"; {written.note}" if written.note else ""))
    psnr, shift = result.drift["first_frame_psnr"], result.drift["last_color_shift"]
    first = "is your picture" if psnr is None else f"{psnr:.1f} dB from your picture"
    print(f"frame 0 {first}; mean colour of the last frame {shift:.1f} delta E from the first (2 is just visible)")
    if recipe is not None:
        lines = recipe.differences(result.settings)
        print("made as recorded" if not lines else "not as recorded:\n  " + "\n  ".join(lines))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake that the user can put right, 130 for Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="sample.py: %(message)s")
    try:
        return run(argv)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        # only CUDA has an error type of its own; on the CPU and on MPS the words tell
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        return fail("out of memory; try --guidance-in-turn, --decode-chunk 1, fewer frames or a smaller size")
    except (ValueError, OSError) as error:  # the errors that this project raises for what users gave
        return fail(" ".join(str(error).split()))


def fail(message: str) -> int:
    print(f"sample.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
