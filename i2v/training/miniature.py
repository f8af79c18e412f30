"""The miniature's networks, built from parts in a folder or from random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from i2v import load
from i2v.config import ConfigError
from i2v.diffusion.schedule import Schedule
from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import CLIPVisionModel
from i2v.models.controlnet import controlnet_from
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import IPAdapterConfig, add_ip_adapter, image_projection
from i2v.models.motion import MotionConfig, add_motion_modules
from i2v.models.tokenizer import Tokenizer
from i2v.models.unet import UNet, UNetConfig
from i2v.models.vae import VAE
from i2v.presets import WEIGHTS
from i2v.sources import IN_ATTENTION
from i2v.training.networks import Networks, Prediction, changed_schedule, digest

TINY_UNET = UNetConfig(
    channels=(96, 96), depths=(1, 1), heads=(6, 6), context_dim=128, layers=1, latent_channels=16, groups=16
)
TINY_MOTION = MotionConfig(
    max_frames=32, mid_block=False, resnet_norm_over_frames=False, motion_norm_over_frames=False, heads=6
)
# v-prediction: under epsilon a network this small learns nothing at the noisiest timesteps, where x_0's error is the
# noise error times sigma^2 / alpha^2.
TINY_SCHEDULE = Schedule(prediction="v")


def build_miniature(
    init: Path,
    parts: Sequence[str],
    seed: int,
    prediction: Prediction | None = None,
    zero_snr: bool = False,
    new: Sequence[str] = (),
    width: int | None = None,
) -> Networks:
    """Parts found in `init` are loaded strictly; the others start from random weights drawn with `seed`.

    prediction: what the network learns to predict; None: what `init` was trained for, v where it has no UNet.
    new: parts that start at random, or as copies, although `init` has them.
    zero_snr: the noise schedule is changed so that its last step is noise alone.
    width: channels of a UNet that starts at random, a multiple of 16; None: the miniature's 96.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = _build(init, parts, new, width)
    built.schedule = changed_schedule(built.schedule, prediction, zero_snr)
    return built


def _build(init: Path, parts: Sequence[str], new: Sequence[str], width: int | None) -> Networks:
    def stored(name: str) -> load.PartFile | None:
        path = init / f"{name}.safetensors"
        return load.header(path) if path.is_file() and name not in new else None

    needed = {"vae.safetensors": "the VAE", load.TEXT_FILES[0]: "the vocabulary", load.TEXT_FILES[1]: "its merges"}
    if "ip_adapter" in parts:
        needed["image_encoder.safetensors"] = "the Content-Adapter's image encoder"
    if not init.is_dir():
        raise ConfigError(f"--init {init}: there is no such folder (the current one is {Path.cwd()}); the miniature's "
                          f"is {WEIGHTS / 'tiny'}")  # fmt: skip
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
        blocks = {IN_ATTENTION + path: module for path, module in add_ip_adapter(unet).items()}
        added["ip_adapter"] = {load.PROJECTION[:-1]: image_proj, **blocks}
    if "i2v_adapter" in parts:
        added["i2v_adapter"] = add_i2v_adapter(unet)
    for name, modules in added.items():
        if (file := stored(name)) is not None:
            tensors = _float32(file.tensors())
            place = {f"{p}.{k}": value for p, m in modules.items() for k, value in m.state_dict().items()}
            has, needs = ({key: tuple(t.shape) for key, t in found.items()} for found in (tensors, place))
            if has != needs:
                key = min(key for key in has.keys() | needs.keys() if has.get(key) != needs.get(key))
                raise ConfigError(
                    f"{file.path} does not fit the {name} of this code: {key} {has.get(key, 'is missing')}, expected "
                    f"{needs.get(key, 'no such tensor')}; begin it anew with --new {name}"
                )
            for path, module in modules.items():
                module.load_state_dict({key: tensors[f"{path}.{key}"] for key in module.state_dict()})
    read = [*needed, *(f"{name}.safetensors" for name in (*bases, *added) if stored(name) is not None)]
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
    return Networks(
        vae,
        digest({k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}),
        tokenizer,
        text_encoder,
        unet,
        base_keys,
        added,
        image_encoder,
        image_proj,
        configs,
        schedule,
        init,
        {Path(name).stem: init / name for name in read},
        controlnet=controlnet,
        stored_schedule=schedule if trained_for is not None else None,
    )


def _hint_channels(unet: UNetConfig, factor: int) -> tuple[int, ...]:
    """Of a ControlNet for pictures of `factor` pixels per latent: one halving each, never wider than the UNet."""
    return tuple(min(16 * 2**i, unet.channels[0]) for i in range(factor.bit_length()))


def _float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
