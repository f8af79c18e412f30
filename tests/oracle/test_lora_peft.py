"""LoRA against PEFT and diffusers: what they save is merged as they merge it, what we write they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_unet_diffusers import CONFIGS, given, relative, theirs
from torch import Tensor, nn

from i2v.lora import merge
from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.lora import LoRAPair, TrainedLoRA
from i2v.models.unet import UNet
from weights_convert.layouts.lora import Base
from weights_convert.write_lora import LAYOUTS, write_lora

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers.loaders import StableDiffusionLoraLoaderMixin as Pipeline  # noqa: E402
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as PipelineXL  # noqa: E402

TOLERANCE = 1e-5  # relative to the largest value
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut"]
SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 6},
    "patterns": {
        "lora_alpha": 6,
        "rank_pattern": {"attn1.to_q": 7, "conv1": 2},
        "alpha_pattern": {"attn1.to_q": 3, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 9},
    },
    "rank-stabilised": {"lora_alpha": 6, "use_rslora": True},
}


def adapted(kind: str, settings: dict[str, Any]) -> tuple[UNet, nn.Module, dict[str, Tensor]]:
    """Ours and diffusers' with the same weights, the latter with a random adapter; and the weights."""
    reference = theirs(CONFIGS[kind])
    weights = {k: v.clone() for k, v in reference.state_dict().items()}
    with torch.device("meta"):
        unet = UNet(CONFIGS[kind])
    unet.load_state_dict({k: v.clone() for k, v in weights.items()}, assign=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        reference.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **settings))
    for name, p in reference.named_parameters():
        if "lora_" in name:
            p.data *= 0.3  # PEFT's random start would drown the weights
    return unet, reference, weights


@torch.no_grad()
def outputs(unet: nn.Module, reference: nn.Module, kind: str) -> tuple[Tensor, Tensor]:
    tensors = given(CONFIGS[kind])
    extra = {}
    if "pooled" in tensors:
        extra["added_cond_kwargs"] = {"text_embeds": tensors["pooled"], "time_ids": tensors["size_ids"]}
    want = reference(tensors["latents"], tensors["timesteps"], tensors["context"], **extra).sample
    return unet(**tensors), want


@pytest.mark.parametrize("kind, name", [("SDXL", "patterns"), *(("miniature", name) for name in SETTINGS)])
def test_merged_equals_peft(kind: str, name: str, tmp_path: Path) -> None:
    """Saved by diffusers with PEFT's settings in the metadata, merged by us: its outputs, its fused weights."""
    unet, reference, weights = adapted(kind, SETTINGS[name])
    layers = peft.get_peft_model_state_dict(reference)
    Pipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=reference.peft_config["default"].to_dict()
    )
    plain = unet(**given(CONFIGS[kind])).detach()
    merged = merge({"unet": unet}, tmp_path / "pytorch_lora_weights.safetensors", 0.7)
    assert merged.count["unet"] == len(layers) // 2
    reference.set_adapters(["default"], [0.7])
    got, want = outputs(unet, reference, kind)
    assert relative(got, want) < TOLERANCE < 0.01 < relative(plain, want)

    reference.set_adapters(["default"], [1.0])
    reference.fuse_lora(lora_scale=0.7)
    reference.unload_lora()
    now = unet.state_dict()
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(now[key], value, rtol=TOLERANCE, atol=TOLERANCE, msg=key)
    merged.remove()
    now = unet.state_dict()
    assert all(torch.equal(now[key], value) for key, value in weights.items())


def test_a_wrong_alpha_is_seen(tmp_path: Path) -> None:
    unet, reference, _ = adapted("miniature", SETTINGS["patterns"])
    layers = peft.get_peft_model_state_dict(reference)
    facts = {**reference.peft_config["default"].to_dict(), "lora_alpha": 6.06}
    Pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=facts)
    merge({"unet": unet}, tmp_path / "pytorch_lora_weights.safetensors")
    assert relative(*outputs(unet, reference, "miniature")) > 10 * TOLERANCE


