"""Small adapters as diffusers holds them, in each published naming: after conversion the same outputs or names."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from i2v.models.ip_adapter import IPAdapterConfig, add_ip_adapter, image_projection
from i2v.models.motion import MOTION_SDXL, MOTION_V1, MOTION_V2, MOTION_V3, MotionConfig, add_motion_modules
from i2v.models.unet import SD15, SDXL, UNet, UNetConfig
from weights_convert.detect import to_parts, to_published
from weights_convert.layouts.animatediff import animatediff, motion_adapter
from weights_convert.layouts.controlnet import controlnet_diffusers, controlnet_ldm
from weights_convert.layouts.diffusers_unet import diffusers_unet
from weights_convert.layouts.ip_adapter import ip_adapter
from weights_convert.layouts.sparse_control import sparse_control
from weights_convert.layouts.taesd import taesd_decoder, taesd_diffusers, taesd_encoder
from weights_convert.rules import ConversionError, Rule, check_shapes, convert, inverted

diffusers: ModuleType = pytest.importorskip("diffusers")

Manifest = Callable[[str], dict[str, Any]]
Tensors = dict[str, Tensor]

TOLERANCE = 2e-5  # relative to the largest value
SD = UNetConfig(channels=(32, 64, 96, 96), depths=(1, 1, 1, 0), heads=(4, 4, 4, 4), context_dim=40)
XL = UNetConfig(channels=(32, 64, 96), depths=(0, 2, 10), heads=(2, 4, 6), context_dim=40, mid_depth=10)
LINEAR = IPAdapterConfig("linear", image_dim=20, context_dim=40, tokens=4)
PLUS = IPAdapterConfig("plus", image_dim=20, context_dim=40, tokens=6, dim=32, depth=4, heads=2)


def shaken(make: Callable[[], Any]) -> Any:
    """A network with weights that are not small, so that each layer shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        module = make()
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return module.eval()


def on_meta(make: Callable[[], Any]) -> Tensors:
    with torch.device("meta"):
        return dict(make().state_dict())


def draw(*shape: int, seed: int = 22) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def unet_of_diffusers(cfg: UNetConfig) -> Any:
    return diffusers.UNet2DConditionModel(
        down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.depths],
        up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(cfg.depths)],
        block_out_channels=cfg.channels,
        attention_head_dim=cfg.heads,  # misnamed: the number of heads
        cross_attention_dim=cfg.context_dim,
        transformer_layers_per_block=[max(depth, 1) for depth in cfg.depths],
    )


def round_trip(source: Tensors, rules: list[Rule]) -> Tensors:
    """Converted, after the way back gave the source's own tensors."""
    ours = convert(source, rules, "small")[0]
    back = convert(ours, inverted(rules), "small")[0]
    assert back.keys() == source.keys()
    assert all(back[k].is_meta or torch.equal(back[k], source[k]) for k in source)
    return ours


# --- IP-Adapter: diffusers reads the same files ----------------------------------------------------------------------


def published_ip_adapter(theirs: Any, cfg: IPAdapterConfig) -> dict[str, Tensors]:
    """A random file as published: numbered attentions, each of the width that diffusers' layer of that number has."""
    projection = shaken(lambda: image_projection(cfg)).state_dict()
    numbered: Tensors = {}
    for n, (name, _) in enumerate(theirs.attn_processors.items()):
        if "attn2" in name:
            width = theirs.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            for i, kind in enumerate("kv"):
                numbered[f"{n}.to_{kind}_ip.weight"] = draw(width, cfg.context_dim, seed=2 * n + i) * 0.3
    return {"image_proj": dict(projection), "ip_adapter": numbered}


