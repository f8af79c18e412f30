"""LoRA files of every published grammar -> low-rank pairs by part and path in our models; and written again.

Read are kohya's files (LoRA and LoCon, text encoders, both namings of SDXL, LCM), the three grammars that diffusers
has had, PEFT's files and folders, AnimateDiff's motion LoRA and domain adapter. Every key is accounted for.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from i2v.models.lora import LoRAPair
from i2v.models.unet import UNetConfig
from weights_convert import files
from weights_convert.detect import detect
from weights_convert.layouts.lora import BASES, GRAMMARS, ROLES, UNSUPPORTED, Base, resolve, width
from weights_convert.rules import ConversionError

log = logging.getLogger(__name__)
Pairs = dict[str, LoRAPair]
FOLDER_FILES = [
    f"{name}.{kind}" for kind in ("safetensors", "bin") for name in ("adapter_model", "pytorch_lora_weights")
]
SETTINGS = "adapter_config.json"  # PEFT's, beside its weights
DIFFUSERS_SETTINGS = "lora_adapter_metadata"  # the same, per part, in a file's metadata
OWN_BASE = "lora_base"  # in our files: the base's config, so that they are read without the model
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # PEFT's, those that leave the base as it is
MOST_UNKNOWN = 16  # layers that a large file may have beside known ones, as some trainers' tools leave them
LARGEST = 100  # levels, layers or blocks in such a config; a spoilt one must not fill the memory with names


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA as pairs. `parts`: unet, text_encoder, text_encoder_2, motion -> path of the layer in ours -> pair.

    layout: the grammar of its keys. base: what it was made for ("sd15", "sdxl", "motion v2", "motion"), None where
    its layers fit several.
    """

    file: str
    layout: str
    base: str | None
    parts: dict[str, Pairs]
    metadata: dict[str, str]

    def describe(self) -> str:
        """One line for people."""
        pairs = [pair for part in self.parts.values() for pair in part.values()]
        ranks = sorted({pair.rank for pair in pairs})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        where = ", ".join(f"{len(part)} layers of {name}" for name, part in self.parts.items())
        return f"{Path(self.file).name}: LoRA ({self.layout}) for {self.base or 'SD1.5 or SDXL'}, {rank}, {where}"


def read_lora(path: str | Path, base: Base | None = None) -> LoRAFile:
    """Read a file, or a folder as PEFT writes it. `base`: the model it is meant for; by default the known ones.

    Raises FileNotFoundError, and ConversionError with every problem: a file that is no LoRA, a kind that is not
    supported (LoHa, LoKr, DoRA, ...: named), one for another base, keys that are unknown, missing, or there twice.
    """
    tensors, metadata, settings = _open(Path(path))
    return lora_of(tensors, metadata, settings, str(path), base)


def weights_of(path: Path) -> Path:
    """The file itself, or that of a folder which is read; raises FileNotFoundError where it has none."""
    if not path.is_dir():
        return path
    inside = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    if not inside:
        raise FileNotFoundError(f"{path}: holds no LoRA, expected one of {', '.join(FOLDER_FILES)}; give "
                                "the file itself")  # fmt: skip
    return inside[0]


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    path = weights_of(path)
    tensors, metadata = files.read(path)
    beside = path.parent / SETTINGS
    settings = {}
    if path.stem == "adapter_model" and beside.is_file():
        settings = _json(beside.read_text(encoding="utf-8"), str(beside))
    return tensors, metadata, settings


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConversionError(f"{where}: no valid JSON ({error}), expected an object; take the file anew") from None
    if not isinstance(found, dict):
        raise ConversionError(f"{where}: expected an object, got {type(found).__name__}; take the file anew")
    return found


def is_lora(keys: Sequence[str]) -> bool:
    """Whether any of a file's keys belongs to a low-rank pair."""
    return any(found and found["role"] for key in keys for found in (p.fullmatch(key) for p in GRAMMARS.values()))


