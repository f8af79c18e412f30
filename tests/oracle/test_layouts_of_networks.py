"""Small networks of diffusers and transformers in each published naming: ours give the same outputs after conversion.

The original names come from an independent list of pairs made for the published sizes. The small networks have as many
levels and layers, only narrower, so their names are those of the published files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from i2v.models.unet import UNet, UNetConfig
from i2v.models.vae import VAE, VAEConfig
from weights_convert.detect import split_parts
from weights_convert.layouts.clip import clip_both, clip_text, clip_text_flat, clip_vision_flat
from weights_convert.layouts.diffusers_folder import diffusers_folder
from weights_convert.layouts.diffusers_unet import diffusers_unet
from weights_convert.layouts.openclip import openclip_both, openclip_text, openclip_vision
from weights_convert.layouts.single_file import UNET, ema_name, sd15_single_file, sdxl_single_file
from weights_convert.layouts.vae import vae_diffusers, vae_ldm, vae_ldm_file
from weights_convert.rules import Rule, convert, inverted, load_strict, prefixed

pytestmark = pytest.mark.usefixtures("plain_cpu")

diffusers: ModuleType = pytest.importorskip("diffusers")
transformers: ModuleType = pytest.importorskip("transformers")

Manifest = Callable[[str], dict[str, Any]]
Tensors = dict[str, Tensor]

TOLERANCE = 2e-5  # relative to the largest value
SD = UNetConfig(channels=(32, 64, 96, 96), depths=(1, 1, 1, 0), heads=(4, 4, 4, 4), context_dim=40)
XL = UNetConfig(
    channels=(32, 64, 96),
    depths=(0, 2, 10),
    heads=(2, 4, 6),
    context_dim=40,
    mid_depth=10,
    linear_proj=True,
    pooled_dim=20,
    size_dim=16,
)
SMALL_VAE = VAEConfig(channels=(16, 32, 64, 64), groups=8)
TEXT = CLIPTextConfig(99, 48, 80, 12, 4, 20)
TEXT_G = CLIPTextConfig(99, 40, 64, 32, 4, 20, "gelu", projection_dim=40)  # square, as the published one is
VISION = CLIPVisionConfig(48, 80, 12, 4, 7, 21, 24, "quick_gelu")


def shaken(make: Callable[[], Any]) -> Any:
    """A network with weights that are not small, so that each layer shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        module = make()
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return module.eval()


def draw(*shape: int, seed: int = 12) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def published_names(tensors: Tensors, pairs: list[list[str]]) -> Tensors:
    """diffusers' or transformers' tensors as the original implementation stored them: the list's pairs backwards."""
    out: Tensors = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for theirs, ours, op in pairs:
        tensor = tensors[ours]
        if op.startswith("rows"):
            rows.setdefault(theirs, {})[int(op.split()[1].split(":")[0])] = tensor
        elif op == "T":
            out[theirs] = tensor.T.contiguous()
        elif ".attn_1." in theirs and tensor.ndim == 2:
            out[theirs] = tensor[:, :, None, None]
        else:
            out[theirs] = tensor
    out |= {theirs: torch.cat([blocks[i] for i in sorted(blocks)]) for theirs, blocks in rows.items()}
    assert len(pairs) == len(tensors)
    return out


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def converted(tensors: Tensors, rules: list[Rule]) -> dict[str, Tensors]:
    return split_parts(convert(tensors, rules, "small")[0])


def filled(make: Callable[[], nn.Module], tensors: Tensors) -> Any:
    with torch.device("meta"):
        module = make()
    load_strict(module, tensors, "small")
    return module.eval()


# --- the UNet ---------------------------------------------------------------------------------------------------------


def unet_of_diffusers(cfg: UNetConfig) -> Any:
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(cfg.depths)]
    extra: dict[str, Any] = {}
    if cfg.pooled_dim:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": cfg.size_dim,
            "projection_class_embeddings_input_dim": cfg.pooled_dim + cfg.size_numbers * cfg.size_dim,
        }
    return diffusers.UNet2DConditionModel(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=cfg.channels,
        layers_per_block=cfg.layers,
        attention_head_dim=cfg.heads,  # misnamed: the number of heads
        cross_attention_dim=cfg.context_dim,
        transformer_layers_per_block=[max(depth, 1) for depth in cfg.depths],
        use_linear_projection=cfg.linear_proj,
        **extra,
    )


