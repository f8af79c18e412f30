"""LoRA files in a model: read in any published grammar, merged, taken out again.

merged = merge({"unet": unet, "text_encoder": text_encoder}, "style.safetensors", 0.8)
print(merged.describe())
merged.remove()

Where a model is read from files, `Changes` are added to each weight as it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from i2v.models.clip_text import CLIPTextModel
from i2v.models.lora import LoRAPair, Merged, changed, merge_lora, unfit
from i2v.models.unet import SD15, UNet
from weights_convert.layouts.lora import BASES, Base
from weights_convert.lora import LoRAFile, read_lora
from weights_convert.rules import ConversionError

TEXT_PARTS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class MergedFile:
    """A LoRA file in a model. `count`: layers changed in each part."""

    file: LoRAFile
    scale: float
    merged: Mapping[str, Merged]

    @property
    def count(self) -> dict[str, int]:
        return {part: merged.count for part, merged in self.merged.items()}

    def remove(self) -> None:
        """Take it out; see `Merged.remove`. A second call does nothing."""
        for merged in self.merged.values():
            merged.remove()

    def describe(self) -> str:
        """One line for people."""
        return f"{self.file.describe()}, merged at {self.scale:g}"


def merge(
    modules: Mapping[str, nn.Module], path: str | Path, scale: float = 1.0, ignore_alpha: bool = False
) -> MergedFile:
    """Merge a LoRA file into a model, all of it or nothing.

    modules: "unet", "text_encoder", "text_encoder_2", and "motion", the UNet with its motion modules: the parts that
    may be changed. scale: strength, 1 as trained; negative ones turn the effect round.
    ignore_alpha: leave out the factor alpha / rank, as the released code of AnimateDiff and I2V-Adapter does.
    Raises FileNotFoundError, and ConversionError for a file that is no LoRA, one of another base, or one that changes
    parts or layers that are not there.
    """
    file = check(modules, path)
    merged: dict[str, Merged] = {}
    try:
        for part, pairs in file.parts.items():
            merged[part] = merge_lora(modules[part], pairs, scale, ignore_alpha)
    except ValueError as error:
        for done in merged.values():
            done.remove()
        raise ConversionError(f"{path}: {error}; expected a LoRA for this model, give one") from None
    return MergedFile(file, scale, merged)


class Changes:
    """What LoRA files change in the weights of a model that is read."""

    def __init__(self, ignore_alpha: bool = False):
        self.ignore_alpha = ignore_alpha
        self.of_layer: dict[tuple[str, str], list[tuple[LoRAPair, float, bool]]] = {}
        self.files: dict[tuple[str, str], str] = {}  # of a layer's last change

    def add(self, file: LoRAFile, scale: float) -> None:
        """One more file, found by `check` to fit."""
        for part, pairs in file.parts.items():
            for path, pair in pairs.items():
                layer = "unet" if part == "motion" else part, path
                self.of_layer.setdefault(layer, []).append((pair, scale, self.ignore_alpha))
                self.files[layer] = file.file

    def made(self, network: str, key: str, tensor: Tensor) -> Tensor:
        """The tensor of that name in a network ("unet", "text_encoder", ...) with its changes, in the same number
        format; itself where there are none. Raises ConversionError where it would not be finite.
        """
        layer = network, key.removesuffix(".weight")
        if layer not in self.of_layer:
            return tensor
        try:
            return changed(tensor, self.of_layer[layer], layer[1])
        except ValueError as error:
            raise ConversionError(f"{self.files[layer]}: {error}; give a smaller scale or use float32") from None


def check(modules: Mapping[str, nn.Module], path: str | Path) -> LoRAFile:
    """The file, read and found to fit, with nothing merged; `modules` may be on the meta device. Raises as `merge`."""
    file = read_lora(path, base_of(modules))
    others = [part for part in file.parts if part not in modules]
    if others:
        advice = "--motion-lora" if others == ["motion"] else "--lora" if list(modules) == ["motion"] else ""
        raise ConversionError(
            f"{path}: this LoRA changes {' and '.join(others)}, expected one for {' and '.join(modules)} alone"
            + (f"; give it with {advice}" if advice else "; give such a one")
        )
    for part, pairs in file.parts.items():
        if problems := unfit(modules[part], pairs):
            version_2 = part == "motion" and problems[0].startswith("mid_block.")  # the others have none in the middle
            advice = "it is for motion modules of version 2, give those" if version_2 else "give one for this model"
            raise ConversionError(
                f"{path}: {len(problems)} of {len(pairs)} changes do not fit the {part}, expected layers of its "
                f"shapes, first {problems[0]}; {advice}"
            )
    return file


def base_of(modules: Mapping[str, nn.Module]) -> Base | None:
    """What published names mean in this model; None for text encoders of a known width, where the file decides."""
    found = [modules.get(part) for part in TEXT_PARTS]
    widths = [m.cfg.hidden_size if isinstance(m, CLIPTextModel) else 0 for m in found]  # 0: any
    texts = tuple(widths if widths[1] else widths[:1])
    unet = next((m for part in ("unet", "motion") if isinstance(m := modules.get(part), UNet)), None)
    if unet is None:
        published = any(
            len(texts) <= len(base.text) and all(width in (0, own) for width, own in zip(texts, base.text))
            for base in BASES
        )
        return None if published else Base("this model", SD15, texts)
    known = next((base for base in BASES if base.unet == unet.cfg), None)
    return known or Base("this model", unet.cfg, texts)
