"""Every written format gives back what went in, bit for bit, and diffusers loads our folders with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from i2v.diffusion.schedule import ANIMATEDIFF_SD15
from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from i2v.models.ip_adapter import IPAdapterConfig
from i2v.models.motion import MOTION_V1
from i2v.models.unet import UNet, UNetConfig
from i2v.models.vae import VAE, VAEConfig
from i2v.parts import CONFIGS, open_part, save_part
from weights_convert import diffusers_configs
from weights_convert.__main__ import run
from weights_convert.contents import accounted, look
from weights_convert.networks import expected
from weights_convert.rules import ConversionError

# Stable Diffusion 1.5's and SDXL's kind in every level and layer, a few channels wide.
UNETS = {
    "sd15": UNetConfig(channels=(8, 16, 24, 24), depths=(1, 1, 1, 0), heads=(2, 2, 2, 2), context_dim=12, groups=4),
    "sdxl": UNetConfig(
        channels=(8, 16, 24), depths=(0, 2, 10), heads=(1, 2, 3), context_dim=20, mid_depth=10, linear_proj=True,
        pooled_dim=8, size_dim=4, groups=4,
    ),
}  # fmt: skip
SMALL_VAE = VAEConfig(channels=(8, 16, 24, 24), groups=4)
TEXT = CLIPTextConfig(99, 12, 16, 2, 2, 20, eos_token_id=98)
TEXT_2 = CLIPTextConfig(99, 8, 16, 2, 2, 20, "gelu", 98, projection_dim=8)
IMAGE = CLIPVisionConfig(8, 16, 2, 2, 4, 8, 6)
CONTENT = IPAdapterConfig("plus", image_dim=8, context_dim=12, tokens=3, dim=8, depth=4, heads=1)
OWN = {
    "sd15": {
        "unet": UNETS["sd15"], "vae": SMALL_VAE, "text_encoder": TEXT, "image_encoder": IMAGE, "motion": MOTION_V1,
        "i2v_adapter": None, "ip_adapter": CONTENT,
    },
    "sdxl": {"unet": UNETS["sdxl"], "vae": SMALL_VAE, "text_encoder": TEXT, "text_encoder_2": TEXT_2,
             "i2v_adapter": None},
}  # fmt: skip


def random_tensors(part: str, config: Any, unet: UNetConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: 0.2 * torch.randn(value.shape, generator=generator) + (0.5 if "norm" in key and "weight" in key else 0)
        for key, value in expected(part, config, unet).items()
    }


@pytest.fixture(scope="module", params=OWN)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of our own of the base's kind, random float32 weights."""
    folder = tmp_path_factory.mktemp(request.param) / request.param
    for seed, (part, config) in enumerate(OWN[request.param].items()):
        tensors = random_tensors(part, config, UNETS[request.param], seed)
        extra = {"schedule": ANIMATEDIFF_SD15} if part == "motion" else {}
        save_part(folder / f"{part}.safetensors", tensors, config, family=request.param, dtype=torch.float32, **extra)
    words = [f"w{i}" for i in range(97)]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate([*words, "<|startoftext|>",
                                                                               "<|endoftext|>"])}))  # fmt: skip
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def base(model: Path) -> str:
    return model.name