@torch.no_grad()
def unet_error(ours: UNet, theirs: Any) -> float:
    cfg = ours.cfg
    given = {"latents": draw(2, 4, 8, 8), "timesteps": torch.tensor([961, 40]), "context": draw(2, 5, cfg.context_dim)}
    extra = {}
    if cfg.pooled_dim:
        given |= {"pooled": draw(2, cfg.pooled_dim), "size_ids": torch.arange(12.0).reshape(2, 6)}
        extra["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": given["size_ids"]}
    want = theirs(given["latents"], given["timesteps"], given["context"], **extra).sample
    return apart(ours(**given), want)


@pytest.mark.parametrize("name, cfg", [("sd15_unet", SD), ("sdxl_unet", XL)])
def test_single_file_unet(name: str, cfg: UNetConfig, manifest: Manifest) -> None:
    theirs = shaken(lambda: unet_of_diffusers(cfg))
    pairs = manifest("name_maps")["maps"][name]
    source = under(UNET, published_names(theirs.state_dict(), pairs))
    single = sdxl_single_file if cfg.pooled_dim else sd15_single_file
    rules = [r for r in single(cfg, SMALL_VAE, source.keys()) if "conditioner" not in str(r)]
    parts = converted(source, rules)
    assert unet_error(filled(lambda: UNet(cfg), parts["unet"]), theirs) < TOLERANCE

    back = convert(under("unet.", parts["unet"]), inverted(rules), "small")[0]
    assert back.keys() == source.keys() and all(torch.equal(back[key], source[key]) for key in source)

    # a swap of two equally wide layers goes unnoticed by names and shapes; it must show here
    a, b = f"{UNET}output_blocks.4.0.emb_layers.1.weight", f"{UNET}output_blocks.3.0.emb_layers.1.weight"
    swapped = converted(source | {a: source[b], b: source[a]}, rules)
    assert unet_error(filled(lambda: UNet(cfg), swapped["unet"]), theirs) > 20 * TOLERANCE


def test_running_average(manifest: Manifest) -> None:
    """The average is another network: it is the one that is loaded, and the plain one on request."""
    plain, averaged = shaken(lambda: unet_of_diffusers(SD)), shaken(lambda: unet_of_diffusers(SD))
    for parameter in averaged.parameters():
        parameter.data *= 1.1
    pairs = manifest("name_maps")["maps"]["sd15_unet"]
    source = under(UNET, published_names(plain.state_dict(), pairs))
    source |= {ema_name(k): v for k, v in under(UNET, published_names(averaged.state_dict(), pairs)).items()}
    for ema, theirs, other in ((True, averaged, plain), (False, plain, averaged)):
        ours = converted(source, sd15_single_file(SD, SMALL_VAE, source.keys(), ema))["unet"]
        assert unet_error(filled(lambda: UNet(SD), ours), theirs) < TOLERANCE
        assert unet_error(filled(lambda: UNet(SD), ours), other) > 20 * TOLERANCE


# --- the autoencoder --------------------------------------------------------------------------------------------------


def vae_of_diffusers() -> Any:
    cfg, levels = SMALL_VAE, len(SMALL_VAE.channels)
    return diffusers.AutoencoderKL(
        block_out_channels=cfg.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=cfg.layers,
        norm_num_groups=cfg.groups,
    )


def exported(tensors: Tensors) -> Tensors:
    """Original names with diffusers' attention inside, as matrices: what some exporters write."""
    names = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
    out = {}
    for key, tensor in tensors.items():
        change = next((pair for pair in names.items() if f".attn_1{pair[0]}" in key), None)
        out[key.replace(*change) if change else key] = tensor.flatten(1) if change and tensor.ndim == 4 else tensor
    return out


@pytest.mark.parametrize("naming", ["original", "old", "new", "exported", "with leftovers"])
@torch.no_grad()
def test_vae(naming: str, manifest: Manifest) -> None:
    theirs = shaken(vae_of_diffusers)
    maps = manifest("name_maps")["maps"]
    original = published_names(theirs.state_dict(), maps["vae_new"])
    source, rules = original, vae_ldm(SMALL_VAE)
    if naming == "old":
        source = {
            old: t[:, :, 0, 0] if t.ndim == 4 and ".attentions." in old else t
            for ldm, old, _ in maps["vae_old"]
            for t in [original[ldm]]
        }
        assert any(".query." in key for key in source)
        rules = vae_diffusers(SMALL_VAE, old=True)
    elif naming == "new":
        source, rules = theirs.state_dict(), vae_diffusers(SMALL_VAE)
    elif naming == "exported":
        source = exported(original)
    elif naming == "with leftovers":
        source = original | {"model_ema.decay": torch.ones(()), "loss.logvar": torch.ones(())}
        rules = vae_ldm_file(SMALL_VAE)
    tensors = convert(source, rules, "small")[0]
    ours = filled(lambda: VAE(SMALL_VAE), tensors)
    pixels, latents = draw(1, 3, 32, 24), draw(1, 4, 4, 3)
    scale = SMALL_VAE.scaling_factor
    assert apart(ours.encode(pixels).mean / scale, theirs.encode(pixels).latent_dist.mean) < TOLERANCE
    assert apart(ours.decode(latents * scale), theirs.decode(latents).sample) < TOLERANCE

    query, key = (f"encoder.mid_block.attentions.0.to_{x}.weight" for x in "qk")
    wrong = filled(lambda: VAE(SMALL_VAE), tensors | {query: tensors[key], key: tensors[query]})
    wrong.encoder.mid_block.attentions[0].to_q.bias.data += 1
    assert apart(wrong.encode(pixels).mean / scale, theirs.encode(pixels).latent_dist.mean) > 20 * TOLERANCE

    if naming in ("original", "old", "new"):
        back = convert(tensors, inverted(rules), "small")[0]
        assert back.keys() == source.keys() and all(torch.equal(back[k], source[k]) for k in source)