@pytest.mark.parametrize("unet", [SD, XL], ids=["SD1.5", "SDXL"])
@pytest.mark.parametrize("cfg", [LINEAR, PLUS], ids=["base", "plus"])
@torch.no_grad()
def test_ip_adapter(unet: UNetConfig, cfg: IPAdapterConfig) -> None:
    """All 16 or 70 attentions get their own keys and values, as in the implementation that numbered them."""
    theirs = shaken(lambda: unet_of_diffusers(unet))
    ours = UNet(unet)
    ours.load_state_dict(theirs.state_dict())
    file = published_ip_adapter(theirs, cfg)
    theirs._load_ip_adapter_weights([file], low_cpu_mem_usage=False)
    flat = {f"{part}.{key}": tensor for part, tensors in file.items() for key, tensor in tensors.items()}
    tensors = round_trip(flat, ip_adapter(unet, cfg.kind))

    slots = add_ip_adapter(ours)
    assert len(slots) == (16 if unet is SD else 70)
    for path, module in slots.items():
        start = f"ip_adapter.{path}."
        module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    project = image_projection(cfg)
    project.load_state_dict({k.removeprefix("image_proj."): v for k, v in tensors.items() if "image_proj." in k})

    latents, context, t = draw(2, 4, 8, 8), draw(2, 5, 40, seed=3), torch.tensor([961, 40])
    features = draw(2, 20, seed=4) if cfg.kind == "linear" else draw(2, 9, 20, seed=4)
    want = theirs(latents, t, context, added_cond_kwargs={"image_embeds": [features[:, None]]}).sample

    def result() -> Tensor:
        return ours.eval()(latents, t, context, image_tokens=project.eval()(features))

    assert apart(result(), want) < TOLERANCE
    same_width = [module for module in slots.values() if module.to_k_ip.weight.shape[0] == unet.channels[-1]]
    first, last = same_width[0].to_k_ip.weight, same_width[-1].to_k_ip.weight
    first.data, last.data = last.data.clone(), first.data.clone()  # fits, and is wrong
    assert apart(result(), want) > 20 * TOLERANCE


# --- motion modules: MotionAdapter ------------------------------------------------------------------------------------

KINDS: dict[str, tuple[MotionConfig, UNetConfig]] = {
    "v1": (MOTION_V1, SD15),
    "v2": (MOTION_V2, SD15),
    "v3": (MOTION_V3, SD15),
    "sdxl": (MOTION_SDXL, SDXL),
}
FILES = {"v1": "mm_sd_v15", "v2": "mm_sd_v15_v2", "v3": "v3_sd15_mm", "sdxl": "mm_sdxl_v10_beta"}


def adapter(motion: MotionConfig, channels: tuple[int, ...], groups: int = 32) -> Any:
    return diffusers.MotionAdapter(
        block_out_channels=channels,
        motion_max_seq_length=motion.max_frames,
        use_motion_mid_block=motion.mid_block,
        motion_norm_num_groups=groups,
    )


@pytest.mark.parametrize("version", KINDS)
def test_motion_adapter_of_full_size(version: str, manifest: Manifest) -> None:
    """diffusers' key list is recognised, claimed key by key, and gives what the original file of that version gives."""
    motion, unet = KINDS[version]
    source = on_meta(lambda: adapter(motion, unet.channels))
    parts = to_parts(source, "adapter")
    assert parts.layout.name == f"motion-adapter-{version}" and parts.layout.max_frames == motion.max_frames
    listed = manifest(FILES[version])["tensors"]
    original = to_parts({k: torch.empty(v["shape"], device="meta") for k, v in listed.items()}, "original")
    check_shapes(original.tensors["motion"], parts.tensors["motion"], version)
    assert original.layout.configs == parts.layout.configs and original.layout.schedule == parts.layout.schedule
    back = to_published(parts.tensors, f"motion-adapter-{version}")
    check_shapes(source, back, version)
    assert to_published(parts.tensors, original.layout.name).keys() == listed.keys()


