"""`python -m weights_convert check FILE --for sd15`: whether a file fits a base, every key accounted for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from i2v.models.clip_text import CLIPTextConfig
from weights_convert.contents import Content, accounted, look
from weights_convert.layout import still_needed
from weights_convert.layouts.lora import BASES
from weights_convert.lora import read_lora
from weights_convert.networks import FAMILIES, TITLES, misfits
from weights_convert.own_format import Part
from weights_convert.rules import ConversionError

Json = dict[str, Any]


def check(path: Path, family: str, layout: str | None = None, ema: bool = True) -> Json:
    """How many keys each rule claims, what is dropped and why, and every problem; no tensor is read.

    Raises OSError for what is not there and ConversionError for what is damaged.
    """
    rows = [_one(content, family, ema) for content in look(path, layout)]
    have = {part for row in rows for part in row["parts"]}
    return {"file": str(path), "for": family, "fits": all(not row["problems"] for row in rows), "contents": rows,
            "needs": list(still_needed((family,), have))}  # fmt: skip


def _one(content: Content, family: str, ema: bool) -> Json:
    result = accounted(content, family, ema)
    problems = list(result.problems) if content.refusal is None else [content.refusal.advice]
    layout = content.layout
    if layout is not None and family not in layout.fits and layout.fits:
        problems.insert(0, f"it is made for {' and '.join(TITLES[x] for x in layout.fits)}, not for {TITLES[family]}")
    elif layout is not None and not layout.fits:
        problems.insert(0, f"it serves no video with {TITLES[family]}: {layout.note or layout.title}")
    elif content.own is not None and content.own.family != family:
        problems.append(f"it is a part of a model of the base {content.own.family!r}, not of {TITLES[family]}")
    elif content.lora is not None:
        problems += _of_lora(content, family)
    elif not problems:
        for name, part in result.parts.items():
            problems += fitting(name, part, family)
    return {
        "file": str(content.path),
        "layout": layout.name
        if layout
        else "own"
        if content.own
        else f"lora-{content.lora.layout}"
        if content.lora
        else None,
        "title": title_of(content),
        "keys": len(content.tensors),
        "claimed": sum(result.report.values()) if content.lora is None else len(content.tensors),
        "rules": dict(result.report),
        "parts": list(result.parts),
        "problems": problems,
    }


def _of_lora(content: Content, family: str) -> list[str]:
    """The same pairs read as those of this base: a layer that it has not, or of another shape, is an error."""
    if content.lora is not None and str(content.lora.base).startswith("motion"):
        return [] if family == "sd15" else [f"it is for AnimateDiff's motion modules of {TITLES['sd15']}"]
    base = next(base for base in BASES if base.name == family)
    try:
        read_lora(content.path, base)
    except ConversionError as error:
        return str(error).splitlines()
    return []


def title_of(content: Content) -> str:
    """What a content is, in words."""
    if content.layout is not None:
        return content.layout.title
    if content.lora is not None:
        return content.lora.describe().partition(": ")[2]
    if content.refusal is not None:
        return content.refusal.what
    return f"our own part file: {content.part}" if content.own is not None else content.problem.splitlines()[0]


def fitting(name: str, part: Part, family: str) -> list[str]:
    """What keeps a part from working with a base: another config, or keys and shapes that our network has not."""
    settled = FAMILIES[family]
    config = part.config
    if config is None:
        config = settled.get(name)
    elif name in ("unet", "text_encoder", "text_encoder_2", "controlnet") and not _same(config, settled.get(name)):
        want = settled.get(name)
        return [f"{name}: it is {config}, expected {want}" if want else f"{name}: {TITLES[family]} has no such part"]
    elif name == "ip_adapter" and config.context_dim != settled["unet"].context_dim:
        return [
            f"{name}: its image tokens are {config.context_dim} wide, {TITLES[family]} reads "
            f"{settled['unet'].context_dim}; take the IP-Adapter for {TITLES[family]}"
        ]
    return misfits(name, part.tensors, config, settled["unet"])


def _same(config: Any, want: Any) -> bool:
    """Whether two configs are of one network; a text encoder may bring a projection that is not used."""
    if isinstance(config, CLIPTextConfig) and isinstance(want, CLIPTextConfig) and not want.projection_dim:
        config = replace(config, projection_dim=0)
    return bool(config == want)


def shown(facts: Json) -> str:
    """The facts for people; what matters most stands last."""
    lines = []
    for row in facts["contents"]:
        lines.append(f"{row['file']}: {row['keys']:,} keys, {row['title']}")
        kept = {rule: count for rule, count in row["rules"].items() if " dropped: " not in rule}
        lines += [f"  {count:6,}  {rule}" for rule, count in kept.items()]
        lines += [f"  {count:6,}  {rule}" for rule, count in row["rules"].items() if rule not in kept]
        lines.append(f"  {row['claimed']:6,}  of {row['keys']:,} keys accounted for")
        lines += [f"  problem: {text}" for text in row["problems"][:20]]
        lines += [f"  and {len(row['problems']) - 20:,} more problems"] if row["problems"][20:] else []
    if facts["fits"]:
        lacks = facts["needs"] if Path(facts["file"]).is_dir() else []  # of a single file nobody asks
        more = f"; a video needs {', '.join(lacks)} from other files" if lacks else ""
        return "\n".join([*lines, f"{facts['file']} fits {TITLES[facts['for']]}{more}"])
    advice = f"take the whole file anew, or one that was made for {TITLES[facts['for']]}"
    return "\n".join([*lines, f"{facts['file']} does not fit {TITLES[facts['for']]}: {advice}"])
