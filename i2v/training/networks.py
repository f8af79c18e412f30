"""The miniature's networks while they are trained: built from parts or random weights, named, and exported again."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
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
from i2v.data.latents import WorldLatents
from i2v.data.world import WORLDS
from i2v.diffusion.schedule import Schedule
from i2v.lora import base_of
from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import CLIPVisionModel
from i2v.models.controlnet import ControlNet, controlnet_from
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import IPAdapterConfig, add_ip_adapter, image_projection
from i2v.models.lora import TrainedLoRA
from i2v.models.motion import MotionConfig, add_motion_modules
from i2v.models.tokenizer import Tokenizer
from i2v.models.unet import UNet, UNetConfig
from i2v.models.vae import VAE
from weights_convert.write_lora import write_lora

TINY_UNET = UNetConfig(
    channels=(96, 96), depths=(1, 1), heads=(6, 6), context_dim=128, layers=1, latent_channels=16, groups=16
)
TINY_MOTION = MotionConfig(
    max_frames=32, mid_block=False, resnet_norm_over_frames=False, motion_norm_over_frames=False, heads=6
)
# v-prediction: under epsilon a network this small learns nothing at the noisiest timesteps, where x_0's error is the
# noise error times sigma^2 / alpha^2.
TINY_SCHEDULE = Schedule(prediction="v")


Prediction = Literal["epsilon", "v", "sample"]


@dataclass
class Networks:
    """All networks of a run. `added` holds what the add_... functions returned, by part name."""

    vae: VAE
    vae_id: str
    tokenizer: Tokenizer
    text_encoder: CLIPTextModel
    unet: UNet
    base_keys: set[str]
    added: dict[str, Mapping[str, nn.Module]]
    image_encoder: CLIPVisionModel | None
    image_proj: nn.Module | None
    configs: dict[str, Any]
    schedule: Schedule
    init: Path
    controlnet: ControlNet | None = None
    lora: TrainedLoRA | None = None
    ids: dict[str, Tensor] = field(default_factory=dict)  # caption -> symbols, so that each is cut into them once

    @classmethod
    def build(
        cls, init: Path, parts: Sequence[str], seed: int, prediction: Prediction | None = None, width: int | None = None
    ) -> Networks:
        """Parts found in `init` are loaded strictly; the others start from random weights drawn with `seed`.

        prediction: what the network learns to predict; None: what `init` was trained for, v where it has no UNet.
        width: channels of a UNet that starts at random, a multiple of 16; None: the miniature's 96.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls._build(init, parts, prediction, width)

    @classmethod
    def _build(cls, init: Path, parts: Sequence[str], prediction: Prediction | None, width: int | None) -> Networks:
        def stored(name: str) -> load.PartFile | None:
            path = init / f"{name}.safetensors"
            return load.header(path) if path.is_file() else None

        needed = {"vae.safetensors": "the VAE", load.TEXT_FILES[0]: "the vocabulary", load.TEXT_FILES[1]: "its merges"}
        if "ip_adapter" in parts:
            needed["image_encoder.safetensors"] = "the Content-Adapter's image encoder"
        for name, what in needed.items():
            if not (init / name).is_file():
                raise ConfigError(f"--init {init} has no {name}, {what}; weights/tiny has them all")
        if unknown := set(parts) - {"motion", "ip_adapter", "i2v_adapter", "controlnet", "none"}:
            known = "motion, ip_adapter, i2v_adapter, controlnet, or none"
            raise ConfigError(f"--parts {unknown.pop()!r}: expected some of {known}")
        vae_file = load.header(init / "vae.safetensors")
        vae = VAE(vae_file.config)
        vae.load_state_dict(_float32(vae_file.tensors()))
        tokenizer = Tokenizer.from_files(*(init / name for name in load.TEXT_FILES), length=32)
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer.vocab),
            hidden_size=TINY_UNET.context_dim,
            num_layers=2,
            num_heads=4,
            intermediate_size=4 * TINY_UNET.context_dim,
            max_length=tokenizer.length,
            eos_token_id=tokenizer.eos_id,
        )
        unet_config, motion_config = TINY_UNET, TINY_MOTION
        if width is not None:  # heads as wide as the miniature's
            heads = width // 16
            unet_config = replace(unet_config, channels=(width, width), heads=(heads, heads))
            motion_config = replace(motion_config, heads=heads)
        if (file := stored("unet")) is not None:
            unet_config = file.config
        if (file := stored("motion")) is not None:
            motion_config = file.config
        configs: dict[str, Any] = {"unet": unet_config, "motion": motion_config, "text_encoder": text_config}
        text_encoder = CLIPTextModel(text_config)
        for table in (m for m in text_encoder.modules() if isinstance(m, nn.Embedding)):
            nn.init.normal_(table.weight, std=0.1)  # PyTorch's own, 1, would drown what the layers add
        unet = UNet(unet_config)
        base_keys = set(unet.state_dict())
        bases: dict[str, nn.Module] = {"text_encoder": text_encoder, "unet": unet}
        for name, base in bases.items():
            if (file := stored(name)) is not None:
                base.load_state_dict(_float32(file.tensors()))
        added: dict[str, Mapping[str, nn.Module]] = {}
        image_encoder, image_proj = None, None
        if "motion" in parts:
            added["motion"] = add_motion_modules(unet, motion_config)
        if "ip_adapter" in parts:
            encoder_file = load.header(init / "image_encoder.safetensors")
            image_encoder = CLIPVisionModel(encoder_file.config)
            image_encoder.load_state_dict(_float32(encoder_file.tensors()))
            configs["ip_adapter"] = IPAdapterConfig(
                kind="linear", image_dim=encoder_file.config.projection_dim, context_dim=TINY_UNET.context_dim, tokens=4
            )
            image_proj = image_projection(configs["ip_adapter"])
            blocks = {load.CONTENT + path: module for path, module in add_ip_adapter(unet).items()}
            added["ip_adapter"] = {load.PROJECTION[:-1]: image_proj, **blocks}
        if "i2v_adapter" in parts:
            added["i2v_adapter"] = add_i2v_adapter(unet)
        for name, modules in added.items():
            if (file := stored(name)) is not None:
                tensors = _float32(file.tensors())
                for path, module in modules.items():
                    mine = {
                        k.removeprefix(f"{path}."): tensors.pop(k) for k in list(tensors) if k.startswith(f"{path}.")
                    }
                    module.load_state_dict(mine)
                if tensors:
                    raise ValueError(f"{file.path} has no place for {next(iter(tensors))}")
        controlnet = None
        if "controlnet" in parts:  # always begun anew, as a copy of the base
            controlnet = controlnet_from(unet, _hint_channels(unet_config, vae_file.config.factor))
            configs["controlnet"] = controlnet.cfg
            added["controlnet"] = dict(controlnet.named_children())
        trained_for = stored("unet")
        schedule = TINY_SCHEDULE
        if trained_for is not None and "schedule" in trained_for.metadata:
            schedule = load.schedule_of(trained_for)
        for frozen in (vae, image_encoder):
            if frozen is not None:
                frozen.requires_grad_(False).eval()
        return cls(
            vae,
            _digest({k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}),
            tokenizer,
            text_encoder,
            unet,
            base_keys,
            added,
            image_encoder,
            image_proj,
            configs,
            replace(schedule, prediction=prediction or schedule.prediction),
            init,
            controlnet,
        )

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
        """Put trained low-rank changes on the layers of the UNet that the patterns ("unet.*to_q") name.

        Returns their A and B as "lora.<key>". From then on `predict` uses them, all else is frozen.
        Raises ConfigError for a pattern of another part or without a layer.
        """
        if self.added:
            raise ConfigError(f"--lora changes the image UNet alone; give --parts none, not {', '.join(self.added)}")
        if elsewhere := [p for p in patterns if not p.startswith("unet.")]:
            raise ConfigError(f"--lora changes the image UNet; --train {elsewhere[0]!r} must begin with unet.")
        for parameter in self.named_parameters().values():
            parameter.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        try:
            self.lora = TrainedLoRA(self.unet, [p.removeprefix("unet.") for p in patterns], rank, generator)
        except ValueError as error:
            raise ConfigError(f"--lora: {error}") from None
        return {f"lora.{k}": v for k, v in self.lora.parameters.items()}

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        *,
        num_frames: int,
        image_tokens: Tensor | None = None,
        edges: Tensor | None = None,
    ) -> Tensor:
        """The UNet's prediction, with the LoRA or the ControlNet that is trained.

        As for `UNet.forward`; edges (B, F, 3, H, W), 0 or 1: the ControlNet's pictures.
        """
        control = None
        if self.controlnet is not None and edges is not None:
            hint = self.controlnet.hint(edges.flatten(0, 1))
            control = self.controlnet(latents, timesteps, context, hint, num_frames=num_frames)
        return (self.lora or self.unet)(
            latents, timesteps, context, num_frames=num_frames, image_tokens=image_tokens, control=control
        )

    def condition(self, captions: Sequence[str], image_embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Text context (B, L, C) and image tokens (B, M, C), None without a Content-Adapter."""
        for caption in captions:
            if caption not in self.ids:
                self.ids[caption] = self.tokenizer.encode([caption])[0]
        ids = torch.stack([self.ids[caption] for caption in captions]).to(self.device, non_blocking=True)
        context = self.text_encoder(ids).last_hidden_state
        if image_embeds is None or self.image_proj is None:
            return context, None
        return context, self.image_proj(image_embeds)

    @torch.no_grad()
    def image_embeds(self, data: WorldLatents, folder: Path) -> Tensor | None:
        """(clips + 1, D) what CLIP makes of each clip's first frame and, last, of zero pixels; None without CLIP.

        Kept in `folder` for the next run.
        """
        if self.image_encoder is None:
            return None
        about = [repr(data.world), data.split, data.style, str(data.size), _digest(self.image_encoder.state_dict())]
        file = folder / f"image-embeds-{hashlib.sha256('/'.join(about).encode()).hexdigest()[:12]}-{len(data)}.npy"
        if file.is_file():
            return torch.from_numpy(np.load(file)).to(self.device)
        out, waiting = [], []
        zero = torch.zeros(3, data.size, data.size)
        for picture in chain(tqdm(data.pictures(), "image embeddings", len(data), mininterval=2), [zero]):
            waiting.append(picture)
            if len(waiting) == 256 or picture is zero:
                out.append(self.image_encoder(torch.stack(waiting).to(self.device)).image_embeds.float())
                waiting.clear()
        embeds = torch.cat(out)
        aside = file.with_name(f".{file.name}.{os.getpid()}.npy")
        np.save(aside, embeds.cpu().numpy())
        os.replace(aside, file)
        return embeds

    def encoded_world(self, folder: Path, world: str, split: str, clips: int, style: str = "") -> WorldLatents:
        """Clips of the procedural world as latents; 16 frames of 64x64 pixels."""

        @torch.no_grad()
        def encode(pixels: Tensor) -> Tensor:
            return self.vae.encode(pixels.to(self.device)).mode()

        folder = folder / (f"{world}-{style}" if style else world)
        chunk = 1 if self.device.type == "cpu" else 64
        return WorldLatents(folder, WORLDS[world], split, clips, 16, 64, encode, self.vae_id, style, chunk)

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

    def export(self, folder: Path, trained: Mapping[str, Tensor], **facts: Any) -> None:
        """One file per part. Parts without a trained tensor are copied from `init` to the byte, so that hashes stay.

        A trained LoRA is the file lora.safetensors beside them, for sample.py's --lora.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora is not None:
            pairs = self.lora.pairs()
            pairs = {k: replace(p, down=p.down.half().cpu(), up=p.up.half().cpu()) for k, p in pairs.items()}
            base = base_of({"unet": self.unet, "text_encoder": self.text_encoder})
            if base is not None:  # always: a UNet is among the modules
                write_lora(folder / "lora.safetensors", {"unet": pairs}, base, **facts)
        for name, tensors in self.modules().items():
            touched = any(k.split(".")[0] == name for k in trained)
            source = self.init / f"{name}.safetensors"
            if not touched and source.is_file():
                if folder.resolve() != self.init.resolve():
                    shutil.copyfile(source, folder / source.name)
                continue
            extra: dict[str, Any] = {"schedule": self.schedule} if name in ("motion", "unet") else {}
            extra |= {"control": CANNY} if name == "controlnet" else {}
            load.save_part(folder / f"{name}.safetensors", dict(tensors), self.configs.get(name), **extra, **facts)
        carried = ["vae.safetensors", "image_encoder.safetensors", *load.TEXT_FILES]
        for file in carried:
            source = self.init / file
            if source.is_file() and folder.resolve() != self.init.resolve():
                shutil.copyfile(source, folder / file)


def _hint_channels(unet: UNetConfig, factor: int) -> tuple[int, ...]:
    """Of a ControlNet for pictures of `factor` pixels per latent: one halving each, never wider than the UNet."""
    return tuple(min(16 * 2**i, unet.channels[0]) for i in range(factor.bit_length()))


def _float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of some tensors' values in key order."""
    out = hashlib.sha256()
    for _, value in sorted(tensors.items()):
        out.update(value.contiguous().cpu().numpy().tobytes())
    return out.hexdigest()
