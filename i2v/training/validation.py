"""What is measured during training: the loss at fixed timesteps and noise; videos of fixed captions and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from i2v import noise
from i2v.data.world import WORLDS, WorldConfig
from i2v.device import Overflow, autocast, place
from i2v.diffusion.guidance import Condition, guide
from i2v.diffusion.samplers import SAMPLERS
from i2v.presets import PRESETS
from i2v.training.batches import Batch, Batches
from i2v.training.clips import RunClips
from i2v.training.networks import Conditions, Networks
from i2v.training.settings import Training
from i2v.video import write_video

TIMESTEPS = (200, 400, 600, 800, 950)
MOST = 32  # clips that the loss is measured on
STEPS = 25  # of the sampler, for videos from noise
LossOf = Callable[[Training, Networks, Batch], Tensor]


def held_out(cfg: Training, networks: Networks, clips: RunClips) -> Batches:
    """What `validate` measures on: the same for every run on these clips, nothing dropped."""
    own = replace(cfg, drop_text=0.0, drop_image=0.0, drop_both=0.0, seed=1, workers=0)
    return Batches(own, clips.held_out, networks, each_once=cfg.data is not None)


def other_motion(world: WorldConfig, caption: str, turn: int) -> str:
    """The caption with another motion of the world in its place; `turn` picks which."""
    (now,) = (m for m in world.motions if m in caption)
    others = [m for m in world.motions if m != now]
    return caption.replace(now, others[turn % len(others)])


def others(cfg: Training, captions: list[str]) -> list[str] | None:
    """Captions that are wrong: with another motion of the world, or each the next one that reads otherwise; None where
    all are alike."""
    if cfg.data is None:
        return [other_motion(WORLDS[cfg.world], caption, k) for k, caption in enumerate(captions)]
    if set(captions) == {captions[0]}:
        return None
    return [next(c for c in captions[k:] + captions[:k] if c != caption) for k, caption in enumerate(captions)]


@torch.no_grad()
def validate(cfg: Training, networks: Networks, data: Batches, loss_of: LossOf) -> dict[str, float]:
    """`val_T`: the loss at timestep T. `gap_T`: how much worse it is under a caption that asks for something else, the
    first sign that words move the picture (0 = what the caption says is ignored)."""
    row: dict[str, float] = {}
    batch = data.draw(0, min(MOST, len(data.data)))
    wrong_captions = others(cfg, batch.captions) if cfg.num_frames > 1 else None
    size = cfg.micro_batch or cfg.batch // place().count
    for t in TIMESTEPS:
        at = replace(batch, timesteps=torch.full_like(batch.timesteps, t))
        right = losses_of(cfg, networks, at, loss_of, size)
        row[f"val_{t}"] = float(right.mean())
        if wrong_captions is not None:
            wrong = losses_of(cfg, networks, replace(at, captions=wrong_captions), loss_of, size)
            row[f"gap_{t}"] = float((wrong / right).mean() - 1)
    return row


def losses_of(cfg: Training, networks: Networks, batch: Batch, loss_of: LossOf, size: int) -> Tensor:
    """`loss_of`, at most `size` clips at once: validation needs no more memory than a step."""
    return torch.cat([loss_of(cfg, networks, part) for part in batch.parts(size)])


def mean_loss(row: Mapping[str, float]) -> float:
    """Of all timesteps that `validate` measured."""
    return sum(value for name, value in row.items() if name.startswith("val_")) / len(TIMESTEPS)


@torch.no_grad()
def make_videos(
    cfg: Training, networks: Networks, data: Batches, values: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter],
    step: int,
) -> dict[str, float]:  # fmt: skip
    """Videos under the captions of the first held-out clips, by the moving average `values`, in `--out`/clips; the
    seeds are the same each time. Networks that sample.py can run make them of the clips' pictures, as it does; others
    from noise, a single picture where they learn from single pictures.

    Returns, for videos of pictures, `nearer`: the squared error of the frames 2..l against the true clip, as a share of
    the error of repeating frame 1; below 1 the video is nearer to the truth than the still picture.
    """
    count = min(cfg.clips_made, len(data.data))
    if not count or networks.controlnet is not None:  # a ControlNet's pictures are made by sample.py
        return {}
    make = _of_pictures if networks.can_sample and cfg.num_frames > 1 else _from_noise
    kept = {name: parameter.detach().clone() for name, parameter in trained.items()}
    try:
        for name, parameter in trained.items():
            parameter.copy_(values[name])
        return make(cfg, networks, data, count, step)
    except Overflow:  # the run goes on: its own loss tells more
        tqdm.write(f"no validation videos at step {step}: numbers became too large; --dtype bfloat16 holds larger ones")
        return {}
    finally:
        for name, parameter in trained.items():
            parameter.copy_(kept[name])


def _of_pictures(cfg: Training, networks: Networks, data: Batches, count: int, step: int) -> dict[str, float]:
    shares = []
    with networks.pipeline() as pipe:
        for number in range(count):
            true = data.latents_of(number)[None].to(networks.device)
            caption = data.data.captions[number]
            picture = data.data.first_frame(number)
            with autocast(cfg.dtype, networks.device):
                result = pipe(picture, caption, seed=number, num_frames=cfg.num_frames, height=picture.shape[0],
                              width=picture.shape[1], guidance_scale=cfg.guidance_scale)  # fmt: skip
                truth = pipe.decode(true)
                made = torch.from_numpy(result.frames).permute(0, 3, 1, 2).float() / 127.5 - 1
            write_video(_file(cfg, step, number), result.frames, result.fps, result.settings | {"step": step},
                        overwrite=True)  # fmt: skip
            still = (truth[1:] - truth[:1]).square().mean()
            shares.append(float((truth[1:] - made[1:]).square().mean() / still.clamp(min=1e-6)))
    return {"nearer": sum(shares) / len(shares)}


def _from_noise(cfg: Training, networks: Networks, data: Batches, count: int, step: int) -> dict[str, float]:
    """Under the caption and, where a Content-Adapter is among the networks, the picture that it sees."""
    preset, schedule, frames = PRESETS[cfg.preset], networks.schedule, cfg.num_frames
    scale = preset.guidance_scale if cfg.guidance_scale is None else cfg.guidance_scale
    home = next(networks.vae.parameters()).device  # on a GPU the autoencoder rests on the CPU

    def predict(x: Tensor, t: int, told: Conditions) -> Tensor:
        timesteps = torch.full((1,), t, device=networks.device)
        return networks.predict(x.flatten(0, 1), timesteps, told, frames)[None].float()

    for number in range(count):
        caption, shape = data.data.captions[number], tuple(data.latents_of(number).shape[1:])
        with autocast(cfg.dtype, networks.device):
            seen = [None, None] if data.features is None else [data.features[[row]].to(networks.device)
                                                               for row in (-1, number)]  # fmt: skip
            told = [networks.condition([words], row) for words, row in zip(("", caption), seen)]
            model = guide(predict, [Condition("negative", told[0]), Condition("positive", told[1], scale)])
            start = noise.normal(number, "start", range(frames), 0, shape)[None].to(networks.device)
            latents = SAMPLERS["ddim"](model, start, schedule, schedule.timesteps(STEPS))[0]
            networks.vae.to(networks.device)
            pixels = torch.cat([networks.vae.decode(one) for one in latents.split(1)]).float().clamp(-1, 1).cpu()
            networks.vae.to(home)
        made = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        told_in_file = {"prompt": caption, "seed": number, "steps": STEPS, "guidance_scale": scale, "step": step}
        write_video(_file(cfg, step, number), made, cfg.fps or preset.fps, told_in_file, overwrite=True)
    return {}


def _file(cfg: Training, step: int, number: int) -> Path:
    return cfg.out / "clips" / f"step-{step:06d}-{number}.webp"