def tensors_of(folder: Path, part: str) -> dict[str, Tensor]:
    return load_file(folder / f"{part}.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


PUBLISHED = {
    "sd15-single-file": ("unet", "vae", "text_encoder"),
    "sd15-unet-ldm": ("unet",),
    "sd15-unet-diffusers": ("unet",),
    "i2v-adapter-sd15": ("i2v_adapter",),
    "i2v-module": ("i2v_adapter",),
    "animatediff-v1": ("motion",),
    "motion-adapter-v1": ("motion",),
    "vae-ldm": ("vae",),
    "vae-diffusers": ("vae",),
    "vae-diffusers-old": ("vae",),
    "clip-text-l": ("text_encoder",),
    "sdxl-single-file": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "sdxl-unet-ldm": ("unet",),
    "openclip-text-bigg": ("text_encoder_2",),
    "i2v-adapter-sdxl": ("i2v_adapter",),
}


CASES = [
    pytest.param(base, layout, ending, id=f"{base} {layout}{ending}")
    for layout, parts in PUBLISHED.items()
    for base in OWN
    for ending in (".safetensors", ".pth")
    if set(parts) <= OWN[base].keys() and {"sd15": "sdxl", "sdxl": "sd15"}[base] not in layout
    if base in layout or base == "sd15" or parts == ("text_encoder_2",)
    if ending == ".safetensors" or layout == "i2v-module"
]


@pytest.mark.parametrize("model, layout, ending", CASES, indirect=["model"])
def test_published_and_back(layout: str, ending: str, model: Path, tmp_path: Path) -> None:
    """Out into the published names, and in again with the same rules: the same bits."""
    file = tmp_path / f"file{ending}"
    assert run(["convert", str(model), str(file), "--to", layout]) == 0
    if ending == ".pth":
        assert {value.dtype for value in torch.load(file, weights_only=True).values()} == {torch.float32}
    (content,) = look(file, {"i2v-module": f"i2v-adapter-{base(model)}"}.get(layout, layout))
    result = accounted(content, base(model))
    assert not result.problems and set(result.parts) == set(PUBLISHED[layout])
    for part in PUBLISHED[layout]:
        same(dict(result.parts[part].tensors), tensors_of(model, part))


def test_own_to_own_keeps_every_bit_and_says_where_it_comes_from(model: Path, tmp_path: Path) -> None:
    assert run(["convert", str(model), str(tmp_path / "new"), "--to", "own"]) == 0
    for part in OWN[base(model)]:
        same(tensors_of(tmp_path / "new", part), tensors_of(model, part))
        file = open_part(tmp_path / "new" / f"{part}.safetensors", CONFIGS[part])
        assert file.config == OWN[base(model)][part]
        assert file.metadata["base"] == file.metadata["family"] == base(model)
        assert file.metadata["recipe"]["converted_from"] == base(model)
        assert len(file.metadata["sources"][base(model)]) == 64
    if "motion" in OWN[base(model)]:
        motion = open_part(tmp_path / "new" / "motion.safetensors", CONFIGS["motion"])
        assert motion.metadata["schedule"]["kind"] == "linear"


def test_through_diffusers_and_back(model: Path, tmp_path: Path) -> None:
    """Networks of a size that was never published: config.json says what they are."""
    folder, back = tmp_path / "diffusers", tmp_path / "back"
    assert run(["convert", str(model), str(folder), "--to", "diffusers"]) == 0
    parts = [p for p in ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder") if p in OWN[base(model)]]
    assert run(["convert", str(folder), str(back), "--to", "own", "--parts", *parts]) == 0
    for part in parts:
        same(tensors_of(back, part), tensors_of(model, part))
        assert open_part(back / f"{part}.safetensors", CONFIGS[part]).config == OWN[base(model)][part]
    assert (back / "vocab.json").read_text() == (model / "vocab.json").read_text()


@pytest.mark.parametrize("config", [*UNETS.values(), SMALL_VAE, TEXT, TEXT_2, IMAGE], ids=lambda c: type(c).__name__)
def test_configs_come_back(config: Any) -> None:
    values = json.loads(json.dumps(diffusers_configs.to_json(config)))
    assert diffusers_configs.from_json(values, "config.json") == config


def test_what_diffusers_has_no_setting_for() -> None:
    with pytest.raises(ConversionError, match="in the middle"):
        diffusers_configs.to_json(UNetConfig((8,), (1,), (2,), 8, mid_depth=2, groups=4))
    with pytest.raises(ConversionError, match="patch 4"):
        diffusers_configs.to_json(VAEConfig(patch=4))


# --- diffusers and transformers load the folder -----------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / base(model)
    assert run(["convert", str(model), str(folder), "--to", "diffusers"]) == 0
    return folder


def ours(model: Path, part: str, network: torch.nn.Module) -> torch.nn.Module:
    network.load_state_dict(tensors_of(model, part))
    return network.eval()


@torch.no_grad()
def test_diffusers_unet(model: Path, exported: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs, info = diffusers.UNet2DConditionModel.from_pretrained(exported / "unet", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    cfg = UNETS[base(model)]
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, cfg.context_dim, generator=generator)
    t = torch.tensor([10, 900])
    extra, own = {}, {}
    if cfg.pooled_dim:
        pooled, sizes = torch.randn(2, cfg.pooled_dim, generator=generator), torch.full((2, 6), 64.0)
        extra = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        own = {"pooled": pooled, "size_ids": sizes}
    got = ours(model, "unet", UNet(cfg))(latents, t, context, **own)
    want = theirs.eval()(latents, t, context, **extra).sample
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_diffusers_vae(model: Path, exported: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs, info = diffusers.AutoencoderKL.from_pretrained(exported / "vae", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    got = ours(model, "vae", VAE(SMALL_VAE)).decode(latents)
    want = theirs.eval().decode(latents / theirs.config.scaling_factor).sample
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_transformers_text(part: str, model: Path, exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if part not in OWN[base(model)]:
        pytest.skip("Stable Diffusion 1.5 has one text encoder")
    kind = transformers.CLIPTextModelWithProjection if part.endswith("_2") else transformers.CLIPTextModel
    theirs, info = kind.from_pretrained(exported / part, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[97, 3, 5, 98, 98], [97, 4, 98, 98, 98]])
    got = ours(model, part, CLIPTextModel(OWN[base(model)][part]))(ids)
    want = theirs.eval()(ids, output_hidden_states=True)
    pooled = want.text_embeds if part.endswith("_2") else want.pooler_output
    assert torch.allclose(got.last_hidden_state, want.last_hidden_state, atol=1e-5)
    assert torch.allclose(got.pooled, pooled, atol=1e-5)


@torch.no_grad()
def test_transformers_image(model: Path, exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if "image_encoder" not in OWN[base(model)]:
        pytest.skip("the SDXL stand-in has none")
    kind = transformers.CLIPVisionModelWithProjection
    theirs, info = kind.from_pretrained(exported / "image_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    got = ours(model, "image_encoder", CLIPVisionModel(IMAGE))(pixels)
    assert torch.allclose(got.image_embeds, theirs.eval()(pixels).image_embeds, atol=1e-5)


def test_diffusers_motion_adapter_and_ip_adapter(model: Path, exported: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    if "motion" not in OWN[base(model)]:
        assert not (exported / "motion_adapter").exists()
        return
    theirs, info = diffusers.MotionAdapter.from_pretrained(exported / "motion_adapter", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = theirs.state_dict()
    key = "down_blocks.0.motion_modules.1.transformer_blocks.0.attn2.to_k.weight"
    own = tensors_of(model, "motion")
    assert torch.equal(state[key], own[key.replace("attn2", "attention_blocks.1")])
    unet = diffusers.UNet2DConditionModel.from_pretrained(exported / "unet")
    unet._load_ip_adapter_weights([_nested(load_file(exported / "ip_adapter" / "ip-adapter.safetensors"))])
    middle = unet.attn_processors["mid_block.attentions.0.transformer_blocks.0.attn2.processor"]
    ours_there = tensors_of(model, "ip_adapter")
    name = next(k for k in ours_there if k.startswith("ip_adapter.mid_block") and k.endswith("to_k_ip.weight"))
    assert torch.equal(middle.to_k_ip[0].weight, ours_there[name])


def _nested(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As diffusers reads the file."""
    out: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in flat.items():
        group, _, rest = key.partition(".")
        out[group][rest] = value
    return out


def test_diffusers_loads_the_whole_pipeline(model: Path, exported: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    index = json.loads((exported / "model_index.json").read_text())
    if base(model) == "sd15":
        assert index["_class_name"] == "StableDiffusionPipeline"
        scheduler = diffusers.PNDMScheduler.from_pretrained(exported / "scheduler")
        assert scheduler.config.steps_offset == 1
    else:
        assert index["_class_name"] == "StableDiffusionXLPipeline"
        scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(exported / "scheduler")
    assert scheduler.config.beta_schedule == "scaled_linear"