def test_an_adapter_that_could_be_of_version_1(caplog: pytest.LogCaptureFixture) -> None:
    """Saved with 32 positions, version 1 has the keys of version 3: that is said, and its layout can be named."""
    source = on_meta(lambda: adapter(MOTION_V3, SD15.channels))
    assert to_parts(source, "x.safetensors").layout.configs["motion"] == MOTION_V3
    assert "x.safetensors" in caplog.text and "convert it with --layout motion-adapter-v1" in caplog.text
    caplog.clear()
    first = to_parts(source, "x.safetensors", "motion-adapter-v1")
    assert first.layout.configs["motion"] == MOTION_V1 and not caplog.text
    small = shaken(lambda: adapter(MOTION_V3, (32, 64))).state_dict()
    key = "down_blocks.0.motion_modules.0.transformer_blocks.0.pos_embed.pe"
    convert(small, motion_adapter(MOTION_V1), "small")  # 24 of the 32 positions are those of version 1
    with pytest.raises(ConversionError, match="pos_embed.pe: its values"):
        convert(small | {key: small[key].flip(1)}, motion_adapter(MOTION_V1), "small")


def test_wrong_positions_in_an_adapter() -> None:
    source = shaken(lambda: adapter(MOTION_V3, (32, 64))).state_dict()
    key = "down_blocks.0.motion_modules.0.transformer_blocks.0.pos_embed.pe"
    assert key in source
    with pytest.raises(ConversionError, match="pos_embed.pe: its values"):
        convert(source | {key: source[key].flip(1)}, motion_adapter(MOTION_V3), "small")


@pytest.mark.parametrize("mid_block", [True, False])
@torch.no_grad()
def test_motion_adapter(mid_block: bool) -> None:
    """Against UNetMotionModel, which pools the input norm of each module over the frames."""
    motion = MotionConfig(12, mid_block=mid_block, resnet_norm_over_frames=False, motion_norm_over_frames=True, heads=8)
    base = shaken(lambda: unet_of_diffusers(SD))
    modules = shaken(lambda: adapter(motion, SD.channels))
    theirs = diffusers.UNetMotionModel.from_unet2d(base, modules).eval()
    ours = UNet(SD)
    ours.load_state_dict(convert(base.state_dict(), diffusers_unet(SD), "small")[0])
    added = add_motion_modules(ours, motion)
    tensors = round_trip(modules.state_dict(), motion_adapter(motion))

    def fill(tensors: Tensors) -> Tensor:
        for path, module in added.items():
            start = f"{path}."
            module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
        out = ours.eval()(rearrange(sample, "b c f h w -> (b f) c h w"), t, context, num_frames=3)
        return rearrange(out, "(b f) c h w -> b c f h w", f=3)

    sample, context, t = draw(2, 4, 3, 8, 8), draw(2, 5, 40, seed=3), torch.tensor([701, 33])
    want = theirs(sample, t, context.repeat_interleave(3, 0)).sample
    assert apart(fill(tensors), want) < 5 * TOLERANCE
    swapped = {k.replace("attention_blocks.0", "x").replace("attention_blocks.1", "attention_blocks.0"): v
               for k, v in tensors.items()}  # fmt: skip
    swapped = {k.replace(".x.", ".attention_blocks.1."): v for k, v in swapped.items()}
    assert swapped.keys() == tensors.keys() and apart(fill(swapped), want) > 100 * TOLERANCE

    # through the original names to the same modules
    through = convert(convert(tensors, inverted(animatediff(motion)), "small")[0], animatediff(motion), "small")[0]
    assert all(torch.equal(through[k], tensors[k]) for k in tensors)


# --- what has no network here: names, by those of diffusers -----------------------------------------------------------


