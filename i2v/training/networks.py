"""All networks of a run: what is trained and what is frozen, named, asked, and exported again."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from i2v import load
from i2v.config import ConfigError
from i2v.control import CANNY
from i2v.data.cache import EncodedClips
from i2v.data.latents import WorldLatents
from i2v.data.world import WORLDS
from i2v.diffusion.schedule import Schedule
from i2v.lora import base_of
from i2v.media.output_file import sync
from i2v.models.clip_text import CLIPTextModel
from i2v.models.clip_vision import CLIPVisionModel
from i2v.models.controlnet import ControlNet
from i2v.models.i2v_adapter import FirstFrameAttention
from i2v.models.ip_adapter import ImageCrossAttention
from i2v.models.lora import LoRAPair, TrainedLoRA, layers_of
from i2v.models.tokenizer import Tokenizer
from i2v.models.unet import UNet
from i2v.models.vae import VAE, Posterior
from i2v.parts import CONFIGS
from i2v.pipeline import I2VPipeline
from i2v.presets import PRESETS
from i2v.prompt import OneEncoder
from weights_convert.write_lora import write_lora

Prediction = Literal["epsilon", "v", "sample"]
Clips = WorldLatents | EncodedClips
ENCODED_AT_ONCE = 2**20  # pixels of frames, four of 512x512: an autoencoder's activations are large
PICTURES = 32  # that CLIP looks at at once: ViT-H keeps 0.05 GB of each
ABANDONED = 3600  # seconds without a change after which a half-written file is no running process's


@dataclass(frozen=True)
class Conditions:
    """What the UNet is told beside the noisy frames and the timestep, a row for each clip.

    context (B, L, C); image_tokens (B, M, C), None without a Content-Adapter; pooled (B, P) and size_ids (B, 6) for
    SDXL alone.
    """

    context: Tensor
    image_tokens: Tensor | None = None
    pooled: Tensor | None = None
    size_ids: Tensor | None = None


@dataclass
class Networks:
    """All networks of a run. `added` holds what the add_... functions returned, by part name."""

    vae: VAE
    vae_id: str
    tokenizer: Tokenizer
    text_encoder: nn.Module
    unet: UNet
    base_keys: set[str]
    added: dict[str, Mapping[str, nn.Module]]
    image_encoder: CLIPVisionModel | None
    image_proj: nn.Module | None
    configs: dict[str, Any]
    schedule: Schedule
    init: Path
    files: Mapping[str, Path]  # part -> the file that it was read from; parts that begin anew have none
    stored_schedule: Schedule | None = None  # of the files that it started from
    controlnet: ControlNet | None = None
    lora: TrainedLoRA | None = None
    ids: dict[str, Tensor] = field(default_factory=dict)  # caption -> symbols, so that each is cut into them once

    def modules(self) -> dict[str, Mapping[str, Tensor]]:
        """part -> its tensors by key, as `save_part` stores them."""
        unet = {k: v for k, v in self.unet.state_dict(keep_vars=True).items() if k in self.base_keys}
        out: dict[str, Mapping[str, Tensor]] = {
            "text_encoder": self.text_encoder.state_dict(keep_vars=True),
            "unet": unet,
        }
        for name, modules in self.added.items():
            out[name] = {f"{p}.{k}": v for p, m in modules.items() for k, v in m.state_dict(keep_vars=True).items()}
        return out

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every trainable tensor as "<part>.<key>"."""
        return {
            f"{part}.{key}": value
            for part, tensors in self.modules().items()
            for key, value in tensors.items()
            if isinstance(value, nn.Parameter)
        }

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def to(self, device: torch.device) -> Networks:
        """Everything there; the parameters stay the same objects."""
        for network in (self.vae, self.text_encoder, self.unet, self.image_encoder, self.image_proj, self.controlnet):
            if network is not None:
                network.to(device)
        return self

    def add_lora(self, patterns: Sequence[str], rank: int, seed: int) -> dict[str, nn.Parameter]:
        """Put trained low-rank changes on the layers of the UNet, or of its motion modules, that the patterns name:
        "unet.*attn1.to_q" or "motion.*to_q".

        Returns their A and B as "lora.<key>". From then on `predict` uses them, all else is frozen.
        Raises ConfigError for a pattern of another part or without a layer.
        """
        inside = lora_patterns(self.unet, patterns, self.added)
        for parameter in self.named_parameters().values():
            parameter.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        try:
            self.lora = TrainedLoRA(self.unet, inside, rank, generator)
        except ValueError as error:
            raise ConfigError(f"--lora: {error}") from None
        return {f"lora.{k}": v for k, v in self.lora.parameters.items()}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, told: Conditions, num_frames: int, edges: Tensor | None = None
    ) -> Tensor:
        """The UNet's prediction (B*F, C, h, w), with the LoRA or the ControlNet that is trained.

        noisy (B*F, C, h, w), frame fastest; timesteps (B,) or (B*F,); edges (B, F, 3, H, W), 0 or 1: the ControlNet's
        pictures.
        """
        control = None
        if self.controlnet is not None and edges is not None:
            hint = self.controlnet.hint(edges.flatten(0, 1))
            control = self.controlnet(noisy, timesteps, told.context, hint, num_frames=num_frames)
        return (self.lora or self.unet)(
            noisy, timesteps, told.context, num_frames=num_frames, image_tokens=told.image_tokens, pooled=told.pooled,
            size_ids=told.size_ids, control=control,
        )  # fmt: skip

    def condition(self, captions: Sequence[str], image_features: Tensor | None) -> Conditions:
        """Text and image tokens of each clip; image_features: rows of `image_features`, None without them."""
        for caption in captions:
            if caption not in self.ids:
                self.ids[caption] = self.tokenizer.encode([caption])[0]
        ids = torch.stack([self.ids[caption] for caption in captions]).to(self.device)
        return Conditions(self.text_encoder(ids).last_hidden_state, self.image_tokens(image_features))

    def read_captions(self, cache: Path, captions: Sequence[str]) -> None:
        """Called with all captions of the run before training; the miniature reads them as they come."""

    def rest(self) -> None:
        """Called when latents and image features are there; the miniature's encoders are small and stay."""

    def image_tokens(self, image_features: Tensor | None) -> Tensor | None:
        """(B, M, C) of the Content-Adapter, if there is one."""
        return None if image_features is None or self.image_proj is None else self.image_proj(image_features)

    @property
    def unconditional_image(self) -> str:
        """What stands for a dropped picture, as in the unguided half of sampling."""
        return PRESETS["tiny"].unconditional_image

    def seen(self, pixels: Tensor) -> Tensor:
        """What the Content-Adapter's projection reads of CLIP's pixels (N, 3, S, S): the embedding (N, D)."""
        if self.image_encoder is None:
            raise ValueError("there is no image encoder among these networks")
        return self.image_encoder(pixels.to(self.device)).image_embeds.float()

    @torch.no_grad()
    def features_of(self, pictures: Sequence[Tensor | None]) -> Tensor:
        """(N, ...) what `seen` gives for CLIP's pixels (3, S, S) of each picture; for None, a dropped one, what it
        gives for zero pixels, or zeros."""
        size = 0 if self.image_encoder is None else self.image_encoder.cfg.image_size
        dropped = [k for k, picture in enumerate(pictures) if picture is None]
        shown = torch.stack([torch.zeros(3, size, size) if picture is None else picture for picture in pictures])
        parts = [self.seen(part) for part in shown.split(PICTURES)]
        with torch.autocast(self.device.type, enabled=False):  # which joins no float16 where it is for bfloat16
            made = torch.cat(parts)
        if dropped and self.unconditional_image == "zero-embedding":
            made[dropped] = 0
        return made

    @torch.no_grad()
    def image_features(self, data: Clips, folder: Path) -> Tensor | None:
        """(clips + 1, ...) what CLIP sees in each clip's first frame and, last, what stands for a dropped picture: what
        it sees in zero pixels, or zeros; None without CLIP.

        On the CPU. Kept in `folder` for the next run.
        """
        if self.image_encoder is None:
            return None
        size = self.image_encoder.cfg.image_size
        kind, dropped = self.configs["ip_adapter"].kind, self.unconditional_image
        about = [*data.about, str(size), digest(self.image_encoder.state_dict()), kind, dropped]
        file = folder / f"image-embeds-{hashlib.sha256('/'.join(about).encode()).hexdigest()[:12]}-{len(data)}.npy"
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            for other in folder.glob(".image-embeds-*.npy"):
                with suppress(FileNotFoundError):  # another run may do the same
                    if time.time() - other.stat().st_mtime > ABANDONED:  # by a run that was killed
                        other.unlink()
            aside = file.with_name(f".{file.name}.{os.getpid()}.npy")
            out: np.memmap | None = None
            done, waiting = 0, list[Tensor | None]()
            for picture in chain(tqdm(data.pictures(size), "image embeddings", len(data), mininterval=2), [None]):
                waiting.append(picture)
                if len(waiting) == PICTURES or picture is None:
                    made = self.features_of(waiting).cpu().numpy()
                    if out is None:
                        shape = (len(data) + 1, *made.shape[1:])
                        out = np.lib.format.open_memmap(aside, mode="w+", dtype=made.dtype, shape=shape)
                    out[done : done + len(made)] = made
                    done += len(made)
                    waiting.clear()
            del out
            sync(aside)
            os.replace(aside, file)
        return torch.from_numpy(np.load(file, mmap_mode="c"))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Posterior:
        """(N, 3, H, W) in [-1, 1] -> the posterior of the scaled latents, float32, on the CPU."""
        at_once = max(1, ENCODED_AT_ONCE // pixels[0, 0].numel())
        parts = [self.vae.encode(part.to(self.device)) for part in pixels.split(at_once)]
        mean, std = (torch.cat(values).float().cpu() for values in ([p.mean for p in parts], [p.std for p in parts]))
        return Posterior(mean, std)

    def encoded_world(self, folder: Path, world: str, split: str, clips: int, style: str = "") -> WorldLatents:
        """Clips of the procedural world as latents; 16 frames of 64x64 pixels."""

        @torch.no_grad()
        def encode(pixels: Tensor) -> Tensor:
            return self.vae.encode(pixels.to(self.device)).mode()

        folder = folder / (f"{world}-{style}" if style else world)
        chunk = 1 if self.device.type == "cpu" else 64
        return WorldLatents(folder, WORLDS[world], split, clips, 16, 64, encode, self.vae_id, style, chunk)

    @property
    def can_sample(self) -> bool:
        """Whether all parts of a pipeline are among these networks."""
        return {"motion", "ip_adapter", "i2v_adapter"} <= self.added.keys()

    def prompt_reader(self) -> OneEncoder:
        """What reads prompts for the pipeline."""
        if not isinstance(self.text_encoder, CLIPTextModel):
            raise ValueError("the text encoder is gone")
        return OneEncoder(self.text_encoder, self.tokenizer)

    @contextmanager
    def pipeline(self) -> Iterator[I2VPipeline]:
        """These very networks as sample.py runs them; for as long as the context lasts."""
        if self.image_encoder is None or self.image_proj is None:
            raise ValueError("these networks have no Content-Adapter, which a pipeline needs")
        yield I2VPipeline(
            preset=PRESETS["tiny"],
            unet=self.unet,
            vae=self.vae,
            text_encoder=self.prompt_reader(),
            image_encoder=self.image_encoder,
            image_projection=self.image_proj,
            image_config=self.configs["ip_adapter"],
            i2v_adapter={k: m for k, m in self.added["i2v_adapter"].items() if isinstance(m, FirstFrameAttention)},
            ip_adapter={k: m for k, m in self.added["ip_adapter"].items() if isinstance(m, ImageCrossAttention)},
            schedule=self.schedule,
            max_frames=self.configs["motion"].max_frames,
            device=self.device,
            dtype=torch.float32,
            weights={},
        )

    def summary(self, trained: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
        """Per part: how many parameters there are and how many are trained."""
        out: dict[str, dict[str, int]] = {}
        for name, value in self.named_parameters().items():
            row = out.setdefault(name.split(".")[0], {"all": 0, "trained": 0})
            row["all"] += value.numel()
            row["trained"] += value.numel() * (name in trained)
        if self.lora is not None:
            size = sum(value.numel() for value in self.lora.parameters.values())
            out["lora"] = {"all": size, "trained": size}
        return out

    def frozen_files(self, trained: Mapping[str, Tensor]) -> dict[str, Path]:
        """`files` without those of parts that are trained as a whole."""
        whole = {part for part, count in self.summary(trained).items() if count["trained"] == count["all"]}
        return {part: path for part, path in self.files.items() if part not in whole}

    def export_lora(self, folder: Path, **facts: Any) -> None:
        """lora.safetensors, for sample.py's --lora, or --motion-lora where motion modules' layers were trained."""
        if self.lora is None:
            raise ValueError("no LoRA is trained here")
        parts: dict[str, dict[str, LoRAPair]] = {}
        for path, pair in self.lora.pairs().items():
            half = replace(pair, down=pair.down.half().cpu(), up=pair.up.half().cpu())
            parts.setdefault("motion" if ".motion_modules." in f".{path}" else "unet", {})[path] = half
        base = base_of({"unet": self.unet, "text_encoder": self.text_encoder})
        if base is not None:  # always: a UNet is among the modules
            write_lora(folder / "lora.safetensors", parts, base, **facts)

    def export(self, folder: Path, trained: Mapping[str, Tensor], **facts: Any) -> None:
        """One file per part. Parts without a trained tensor are copied from `init` to the byte, so that hashes stay.

        So are parts that `init` has and this run did not build, adapters beside a base that is trained, unless the
        schedule is another: they were not trained for it. A trained LoRA is the file lora.safetensors beside them, for
        sample.py's --lora.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora is not None:
            self.export_lora(folder, **facts)
        for name, tensors in self.modules().items():
            touched = any(k.split(".")[0] == name for k in trained)
            touched |= name in ("motion", "unet") and self.schedule != self.stored_schedule  # they carry it
            source = self.init / f"{name}.safetensors"
            if not touched and source.is_file():
                if folder.resolve() != self.init.resolve():
                    shutil.copyfile(source, folder / source.name)
                continue
            extra: dict[str, Any] = {"schedule": self.schedule} if name in ("motion", "unet") else {}
            extra |= {"control": CANNY} if name == "controlnet" else {}
            load.save_part(folder / f"{name}.safetensors", dict(tensors), self.configs.get(name), **extra, **facts)
        kept = (
            CONFIGS.keys() - self.modules().keys()
            if self.schedule == self.stored_schedule
            else {"vae", "image_encoder"}
        )
        for file in [*(f"{name}.safetensors" for name in sorted(kept)), *load.TEXT_FILES]:
            source = self.init / file
            if source.is_file() and folder.resolve() != self.init.resolve():
                shutil.copyfile(source, folder / file)


def lora_patterns(unet: nn.Module, patterns: Sequence[str], added: Collection[str]) -> list[str]:
    """`--train` with `--lora`, "unet.*attn1.to_q" or "motion.*to_q", as patterns of layers in the UNet.

    added: the parts in it, frozen; motion modules may lie over a LoRA of the image UNet, adapters not. Raises
    ConfigError for patterns of other parts, or of several.
    """
    part = patterns[0].split(".")[0]
    if part not in ("unet", "motion") or (part == "motion" and "motion" not in added):
        advice = "must begin with unet. or, with --parts motion, motion."
        raise ConfigError(f"--lora changes the UNet or its motion modules; --train {patterns[0]!r} {advice}")
    if elsewhere := [p for p in patterns if not p.startswith(f"{part}.")]:
        raise ConfigError(f"--lora changes one part; --train {elsewhere[0]!r} must begin with {part}. too")
    if adapters := [name for name in added if part == "unet" and name != "motion"]:
        raise ConfigError(f"--lora changes the image UNet, alone or under frozen motion modules; give --parts none or "
                          f"--parts motion, without {', '.join(adapters)}")  # fmt: skip
    inside = [p.removeprefix(f"{part}.") for p in patterns]
    own = [path for path in layers_of(unet) if (".motion_modules." in path) == (part == "motion")]  # both lie in it
    found = [fnmatch.filter(own, pattern) for pattern in inside]
    return [path for pattern, paths in zip(inside, found) for path in paths or [f"{part}.{pattern}"]]


def changed_schedule(schedule: Schedule, prediction: Prediction | None, zero_snr: bool) -> Schedule:
    """The schedule with another prediction, or ending in pure noise. Raises ConfigError where they do not fit."""
    spacing: Any = "trailing" if zero_snr else schedule.spacing  # so that sampling begins at that last step
    try:
        return replace(
            schedule,
            prediction=prediction or schedule.prediction,
            zero_terminal_snr=zero_snr or schedule.zero_terminal_snr,
            spacing=spacing,
        )
    except ValueError as error:
        raise ConfigError(f"--zero-snr: {error}") from None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of some tensors' values in key order."""
    out = hashlib.sha256()
    for _, value in sorted(tensors.items()):
        out.update(value.contiguous().cpu().numpy().tobytes())
    return out.hexdigest()