def lora_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    settings: Mapping[str, Any],
    file: str,
    base: Base | None = None,
) -> LoRAFile:
    """`read_lora` for what was read already. `settings` is the content of PEFT's adapter_config.json, or empty."""
    _refuse(tensors, metadata, settings, file)
    layout, named = _grouped(tensors, file)
    pairs = _paired(named, _Alphas(metadata, settings, file), file)
    candidates = [base] if base else _own_base(metadata, file) or BASES
    readings = [(b, *_placed(pairs, b)) for b in candidates]
    fitting = [(b, parts) for b, parts, problems, unknown in readings if not problems and not unknown]
    if not fitting:
        few = min(MOST_UNKNOWN, len(pairs) // 20)
        b, parts, problems, unknown = min(readings, key=lambda reading: len(reading[2]) + len(reading[3]))
        if problems or len(unknown) > few:
            problems += [f"{key}: {b.name} has no such layer" for key in unknown]
            raise ConversionError(f"{file}: {_made_for(pairs, base)}; give such a one, {_listed(problems)}")
        log.warning("%s: %d of %d layers are unknown and left out: %s", file, len(unknown), len(pairs),
                    ", ".join(unknown))  # fmt: skip
        fitting = [(b, parts)]
    found, parts = fitting[0]
    name = found.name if len(fitting) == 1 else None
    if parts.keys() == {"motion"} and (name is None or name == "sd15"):
        name = "motion v2" if any(path.startswith("mid_block.") for path in parts["motion"]) else "motion"
    if any("temporal_transformer" in key for key in named):
        layout = "animatediff"
    return LoRAFile(file, layout, name, parts, dict(metadata))


def _refuse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], settings: Mapping[str, Any], file: str) -> None:
    for pattern, what in UNSUPPORTED.items():
        found = next((key for key in tensors if re.search(pattern, key)), None)
        if found is not None:
            raise ConversionError(
                f"{file}: this is {what}, told by {found}; expected low-rank pairs alone; give a LoRA"
            )
    saved = dict(settings) | _json(metadata.get(DIFFUSERS_SETTINGS, "{}"), f"{file}: {DIFFUSERS_SETTINGS}")
    for key, start in saved.items():
        if key.rpartition(".")[2] == "init_lora_weights" and start not in PLAIN_STARTS:
            raise ConversionError(
                f"{file}: its init_lora_weights is {start!r}: that start changes the base's own weights, and this file "
                f"holds only what was learned on the changed base; expected one of {PLAIN_STARTS}; save it with "
                "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise ConversionError(f"{file}: {SETTINGS} says peft_type {kind}; expected LORA; give a plain LoRA")
    if not is_lora(list(tensors)):
        expected = "expected pairs of lora_down and lora_up; give a LoRA, and this file with its own flag"
        try:
            what = f"in the layout {detect(tensors, file).name!r}"
        except ConversionError as error:
            told = str(error).removeprefix(f"{file}: ").partition(" are in no known layout")[0]
            raise ConversionError(f"{file}: holds no LoRA: {told}; {expected}") from None
        raise ConversionError(f"{file}: holds no LoRA, it is {what}; {expected}")


def _grouped(tensors: Mapping[str, Tensor], file: str) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The grammar that most keys are in, and the tensors by published layer name and role."""
    grammars: Counter[str] = Counter()
    named: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        grammar, found = next(((g, m) for g, p in GRAMMARS.items() if (m := p.fullmatch(key))), ("", None))
        if found is None:
            problems.append(f"{key} {tuple(tensor.shape)}: belongs to no low-rank pair")
            continue
        groups = found.groupdict()
        name = found["name"] + (f".{groups['leaf']}" if groups.get("leaf") else "")
        role = ROLES.get(groups["role"], groups["role"]) if groups["role"] else "alpha"
        grammars[grammar] += role != "alpha"
        if role in named.setdefault(name, {}):
            problems.append(f"{key}: the {role} of {name} is there already")
        named[name][role] = tensor
    if problems:
        raise ConversionError(f"{file}: {_listed(problems)}\nexpected whole low-rank pairs alone; take the file anew")
    return grammars.most_common(1)[0][0], named


def _paired(named: Mapping[str, Mapping[str, Tensor]], alphas: _Alphas, file: str) -> Pairs:
    """Pairs by published layer name."""
    pairs: Pairs = {}
    problems = []
    for name, tensors in named.items():
        lacking = [role for role in ("down", "up") if role not in tensors]
        if lacking:
            problems.append(f"{name}: has {' and '.join(sorted(tensors))}, lacks {' and '.join(lacking)}")
            continue
        down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
        shapes = [tuple(t.shape) for t in (down, up, mid) if t is not None]
        if any(len(shape) not in (2, 4) or 0 in shape for shape in shapes) or up.shape[1] != down.shape[0]:
            problems.append(f"{name}: down, up, ... of shapes {shapes} make no pair of one rank")
            continue
        pairs[name] = LoRAPair(down, up, alphas(name, tensors.get("alpha"), down.shape[0]), mid)
    if problems:
        raise ConversionError(f"{file}: {_listed(problems)}\nexpected whole low-rank pairs alone; take the file anew")
    return pairs


class _Alphas:
    """The alpha of a layer: stored beside it, or in PEFT's settings, of the file or of its folder."""

    def __init__(self, metadata: Mapping[str, str], settings: Mapping[str, Any], file: str):
        self.file, self.settings = file, dict(settings)
        if DIFFUSERS_SETTINGS in metadata:
            self.settings |= _json(metadata[DIFFUSERS_SETTINGS], f"{file}: {DIFFUSERS_SETTINGS}")

    def __call__(self, name: str, stored: Tensor | None, rank: int) -> float | None:
        if stored is not None and stored.numel() != 1:
            raise ConversionError(
                f"{self.file}: the alpha of {name} has shape {tuple(stored.shape)}, expected a number; take it anew"
            )
        if stored is not None:
            return None if stored.is_meta else float(stored.reshape(()))
        try:
            return self._from_settings(name, rank)
        except (re.error, TypeError, ValueError, AttributeError) as error:
            raise ConversionError(
                f"{self.file}: PEFT's settings tell no alpha for {name} ({error}), expected a number; take them anew"
            ) from None

    def _from_settings(self, name: str, rank: int) -> float | None:
        part, _, inside = name.removeprefix("base_model.model.").partition(".")
        if part not in ("unet", "text_encoder", "text_encoder_2"):
            part, inside = "", name.removeprefix("base_model.model.")
        start = f"{part}." if f"{part}.lora_alpha" in self.settings else ""
        alpha = self.settings.get(f"{start}lora_alpha")
        for pattern, value in (self.settings.get(f"{start}alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", inside):
                alpha = value
                break
        if alpha is None:
            return None
        # rank-stabilised LoRA divides by the root of the rank
        return float(alpha) * (rank**0.5 if self.settings.get(f"{start}use_rslora") else 1.0)


def _placed(pairs: Pairs, base: Base) -> tuple[dict[str, Pairs], list[str], list[str]]:
    """The pairs by part and path of ours, what does not fit the base, and names that it has no layer for."""
    parts: dict[str, Pairs] = {}
    taken: dict[tuple[str, str], str] = {}
    problems, unknown = list[str](), list[str]()
    # diffusers' exporter numbers an only text encoder too; of a text encoder alone the number is all that tells SDXL
    one_text = len(base.text) == 1 and not all(name.startswith("lora_te") for name in pairs)
    for name, pair in pairs.items():
        target = resolve(name.replace("lora_te1_", "lora_te_") if one_text else name, base)
        if target is None:
            unknown.append(name)
            continue
        if taken.setdefault(target, name) != name:
            problems.append(f"{name}: {'.'.join(target)} is changed by {taken[target]} already")
            continue
        part, path = target
        has = (pair.up.shape[0], pair.down.shape[1])
        expected = width(part, path, base)
        if expected and has != expected:
            problems.append(f"{name}: changes a weight {has}, that of {base.name} is {expected}")
        parts.setdefault(part, {})[path] = pair
    return parts, problems, unknown


def _made_for(pairs: Pairs, base: Base | None) -> str:
    """Words for a LoRA that does not fit `base`, or none of the known bases."""
    expected = f"expected one for {base.name}" if base else "expected one for SD1.5 or SDXL"
    fitting = [b.name for b in BASES if not any(_placed(pairs, b)[1:])]
    second = [n for n, p in pairs.items() if re.search("attn2.to_k$|lora_te_", n) and 1024 in p.down.shape]
    if second:
        return f"this is a LoRA for Stable Diffusion 2 (its text is 1024 wide), {expected}"
    if fitting:
        return f"this is a LoRA for {' or '.join(fitting)}, {expected}"
    return f"this LoRA does not fit, {expected}"


def _own_base(metadata: Mapping[str, str], file: str) -> list[Base]:
    if OWN_BASE not in metadata:
        return []
    found = _json(metadata[OWN_BASE], f"{file}: {OWN_BASE}")
    try:
        unet: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found["unet"].items()}
        cfg = UNetConfig(**unet)
        if max(len(cfg.channels), cfg.layers, cfg.mid_depth, *cfg.depths) > LARGEST:
            raise ValueError(f"more than {LARGEST} of something")
        return [Base(str(found["name"]), cfg, tuple(found["text"]))]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConversionError(
            f"{file}: {OWN_BASE} in its metadata is not what was written ({error}), expected a base; take the file anew"
        ) from None


def _listed(problems: Sequence[str], most: int = 4) -> str:
    more = f"\n  ... and {len(problems) - most} more" if len(problems) > most else ""
    return f"{len(problems)} problem{'s' * (len(problems) > 1)}:\n  " + "\n  ".join(problems[:most]) + more