def test_controlnet(manifest: Manifest) -> None:
    """The original names of the independent list and diffusers' own give the same tensors."""
    theirs = shaken(
        lambda: diffusers.ControlNetModel(
            block_out_channels=SD.channels,
            attention_head_dim=4,
            cross_attention_dim=SD.context_dim,
            down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        )
    ).state_dict()
    pairs = manifest("name_maps")["maps"]["controlnet_sd15"]
    assert len(pairs) == len(theirs)
    for source, rules in (
        ({ldm: theirs[ours] for ldm, ours, _ in pairs}, controlnet_ldm(SD)),
        (dict(theirs), controlnet_diffusers(SD)),
    ):
        ours = round_trip(source, rules)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_controlnet_of_sdxl() -> None:
    """Of full size, in names that the rules themselves write: recognised, with and without prefix."""
    theirs = on_meta(
        lambda: diffusers.ControlNetModel(
            block_out_channels=SDXL.channels,
            attention_head_dim=SDXL.heads,
            cross_attention_dim=SDXL.context_dim,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            transformer_layers_per_block=[1, 2, 10],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    )
    assert to_parts(theirs, "x").layout.name == "controlnet-sdxl-diffusers"
    for name in ("controlnet-sdxl-ldm", "controlnet-sdxl-ldm-bare"):
        original = to_published({"controlnet": theirs}, name)
        parts = to_parts(original, "x")
        assert parts.layout.name == name and len(original) == 844
        check_shapes(theirs, parts.tensors["controlnet"], name)


@pytest.mark.parametrize("kind", ["rgb", "scribble"])
def test_sparse_control(kind: str, manifest: Manifest) -> None:
    """diffusers' own network holds what the released file gives, beside the fixed tables of positions."""
    theirs = on_meta(
        lambda: diffusers.models.SparseControlNetModel(
            conditioning_channels=4 if kind == "rgb" else 3, use_simplified_condition_embedding=kind == "rgb"
        )
    )
    kept = {k: v for k, v in theirs.items() if not k.endswith("pos_embed.pe")}
    listed = manifest(f"v3_sd15_sparsectrl_{kind}")["tensors"]
    released = to_parts({k: torch.empty(v["shape"], device="meta") for k, v in listed.items()}, "released")
    parts = to_parts(theirs, "diffusers")
    assert parts.layout.name == f"sparsectrl-{kind}-diffusers" and len(kept) < len(theirs) == len(listed)
    for found in (released, parts):
        check_shapes(kept, found.tensors["sparse_control"], kind)
    back = to_published(released.tensors, f"sparsectrl-{kind}-diffusers")
    assert back.keys() == theirs.keys()


def test_sparse_control_values() -> None:
    """At small size, from diffusers' names to the released ones and back, each tensor at its place."""
    cfg = UNetConfig(channels=(32, 64), depths=(1, 0), heads=(4, 4), context_dim=40)
    theirs: nn.Module = shaken(
        lambda: diffusers.models.SparseControlNetModel(
            block_out_channels=cfg.channels,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            cross_attention_dim=40,
            num_attention_heads=4,
        )
    )
    source = dict(theirs.state_dict())
    ours = round_trip(source, sparse_control(cfg, scribble=False, diffusers=True))
    released = convert(ours, inverted(sparse_control(cfg, scribble=False)), "small")[0]
    module = "down_blocks.0.motion_modules.0."
    inner = f"{module}temporal_transformer.transformer_blocks.0."
    theirs_inner = f"{module}transformer_blocks.0."
    for a, b in {
        "attention_blocks.0.to_k.weight": "attn1.to_k.weight",
        "norms.0.bias": "norm1.bias",
        "ff_norm.weight": "norm3.weight",
        "ff.net.0.proj.bias": "ff.net.0.proj.bias",
        "attention_blocks.0.pos_encoder.pe": "pos_embed.pe",
    }.items():
        assert torch.equal(released[inner + a], source[theirs_inner + b])
    assert torch.equal(released["controlnet_down_blocks.1.bias"], source["controlnet_down_blocks.1.bias"])
    assert len(released) == len(source)


def test_taesd() -> None:
    """The plain sequences, built from diffusers' layers: the decoder's first layer has no parameters there."""
    theirs = shaken(
        lambda: diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    )
    decoder = nn.Sequential(nn.Tanh(), *theirs.decoder.layers)
    encoder = nn.Sequential(*theirs.encoder.layers)
    both = {**round_trip(dict(encoder.state_dict()), taesd_encoder()),
            **round_trip(dict(decoder.state_dict()), taesd_decoder())}  # fmt: skip
    want = theirs.state_dict()
    assert both.keys() == want.keys() and all(torch.equal(both[k], want[k]) for k in want)
    assert round_trip(dict(want), taesd_diffusers()).keys() == want.keys()
