"""Published files as the networks of a run: Stable Diffusion with motion modules, IP-Adapter and a new I2V-Adapter.

The files are found, recognised and compared as sample.py does it (i2v/assemble.py). Frozen weights are kept in the
compute dtype, parts that are trained in float32. Text and image encoders run once, before training; what they make of
captions and pictures is kept on the disk.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from i2v import load
from i2v.assemble import PARTS, ModelFiles, Plan, plan
from i2v.config import ConfigError
from i2v.data.cache import EncodedText, encoded_text
from i2v.device import DTYPES, sent
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import IPAdapterConfig
from i2v.networks import networks
from i2v.parts import save_part
from i2v.pipeline import I2VPipeline
from i2v.presets import Preset
from i2v.prompt import OneEncoder, TextConditioning, TwoEncoders
from i2v.sources import IN_ATTENTION, PROJECTION
from i2v.training.memory import named
from i2v.training.networks import Conditions, Networks, changed_schedule, digest
from i2v.training.settings import Training
from weights_convert import files
from weights_convert.layouts.animatediff import animatediff
from weights_convert.layouts.official_i2v import i2v_module
from weights_convert.rules import ConversionError, Rule, convert, inverted

NEEDS = {"motion": ("motion",), "ip_adapter": ("image_encoder", "image_projection", "ip_adapter"), "i2v_adapter": ()}
OFFICIAL: dict[str, tuple[str, Callable[[Networks], list[Rule]]]] = {  # part -> file in the authors' names, its rules
    "i2v_adapter": ("i2v_module.safetensors", lambda built: i2v_module(built.unet.cfg)),
    "motion": ("motion_module.safetensors", lambda built: animatediff(built.configs["motion"])),
}


class StoredText(nn.Module):
    """Captions as the frozen encoders told them before training, for the pipeline: only captions of the run."""

    def __init__(self, built: PublishedNetworks) -> None:
        super().__init__()
        self.tell, self.tokenizer = built.condition, built.tokenizer

    def forward(self, prompt: str, size: tuple[int, int], negative: bool = False) -> TextConditioning:
        told = self.tell([prompt], None)
        return TextConditioning(told.context, told.pooled, told.size_ids)


@dataclass
class PublishedNetworks(Networks):
    """Networks of a preset. `texts`: what the text encoders made of the captions, once `read_captions` was called;
    until then they read captions as they come."""

    preset: Preset | None = None
    size: tuple[int, int] = (512, 512)  # pixels of the training frames, which SDXL is told
    texts: EncodedText | None = None

    def modules(self) -> dict[str, Mapping[str, Tensor]]:
        found = super().modules()
        del found["text_encoder"]  # never trained here
        return found

    def read_captions(self, cache: Path, captions: Sequence[str]) -> None:
        """Encodes all captions, or reads them from `cache`, and lets go of the text encoders.

        The empty caption, which stands for a dropped one too, is told as the sampler's unguided half tells it.
        """
        words = hashlib.sha256(repr(sorted(self.tokenizer.vocab.items())).encode()).hexdigest()
        text_id = f"{digest(self.text_encoder.state_dict())}/{words}"
        self.texts = encoded_text(cache, captions, self._read, text_id)
        self.text_encoder = nn.Identity()

    @torch.no_grad()
    def _read(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """By the frozen text encoders, in their own number format: a row for each caption."""
        with torch.autocast(self.device.type, enabled=False):
            told = [self.text_encoder(caption, self.size, negative=not caption) for caption in captions]
        out = {"context": torch.cat([one.context for one in told])}
        return out | ({"pooled": torch.cat([one.pooled for one in told])} if told[0].pooled is not None else {})

    def condition(self, captions: Sequence[str], image_features: Tensor | None) -> Conditions:
        texts = self._read if self.texts is None else self.texts
        told = {name: sent(value, self.device) for name, value in texts(captions).items()}
        dtype = self.unet.conv_in.weight.dtype
        pooled, size_ids = told.get("pooled"), None
        if pooled is not None:  # the picture's size, where it was cropped, the size asked for: as when sampling
            size_ids = torch.tensor([[*self.size, 0, 0, *self.size]] * len(captions), device=self.device)
            pooled = pooled.to(dtype)
        return Conditions(told["context"].to(dtype), self.image_tokens(image_features), pooled, size_ids)

    def image_tokens(self, image_features: Tensor | None) -> Tensor | None:
        if image_features is None or self.image_proj is None:
            return None
        return self.image_proj(image_features.to(next(self.image_proj.parameters()).dtype))

    @property
    def unconditional_image(self) -> str:
        return super().unconditional_image if self.preset is None else self.preset.unconditional_image

    def seen(self, pixels: Tensor) -> Tensor:
        """For IP-Adapter-plus the patches before CLIP's last layer (N, P, D), float16; else the embedding (N, D)."""
        if self.image_encoder is None:
            raise ValueError("there is no image encoder among these networks")
        seen = self.image_encoder(pixels.to(self.device))
        return (seen.hidden_states[-2] if self._content.kind == "plus" else seen.image_embeds).half()

    @property
    def _content(self) -> IPAdapterConfig:
        config = self.configs["ip_adapter"]
        if not isinstance(config, IPAdapterConfig):
            raise ValueError("these networks have no Content-Adapter")
        return config

    def rest(self) -> None:
        """What has made its part leaves the GPU: the autoencoder and the image encoder, until a video is made."""
        for network in (self.vae, self.image_encoder):
            if network is not None:
                network.to("cpu")

    def prompt_reader(self) -> OneEncoder:
        return StoredText(self)  # type: ignore[return-value]

    @contextmanager
    def pipeline(self) -> Iterator[I2VPipeline]:
        with super().pipeline() as pipe:
            if self.preset is not None:
                pipe.preset = self.preset
            homes = [(n, next(n.parameters()).device) for n in (self.vae, self.image_encoder) if n is not None]
            for network, _ in homes:
                network.to(self.device)
            try:
                yield pipe
            finally:
                for network, home in homes:
                    network.to(home)

    def export(self, folder: Path, trained: Mapping[str, Tensor], **facts: Any) -> None:
        """Only what was trained: our own part file, and the I2V-Adapter or motion modules in the authors' names too."""
        folder.mkdir(parents=True, exist_ok=True)
        family = self.preset.networks.family if self.preset is not None and self.preset.networks else "own"
        if self.lora is not None:
            self.export_lora(folder, **facts)
        for name, tensors in self.modules().items():
            touched = any(k.split(".")[0] == name for k in trained)
            if not touched and not (name == "motion" and self.schedule != self.stored_schedule):
                continue
            extra: dict[str, Any] = {"schedule": self.schedule} if name in ("motion", "unet") else {}
            save_part(
                folder / f"{name}.safetensors", dict(tensors), self.configs.get(name), family=family,
                files={part: path.name for part, path in self.files.items()}, **extra, **facts,
            )  # fmt: skip
            if name in OFFICIAL:
                file, rules = OFFICIAL[name]
                own = {key: value.detach().cpu() for key, value in tensors.items()}
                try:
                    theirs = convert(own, inverted(rules(self)), file, name)[0]
                except ConversionError as error:  # of an edited network, which is written above all the same
                    print(f"{name} cannot be written in the authors' names, {file}: {error}", flush=True)
                else:
                    files.write(folder / file, theirs, {"format": "pt"})


