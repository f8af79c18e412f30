"""Names of LoRA files: which key holds what of a pair, and which layer of ours each published name means.

Names are looked up in a table made from the model's config, never taken apart: `to_out_0` and `to_out.0` are two
spellings of one entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from i2v.models.unet import SD15, SDXL, UNetConfig
from weights_convert.layouts.ldm_unet import ldm_unet
from weights_convert.layouts.transformer_blocks import transformer_blocks
from weights_convert.rules import Rename, fill, inverted, match

# The grammars: how a key ends, after the name of the layer.
GRAMMARS = {
    "kohya": re.compile(r"(?P<name>.+)\.(lora_(?P<role>down|up|mid)\.weight|(?P<alpha>alpha))"),
    "diffusers": re.compile(r"(?P<name>.+)\.lora(_linear_layer)?\.(?P<role>down|up)\.weight"),
    "attention-processors": re.compile(
        r"(?P<name>.+?)(\.processor)?\.(?P<leaf>to_[qkv]|to_out)_lora\.(?P<role>down|up)\.weight"
    ),
    "peft": re.compile(r"(?P<name>.+)\.lora_(?P<role>[AB])(\.\w+)?\.weight"),
}
ROLES = {"A": "down", "B": "up"}

# Kinds that hold something else than low-rank pairs, by what their keys contain.
UNSUPPORTED = {
    r"\.hada_": "a LoHa (Hadamard products)",
    r"\.lokr_": "a LoKr (Kronecker products)",
    r"\.dora_scale$|lora_magnitude_vector": "a DoRA (magnitudes beside the low-rank pairs)",
    r"\.oft_|\.boft_|oft_blocks|oft_diag": "an OFT or BOFT (rotations)",
    r"\.on_input$|\.ia3_": "an (IA)3 (factors of activations)",
    r"\.diff(_b)?$|\.set_weight$": "full differences of weights, not low-rank ones",
    r"\.[ab][12]\.weight$": "a GLoRA",
    r"\.[wb]_norm$": "a LoRA with norms",
    r"^bundle_emb\.": "a LoRA with embeddings inside",
    r"lora_embedding_[AB]|modules_to_save": "a PEFT adapter that changes embeddings or saves whole layers",
    r"lora_B(\.\w+)?\.bias$": "a LoRA with biases",
    r"^lora_controlnet$": "a Control-LoRA",
    r"^lllite_": "a ControlLLLite",
    r"to_[kv]_ip|^ip_adapter\.": "an IP-Adapter for faces",
    r"^emb_params$|string_to_param|^clip_[lg]$": "a textual inversion",
    r"double_blocks|single_transformer_blocks|joint_blocks|^(lora_)?transformer[._]": "a LoRA for FLUX or SD3",
}

INNER = [f"{attention}.{leaf}" for attention in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
TEMPORAL = [f"attention_blocks.{k}.{leaf}" for k in (0, 1) for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
TEXT = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
TEXT_LAYERS = 32  # of the largest encoder; names of layers that a model lacks are told when it is merged


@dataclass(frozen=True)
class Base:
    """A model that LoRAs are made for: its UNet and, for each text encoder, the width."""

    name: str
    unet: UNetConfig
    text: tuple[int, ...]  # text_encoder, text_encoder_2; 0 where it is not known

    @property
    def text_parts(self) -> dict[str, int]:
        return dict(zip(("text_encoder", "text_encoder_2"), self.text))


BASES = (Base("sd15", SD15, (768,)), Base("sdxl", SDXL, (768, 1280)))


def unet_layers(cfg: UNetConfig) -> dict[str, str]:
    """Our path of every linear layer and convolution -> its name in the original Stable Diffusion."""
    rules = [rule for rule in ldm_unet(cfg) if isinstance(rule, Rename)]
    leaf = ".{p}"
    ours = [r.target.removesuffix(leaf) for r in rules if r.target.endswith(leaf) and "norm" not in r.target]
    for block in transformer_blocks(cfg):
        place, _, number = block.rpartition(".transformer_blocks.")
        ours += [f"{place}.proj_in", f"{place}.proj_out"] if number == "0" else []
        ours += [f"{block}.{inner}" for inner in INNER + FEED_FORWARD]
    back = [rule for rule in inverted(rules) if isinstance(rule, Rename)]
    return {path: _original(f"{path}.weight", back).removesuffix(".weight") for path in ours}


def _original(key: str, back: list[Rename]) -> str:
    return next(fill(rule.target, values) for rule in back if (values := match(rule.source, key)) is not None)


def motion_layers(cfg: UNetConfig) -> list[str]:
    """Our path of every linear layer of the motion modules; those of the middle too, which only v2 has."""
    levels = range(len(cfg.channels))
    places = [f"down_blocks.{i}.motion_modules.{j}" for i in levels for j in range(cfg.layers)]
    places += [f"up_blocks.{i}.motion_modules.{j}" for i in levels for j in range(cfg.layers + 1)]
    places += ["mid_block.motion_modules.0"]
    inner = [f"transformer_blocks.0.{x}" for x in TEMPORAL + FEED_FORWARD]
    return [f"{place}.{x}" for place in places for x in ("proj_in", "proj_out", *inner)]


def _plain_out(path: str) -> str:
    """Without the number that attention processors leave out."""
    return path.removesuffix(".0") if path.endswith(".to_out.0") else path


def _aliases(base: Base) -> Iterator[tuple[str, tuple[str, str]]]:
    """(a published name, (our part, our path))."""
    for path, original in unet_layers(base.unet).items():
        for name in {path, _plain_out(path)}:
            yield f"unet.{name}", ("unet", path)
        yield f"unet.{original}", ("unet", path)
        for name in {path, original}:
            yield "lora_unet_" + name.replace(".", "_"), ("unet", path)
    for path in motion_layers(base.unet):
        theirs = path.replace(".transformer_blocks.", ".temporal_transformer.transformer_blocks.")
        theirs = re.sub(r"(motion_modules\.\d+)\.(proj_\w+)$", r"\1.temporal_transformer.\2", theirs)
        diffusers = path.replace("attention_blocks.0", "attn1").replace("attention_blocks.1", "attn2")
        for name in {path, theirs, diffusers}:
            yield f"unet.{name}", ("motion", path)
            yield f"unet.{_plain_out(name)}", ("motion", path)
            yield "lora_unet_" + name.replace(".", "_"), ("motion", path)
    for part in base.text_parts:
        prefix = kohya_prefixes(base)[part]
        for n in range(TEXT_LAYERS):
            for leaf in TEXT:
                path = f"text_model.encoder.layers.{n}.{leaf}"
                yield prefix + path.replace(".", "_"), (part, path)
                stem, _, last = path.rpartition(".")
                for name in (path, f"{stem}.{OLD_TEXT.get(last, last)}"):
                    yield f"{part}.{name}", (part, path)
                    yield f"{part}.{name.removeprefix('text_model.')}", (part, path)
                    if len(base.text) == 1:  # of two, a name without its part cannot tell which
                        yield name, (part, path)
                        yield name.removeprefix("text_model."), (part, path)


@lru_cache(maxsize=8)
def table(base: Base) -> Mapping[str, tuple[str, str]]:
    """Every published name of every layer -> (part, path). Raises ValueError should two layers share a name."""
    out: dict[str, tuple[str, str]] = {}
    for name, target in _aliases(base):
        if out.setdefault(name, target) != target:
            raise ValueError(f"{name} is a name of {out[name]} and of {target}")
    return out


def resolve(name: str, base: Base) -> tuple[str, str] | None:
    """(part, path) of a published layer name, or None where the model has no such layer."""
    names = table(base)
    plain = name.removeprefix("base_model.model.")
    if plain.startswith("unet.lora_"):  # of a broken exporter
        plain = plain.removeprefix("unet.")
    return names.get(plain) or names.get(f"unet.{plain}")


def kohya_prefixes(base: Base) -> dict[str, str]:
    """Our part -> how kohya's names of its layers begin."""
    text = ("lora_te_",) if len(base.text) == 1 else ("lora_te1_", "lora_te2_")
    return {"unet": "lora_unet_", "motion": "lora_unet_", **dict(zip(base.text_parts, text))}


def width(part: str, path: str, base: Base) -> tuple[int, int] | None:
    """(out, in) of a layer's weight as far as the path tells, for attentions; None for other layers."""
    if part in base.text_parts:
        own = base.text_parts[part]
        return (own, own) if own and "self_attn" in path else None
    attentions = r"(attn1|attn2|attention_blocks\.\d)"
    found = re.fullmatch(rf"(?:(down|up)_blocks\.(\d+)|mid_block)\..+\.{attentions}\.(to_\w+)(\.0)?", path)
    if found is None:
        return None
    side, level, attention, leaf = found[1], int(found[2] or 0), found[3], found[4]
    own = (base.unet.channels if side == "down" else base.unet.channels[::-1])[level]
    return own, base.unet.context_dim if attention == "attn2" and leaf in ("to_k", "to_v") else own
