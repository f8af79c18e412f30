"""Trains the miniature's image encoder against its text encoder: `python -m i2v.training.clip --init FOLDER`.

CLIP's contrastive loss with the text side locked: the text encoder comes from the base, where it was trained together
with the UNet, and only a linear map from its pooled output is learnt beside the image encoder. A still picture cannot
know the motion, so the captions are those of the scene without it.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from i2v import config, load
from i2v.config import flag
from i2v.data.scene import render
from i2v.data.world import WORLDS, draw_scene
from i2v.device import autocast, pick_device
from i2v.models.clip_text import CLIPTextModel
from i2v.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from i2v.models.tokenizer import Tokenizer
from i2v.parts import save_part
from i2v.picture import clip_pixels
from i2v.training import checkpoint
from i2v.training.optim import learning_rate, optimizer_tensors, restore_optimizer
from i2v.training.settings import refuse_changes

TINY_IMAGE_ENCODER = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=256,
    num_layers=3,
    num_heads=4,
    patch_size=8,
    image_size=64,
    projection_dim=128,
    activation="quick_gelu",
)


@dataclass(frozen=True)
class CLIPTraining:
    """Train the miniature's image encoder against the text encoder of --init."""

    init: Path = flag(Path("runs/tiny/image/weights"), "folder with text_encoder.safetensors, vocab.json, merges.txt")
    out: Path = flag(Path("runs/tiny/clip"), "folder for the log and image_encoder.safetensors")
    world: str = flag("level_1", "level of the procedural world")
    size: int = flag(64, "side of the pictures in pixels")
    pictures: int = flag(6000, "how many scenes are drawn beforehand")
    steps: int = flag(600, "optimizer steps")
    batch: int = flag(128, "pictures per step")
    lr: float = flag(1e-3, "peak learning rate")
    seed: int = flag(0, "seed of the weights and the order")
    device: str = flag("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1")
    save_every: int = flag(100, "steps between checkpoints")


def scenes(world: str, split: str, count: int, size: int) -> tuple[Tensor, list[str]]:
    """Pictures as CLIP's input (count, 3, size, size) and their captions without the motion."""
    pictures, captions = [], []
    for index in tqdm(range(count), desc=f"drawing {split} scenes", mininterval=2):
        scene = draw_scene(WORLDS[world], split, index)
        clip = render(scene, 2, size)
        pictures.append(clip_pixels(clip.frames[index % 2], size)[0])
        captions.append(scene.caption.replace(f" {scene.motion}", ""))
    return torch.stack(pictures), captions


class Pair(nn.Module):
    """The image encoder, a linear map from the locked text and the temperature; both sides end on the unit sphere."""

    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.image = CLIPVisionModel(TINY_IMAGE_ENCODER)
        self.text = nn.Linear(text_width, TINY_IMAGE_ENCODER.projection_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # 1 / 0.07, CLIP's start

    def logits(self, pixels: Tensor, pooled: Tensor) -> Tensor:
        """(N, 3, S, S) and (M, text width) -> similarities (N, M)."""
        image = F.normalize(self.image(pixels).image_embeds.float(), dim=-1)
        text = F.normalize(self.text(pooled).float(), dim=-1)
        return self.log_scale.exp().clamp(max=100) * image @ text.T


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy both ways; `same` (N, N) marks equal captions, which share the target."""
    target = same / same.sum(1, keepdim=True)
    return -0.5 * ((target * logits.log_softmax(1)).sum(1) + (target * logits.log_softmax(0)).sum(0)).mean()


@torch.no_grad()
def accuracy(pair: Pair, pixels: Tensor, pooled: Tensor, captions: list[str]) -> float:
    """Share of pictures whose best caption, among all different ones of the set, is their own."""
    different = sorted(set(captions))
    rows = torch.tensor([captions.index(c) for c in different])
    best = pair.logits(pixels, pooled[rows]).argmax(1).tolist()
    return sum(different[b] == c for b, c in zip(best, captions)) / len(captions)


def main(argv: list[str] | None = None) -> None:
    cfg = config.from_command_line(CLIPTraining, argv)
    device = pick_device(cfg.device)
    text_file = load.header(cfg.init / "text_encoder.safetensors")
    text_encoder = CLIPTextModel(text_file.config)
    text_encoder.load_state_dict({k: v.float() for k, v in text_file.tensors().items()})
    tokenizer = Tokenizer.from_files(*(cfg.init / n for n in load.TEXT_FILES), length=text_file.config.max_length)
    train_pixels, train_captions = scenes(cfg.world, "train", cfg.pictures, cfg.size)
    val_pixels, val_captions = scenes(cfg.world, "val", 256, cfg.size)
    with torch.no_grad():
        train_pooled = torch.cat([text_encoder(ids).pooled for ids in tokenizer.encode(train_captions).split(512)])
        val_pooled = text_encoder(tokenizer.encode(val_captions)).pooled
    number = {caption: i for i, caption in enumerate(sorted(set(train_captions)))}
    label = torch.tensor([number[c] for c in train_captions], device=device)
    train_pixels, train_pooled, val_pixels, val_pooled = (
        x.to(device) for x in (train_pixels, train_pooled, val_pixels, val_pooled)
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        pair = Pair(train_pooled.shape[1]).to(device)
    named = dict(pair.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=cfg.lr, weight_decay=0.05, fused=True)
    start, spent = 0, 0.0
    lock = checkpoint.hold(cfg.out)
    if (found := checkpoint.latest(cfg.out)) is not None:
        tensors, facts = checkpoint.load(found)
        refuse_changes(cfg, facts.get("config", {}), found)
        pair.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        restore_optimizer(optimizer, named, {k[6:]: v for k, v in tensors.items() if k.startswith("optim.")})
        start, spent = facts["step"], facts["seconds"]
        print(f"going on from {found}")
    checkpoint.cut_log(cfg.out / "log.jsonl", start)
    began = time.monotonic() - spent
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="clip", mininterval=5)
    with (cfg.out / "log.jsonl").open("a") as log:
        for step in bar:
            draw = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
            pick = torch.randint(len(label), (cfg.batch,), generator=draw).to(device)
            with autocast("auto", device):
                logits = pair.logits(train_pixels[pick], train_pooled[pick])
            loss = contrastive_loss(logits, (label[pick][:, None] == label[pick][None]).float())
            loss.backward()
            optimizer.param_groups[0]["lr"] = learning_rate(
                step, peak=cfg.lr, warmup=50, steps=cfg.steps, decay="cosine"
            )
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 100 == 0 or step + 1 == cfg.steps:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                row = {"step": step + 1, "loss": loss.item(), "seconds": round(time.monotonic() - began, 1)}
                row["accuracy"] = accuracy(pair, val_pixels, val_pooled, val_captions)
                log.write(json.dumps(row) + "\n")
                log.flush()
            if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
                state = {f"model.{k}": v for k, v in pair.state_dict().items()}
                state |= {f"optim.{k}": v for k, v in optimizer_tensors(optimizer, named).items()}
                told = {"seconds": time.monotonic() - began, "config": config.to_dict(cfg)}
                checkpoint.save(cfg.out, step + 1, state, told)
    numbers = {"accuracy_val": round(accuracy(pair, val_pixels, val_pooled, val_captions), 3)}
    print(numbers)
    save_part(
        cfg.out / "image_encoder.safetensors",
        pair.image,
        TINY_IMAGE_ENCODER,
        numbers=numbers,
        recipe=config.to_dict(cfg),
    )
    lock.close()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"i2v.training.clip: error: {error}")