def build_published(cfg: Training) -> PublishedNetworks:
    """The preset with the files that the flags name. A new I2V-Adapter is begun, unless `--i2v` gives one.

    Raises ConfigError for files that are missing, damaged or do not belong together, before any weight is read.
    """
    if unknown := set(cfg.parts) - {*NEEDS, "none"}:
        raise ConfigError(f"--parts {unknown.pop()!r}: for --preset {cfg.preset} some of {', '.join(NEEDS)}, or none")
    parts = [name for name in NEEDS if name in cfg.parts]
    wanted = {"unet", "vae", "text_encoder", "text_encoder_2", *(need for name in parts for need in NEEDS[name])}
    if cfg.i2v is not None and "i2v_adapter" in parts:
        wanted.add("i2v_adapter")
    shared = {f.name for f in fields(ModelFiles)} & {f.name for f in fields(Training)} - {"lora"}
    made = plan(ModelFiles(**{name: getattr(cfg, name) for name in sorted(shared)}), [p for p in PARTS if p in wanted])
    made.refuse()
    return _filled(cfg, made, parts)


def _filled(cfg: Training, made: Plan, parts: Sequence[str]) -> PublishedNetworks:
    built = networks({name: part.config for name, part in made.parts.items()})
    patterns = () if cfg.lora else cfg.train
    trained = {name.split(".")[0] for name in named(built) if any(fnmatch.fnmatch(name, p) for p in patterns)}
    trained |= {"image_projection"} if "ip_adapter" in trained else set()
    once = {"vae", "text_encoder", "text_encoder_2", "image_encoder"}  # run before training, in full precision
    for name, part in made.parts.items():
        dtype = torch.float32 if name in trained | once else DTYPES[cfg.dtype]
        load.fill(built, name, part, dtype)
    slots, added = built.slots, dict[str, Mapping[str, nn.Module]]()
    if "motion" in parts:
        added["motion"] = built.added("motion")
    if "ip_adapter" in parts:
        blocks = {IN_ATTENTION + path: module for path, module in built.added("ip_adapter").items()}
        added["ip_adapter"] = {PROJECTION[:-1]: slots["image_projection"][""], **blocks}
    if "i2v_adapter" in parts:
        given = "i2v_adapter" in made.parts
        added["i2v_adapter"] = built.added("i2v_adapter") if given else add_i2v_adapter(built.unet)
    encoders = [slots[name][""] for name in ("text_encoder", "text_encoder_2") if name in slots]
    tokenizers = made.tokenizers()
    text = TwoEncoders(encoders, tokenizers) if len(encoders) > 1 else OneEncoder(encoders[0], tokenizers[0])
    configs = {name: part.config for name, part in made.parts.items()}
    configs |= {"ip_adapter": configs.get("image_projection")}
    vae = slots["vae"][""]
    encoder = {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    return PublishedNetworks(
        vae=vae,
        vae_id=digest(encoder),
        tokenizer=tokenizers[0],
        text_encoder=text.eval(),
        unet=built.unet,
        base_keys=built.base_keys,
        added=added,
        image_encoder=slots["image_encoder"][""] if "ip_adapter" in parts else None,
        image_proj=slots["image_projection"][""] if "ip_adapter" in parts else None,
        configs=configs,
        schedule=changed_schedule(made.schedule, cfg.prediction, cfg.zero_snr),
        init=Path(),
        stored_schedule=made.schedule,
        preset=made.preset,
        size=(cfg.height, cfg.width),
        files={name: part.source.path for name, part in made.parts.items()},
    )
