"""`python -m weights_convert inspect FILE`: what a weight file is, what it fits and what it lacks."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weights_convert.contents import Accounted, Content, accounted, look
from weights_convert.layout import still_needed
from weights_convert.networks import TITLES

Json = dict[str, Any]
SHORT = 300  # characters of a metadata entry that are shown


def inspect(path: Path, layout: str | None = None) -> Json:
    """The facts of a file, or of every part in a folder. Raises OSError and ConversionError (see `contents.look`)."""
    found = [_one(content) for content in look(path, layout)]
    if len(found) == 1 and found[0]["file"] == str(path):
        return found[0]
    have = [part for one in found for part in one["parts"]]
    families = sorted({base for one in found for base in one["fits"]}) or ["sd15"]
    family = "sdxl" if "text_encoder_2" in have else families[0]
    return {"folder": str(path), "files": found, "needs": list(still_needed((family,), have))}


def _one(content: Content) -> Json:
    result = accounted(content)
    layout, own = content.layout, content.own
    facts: Json = {
        "file": str(content.path),
        "recognised": content.known,
        "bytes": size_of(content.path),
        **numbers(content.tensors),
        "parts": {name: numbers(part.tensors) | {"config": plain(part.config)} for name, part in result.parts.items()},
        "fits": list(layout.fits) if layout else [own.family] if own else [],
        "needs": list(still_needed(layout.fits, result.parts)) if layout else [],
        "metadata": {key: text[:SHORT] for key, text in content.metadata.items()},
    }
    if layout is not None:
        facts |= {"kind": layout.kind, "layout": layout.name, "title": layout.title, "note": layout.note}
        facts |= {"schedule": layout.schedule, "max_frames": layout.max_frames}
    elif own is not None:
        facts |= {"kind": content.part, "layout": "own", "title": f"our own part file: {content.part}"}
        facts |= {"schedule": plain(own.schedule), "max_frames": getattr(own.config, "max_frames", None)}
    elif content.lora is not None:
        lora = content.lora
        facts |= {"kind": "LoRA", "layout": f"lora-{lora.layout}", "title": lora.describe().partition(": ")[2]}
        facts["fits"] = [lora.base] if lora.base else []
    else:
        facts |= {"kind": "not supported" if content.known else "unknown", "title": content.problem}
        if content.refusal is not None:
            facts |= {"title": content.refusal.what, "note": content.refusal.advice}
    return facts | {"dropped": dropped(result), "problems": [] if content.problem else result.problems}


def numbers(tensors: Mapping[str, Tensor]) -> Json:
    """How many tensors and parameters, their bytes, and the tensors of each dtype."""
    kinds = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    return {
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values() if t.is_floating_point()),
        "payload": sum(t.numel() * t.element_size() for t in tensors.values()),
        "dtypes": dict(kinds.most_common()),
    }


def dropped(result: Accounted) -> Json:
    """Reason -> how many keys are read and not kept, or made again when written."""
    out: Counter[str] = Counter()
    for rule, count in result.report.items():
        for word in (" dropped: ", " rebuilt: "):
            if word in rule:
                out[rule.partition(word)[2]] += count
    return dict(out)


def plain(value: Any) -> Any:
    """A dataclass as a dict."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def size_of(path: Path) -> int:
    """Bytes on disk, of a folder all that it holds."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def shown(facts: Json) -> str:
    """The facts for people."""
    if "folder" in facts:
        lines = [shown(one) for one in facts["files"]]
        return "\n".join([*lines, f"{facts['folder']}: {_needs(facts['needs'])}"])
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in facts["dtypes"].items())
    lines = [f"{facts['file']}: {facts['bytes'] / 1e6:,.1f} MB, {facts['tensors']:,} tensors ({kinds})"]
    rows: list[tuple[str, str]] = [("what", facts["title"])]
    if facts.get("layout"):
        rows.append(("layout", facts["layout"]))
    for name, part in facts["parts"].items():
        rows.append(("part", f"{name}: {part['tensors']:,} tensors, {part['parameters']:,} parameters"))
    if facts["fits"]:
        rows.append(("fits", ", ".join(TITLES.get(base, f"base {base!r}") for base in facts["fits"])))
    if facts.get("schedule"):
        rows.append(("schedule", str(facts["schedule"])))
    if facts.get("max_frames"):
        rows.append(("frames", f"{facts['max_frames']} at most"))
    if facts["needs"]:
        rows.append(("", _needs(facts["needs"])))
    rows += [("not kept", f"{count:,} keys: {why}") for why, count in facts["dropped"].items()]
    rows += [("note", facts["note"])] if facts.get("note") else []
    rows += [("problem", text) for text in facts["problems"][:20]]
    if facts["problems"][20:]:
        rows.append(("problem", f"and {len(facts['problems']) - 20} more"))
    for label, text in rows:
        for i, line in enumerate(text.splitlines()):
            start = f"  {label if i == 0 else '':9} "
            lines += textwrap.wrap(line, 118, initial_indent=start, subsequent_indent=" " * 14,
                                   break_on_hyphens=False, break_long_words=False)  # fmt: skip
    return "\n".join(lines)


def _needs(parts: list[str]) -> str:
    return f"needs {', '.join(parts)} from other files" if parts else "complete: every part of a video's pipeline"