# --- CLIP -------------------------------------------------------------------------------------------------------------


def sizes(cfg: CLIPTextConfig | CLIPVisionConfig) -> dict[str, Any]:
    return {
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "hidden_act": cfg.activation,
        "projection_dim": cfg.projection_dim or 24,
    }


def text_config(cfg: CLIPTextConfig) -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.max_length, eos_token_id=97, **sizes(cfg)
    )


def without_ids(module: nn.Module) -> Tensors:
    return {k: v for k, v in module.state_dict().items() if not k.endswith("position_ids")}


def prompts() -> Tensor:
    ids = torch.randint(2, 97, (3, 20), generator=torch.Generator().manual_seed(13))
    ids[:, 9:] = 97
    return ids


@torch.no_grad()
def text_error(cfg: CLIPTextConfig, tensors: Tensors, theirs: Any) -> float:
    ours = filled(lambda: CLIPTextModel(replace(cfg, eos_token_id=97)), tensors)
    found, want = ours(prompts()), theirs(prompts())
    pooled = want.text_embeds if cfg.projection_dim else want.pooler_output
    return max(apart(found.last_hidden_state, want.last_hidden_state), apart(found.pooled, pooled))


@pytest.mark.parametrize("ids", ["absent", "int64", "float16", "bfloat16", "wrong"])
@pytest.mark.parametrize("level", [True, False], ids=["text_model", "flat"])
def test_text_encoder(level: bool, ids: str) -> None:
    """With and without the `text_model.` level, position_ids in every state: always the same encoder."""
    theirs = shaken(lambda: transformers.CLIPTextModel(text_config(TEXT)))
    tensors = {k.removeprefix("text_model."): v for k, v in without_ids(theirs).items()}
    kinds = {"int64": torch.int64, "float16": torch.float16, "bfloat16": torch.bfloat16, "wrong": torch.float32}
    if ids in kinds:
        counted = torch.arange(20)[None].to(kinds[ids])
        tensors["embeddings.position_ids"] = counted.flip(1) if ids == "wrong" else counted
    source = under("text_model." if level else "", tensors)
    single = converted(
        under("cond_stage_model.transformer.", source), prefixed(clip_text(), "cond_stage_model.transformer.", "x.")
    )
    assert text_error(TEXT, single["x"], theirs) < TOLERANCE
    alone = convert(source, clip_text() if level else clip_text_flat(), "small")[0]
    assert alone.keys() == single["x"].keys() and all(torch.equal(alone[k], single["x"][k]) for k in alone)


@pytest.mark.parametrize("form", ["openclip", "turned", "transformers"])
def test_text_projection(form: str, manifest: Manifest) -> None:
    """Pooled texts agree in all three forms of the same square matrix; the other orientation would show."""
    theirs = shaken(lambda: transformers.CLIPTextModelWithProjection(text_config(TEXT_G)))
    tensors = without_ids(theirs)
    assert tensors["text_projection.weight"].shape == (40, 40)
    pairs = manifest("name_maps")["maps"]["sdxl_clip_g"]
    source = published_names(tensors, pairs) | {"logit_scale": torch.tensor(4.6)}
    rules = openclip_text()
    if form == "turned":
        source["text_projection.weight"] = source.pop("text_projection").T
    elif form == "transformers":
        source, rules = tensors, clip_text(projection=True)
    ours = convert(source, rules, "small")[0]
    assert text_error(TEXT_G, ours, theirs) < TOLERANCE
    turned = ours | {"text_projection.weight": ours["text_projection.weight"].T}
    assert text_error(TEXT_G, turned, theirs) > 20 * TOLERANCE

    # by hand: OpenCLIP multiplies the end token's normed row by its matrix from the right
    hidden = theirs(prompts()).last_hidden_state[:, 9]
    by_hand = hidden @ published_names(tensors, pairs)["text_projection"]
    assert apart(theirs(prompts()).text_embeds, by_hand) < TOLERANCE