@pytest.mark.parametrize("name", SETTINGS)
def test_text_encoder_from_a_folder(name: str, tmp_path: Path) -> None:
    """PEFT's own folder: adapter_model.safetensors and adapter_config.json."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64}
    ours = CLIPTextModel(CLIPTextConfig(num_layers=2, num_heads=4, eos_token_id=98, max_length=12, **sizes))
    config = transformers.CLIPTextConfig(
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=12, eos_token_id=98, **sizes
    )
    reference = transformers.CLIPTextModel(config).eval()
    level = "" if any(k.startswith("text_model.") for k in reference.state_dict()) else "text_model."
    ours.load_state_dict({level + k: v for k, v in reference.state_dict().items() if "position_ids" not in k})
    settings = {k: v for k, v in SETTINGS[name].items() if not k.endswith("pattern")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "out_proj", "fc1"], init_lora_weights=False, **settings)
        adapted = peft.get_peft_model(reference, lora)
    adapted.save_pretrained(tmp_path)
    ids = torch.tensor([[97, 5, 6, 98, 98, 98]])
    with torch.no_grad():
        plain, want = ours(ids).last_hidden_state, adapted(ids).last_hidden_state
        merged = merge({"text_encoder": ours}, tmp_path)
        assert merged.count == {"text_encoder": 6}
        got = ours(ids).last_hidden_state
    assert relative(got, want) < TOLERANCE < 0.01 < relative(plain, want)


@pytest.mark.parametrize("kind, layout", [*(("miniature", layout) for layout in LAYOUTS), ("SDXL", "kohya")])
def test_diffusers_reads_what_we_write(kind: str, layout: str, tmp_path: Path) -> None:
    """A LoRA trained here, loaded by diffusers' pipeline loaders, gives what it gave in training."""
    unet, reference, _ = adapted(kind, SETTINGS["alpha"])
    reference.unload_lora()
    generator = torch.Generator().manual_seed(3)
    lora = TrainedLoRA(unet, ["*.attn?.to_*", "*.ff.net.2", "*.conv1"], rank=3, generator=generator, alpha=5.0)
    for p in lora.parameters.values():
        p.data += torch.randn(p.shape, generator=generator) * 0.05
    cfg = CONFIGS[kind]
    base = Base("small", cfg, (20, 20) if kind == "SDXL" else (cfg.context_dim,))
    path = write_lora(tmp_path / "x.safetensors", {"unet": lora.pairs()}, base, layout)

    pipeline = PipelineXL if kind == "SDXL" else Pipeline
    state, alphas, metadata = pipeline.lora_state_dict(
        str(path), unet_config=reference.config, return_lora_metadata=True
    )
    if layout == "kohya":
        assert alphas
    else:
        assert metadata
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=reference, metadata=metadata)
    got, want = outputs(lora, reference, kind)
    with torch.no_grad():
        plain = unet(**given(cfg))
    assert relative(got.detach(), want) < TOLERANCE < 0.01 < relative(plain, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_text_encoder_reads_what_we_write(layout: str, tmp_path: Path) -> None:
    """With ranks and alphas that differ from layer to layer, whatever levels the class has in its names.

    Of a kohya file diffusers makes the settings itself, and then finds no single alphas in transformers 5.
    """
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64}
    config = transformers.CLIPTextConfig(
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=12, eos_token_id=98, **sizes
    )
    reference = transformers.CLIPTextModel(config).eval()
    generator = torch.Generator().manual_seed(3)
    pairs, changes = {}, {}
    for n, leaf in enumerate(("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj")):
        rank, alpha, layer = 2 + n % 2, 5.0 + n % 2 * (layout != "kohya"), f"encoder.layers.{n % 2}.{leaf}"
        down, up = (torch.randn(shape, generator=generator) * 0.1 for shape in ((rank, 32), (32, rank)))
        pairs[f"text_model.{layer}"], changes[layer] = LoRAPair(down, up, alpha), alpha / rank * up @ down
    base = Base("small", CONFIGS["miniature"], (32,))
    path = write_lora(tmp_path / "x.safetensors", {"text_encoder": pairs}, base, layout)

    state, alphas, metadata = Pipeline.lora_state_dict(str(path), return_lora_metadata=True)
    wanted = {key.removeprefix("text_model."): value.clone() for key, value in reference.state_dict().items()}
    for layer, change in changes.items():
        wanted[f"{layer}.weight"] += change
    Pipeline.load_lora_into_text_encoder(
        state, alphas, reference, prefix="text_encoder", metadata=metadata, adapter_name="x"
    )
    for name, module in reference.named_modules():
        if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
            module.merge()
            key = name.removeprefix("text_model.") + ".weight"
            torch.testing.assert_close(module.get_base_layer().weight, wanted[key], msg=key)
            del changes[name.removeprefix("text_model.")]
    assert not changes, "every layer is changed"