def whole_clip() -> tuple[CLIPTextConfig, Any]:
    text = CLIPTextConfig(99, 48, 80, 12, 4, 20, projection_dim=24)
    config = transformers.CLIPConfig(
        text_config=text_config(text).to_dict(),
        vision_config={"image_size": VISION.image_size, "patch_size": VISION.patch_size, **sizes(VISION)},
        projection_dim=24,
    )
    return text, shaken(lambda: transformers.CLIPModel(config))


@pytest.mark.parametrize("naming", ["transformers", "openai", "torchscript"])
@torch.no_grad()
def test_whole_clip(naming: str, manifest: Manifest) -> None:
    text, theirs = whole_clip()
    source, rules = theirs.state_dict(), clip_both()
    if naming != "transformers":
        source = published_names(without_ids(theirs), manifest("name_maps")["maps"]["openai_vit_b32"])
        rules = openclip_both()
    if naming == "torchscript":
        source |= {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    parts = converted(source, rules)
    ours = filled(lambda: CLIPVisionModel(VISION), parts["image_encoder"])
    pixels = draw(2, 3, 21, 21)
    pooled = theirs.vision_model(pixels).pooler_output
    assert apart(ours(pixels).image_embeds, theirs.visual_projection(pooled)) < TOLERANCE
    encoder = filled(lambda: CLIPTextModel(replace(text, eos_token_id=97)), parts["text_encoder"])
    assert (
        apart(encoder(prompts()).pooled, theirs.text_projection(theirs.text_model(prompts()).pooler_output)) < TOLERANCE
    )
    assert apart(ours(pixels).image_embeds, theirs.visual_projection(pooled.flip(1))) > 20 * TOLERANCE


@pytest.mark.parametrize("openai", [False, True], ids=["transformers", "openai"])
def test_one_tower_of_clip(openai: bool, manifest: Manifest) -> None:
    """A tower in a file of its own, and one whose neighbour is dropped, give what the file of both gives."""
    _, theirs = whole_clip()
    source, both = theirs.state_dict(), converted(theirs.state_dict(), clip_both())
    images = {k.removeprefix("vision_model."): v for k, v in source.items() if k.startswith("vis")}
    alone, other = clip_vision_flat(), clip_both("")
    if openai:
        source = published_names(without_ids(theirs), manifest("name_maps")["maps"]["openai_vit_b32"])
        images = {k: v for k, v in source.items() if k.startswith("visual.")}
        alone, other = prefixed(openclip_vision(), "visual."), openclip_both("")
        texts = {k: v for k, v in source.items() if k not in images}
        found = convert(texts, openclip_text(projection=False), "small")[0]
        equal(found, {k: v for k, v in both["text_encoder"].items() if k != "text_projection.weight"})
    equal(convert(images, alone, "small")[0], both["image_encoder"])
    parts = converted(source, other)
    assert parts.keys() == {"image_encoder"}
    equal(parts["image_encoder"], both["image_encoder"])


def equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


# --- a whole folder ---------------------------------------------------------------------------------------------------


def test_folder_of_a_whole_pipeline() -> None:
    """SDXL's four networks in one folder, both text encoders towards their own part."""
    networks = {
        "unet": shaken(lambda: unet_of_diffusers(XL)),
        "vae": shaken(vae_of_diffusers),
        "text_encoder": shaken(lambda: transformers.CLIPTextModel(text_config(TEXT))),
        "text_encoder_2": shaken(lambda: transformers.CLIPTextModelWithProjection(text_config(TEXT_G))),
    }
    source = {f"{name}.{key}": v for name, network in networks.items() for key, v in without_ids(network).items()}
    parts = converted(source, diffusers_folder(XL, SMALL_VAE, source.keys()))
    assert unet_error(filled(lambda: UNet(XL), parts["unet"]), networks["unet"]) < TOLERANCE
    assert text_error(TEXT, parts["text_encoder"], networks["text_encoder"]) < TOLERANCE
    assert text_error(TEXT_G, parts["text_encoder_2"], networks["text_encoder_2"]) < TOLERANCE
    assert parts["vae"].keys() == filled(lambda: VAE(SMALL_VAE), parts["vae"]).state_dict().keys()
    alone = convert(networks["unet"].state_dict(), diffusers_unet(XL), "small")[0]
    assert all(torch.equal(alone[k], parts["unet"][k]) for k in alone)
