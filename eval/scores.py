"""Everything that is measured in one video of any origin, and which columns of a table hold it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from eval.flow_networks import Dis, FlowNetwork
from eval.metrics.all import measure_clip
from eval.metrics.camera import CAMERAS
from eval.metrics.clip_temp import clip_temp
from eval.metrics.dover_vqa import dover_vqa
from eval.metrics.flow_score import flow_score
from eval.metrics.motion_class import MOTIONS
from eval.metrics.text_alignment import text_alignment
from eval.metrics.warping_error import warping_error
from eval.networks import Networks
from eval.tables import COLUMNS, Column
from i2v import picture
from i2v.free_memory import is_out_of_memory
from i2v.models import clip_vision
from i2v.picture import centre_crop

Video = NDArray[np.uint8]
OUT_OF_MEMORY = "out of memory; give smaller videos, or fewer --workers"  # true of this run alone: not kept for others
# what the paper's tables hold; a network that is not the paper's never writes here
PAPER = (Column("dover_vqa", "DoverVQA", 4), Column("clip_temp", "CLIPTemp", 4), Column("flow_score", "FlowScore", 4),
         Column("warping_error", "WarpingError x 10,000", 2))  # fmt: skip
SCALES = {"warping_error": 1e4}  # of what is shown; the raw value is what is stored
UNGUIDED = ("motion_right", "similarity_psnr", "similarity_ssim", "colour_drift", "flicker")  # of `measure_clip`


@dataclass(frozen=True)
class Switches:
    """How it is measured. evalcrafter: CLIPTemp, FlowScore and WarpingError as EvalCrafter's code computes them."""

    evalcrafter: bool = False
    seed: int = 0  # of DOVER's random fragments


@dataclass
class Scores:
    """values: by column, raw. reasons: by column, why there is no value. details: all that the metrics returned."""

    values: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def columns(found: Sequence[Scores]) -> tuple[tuple[Column, ...], list[Column]]:
    """Those of the paper, always all four, and the others that any video has; each of these names its network."""
    names = dict.fromkeys(name for s in found for name in (*s.values, *s.reasons))
    paper = {c.name for c in PAPER}
    rest = [name for name in (*UNGUIDED, *names) if name in names and name not in paper]
    return PAPER, [COLUMNS.get(name) or _column(name) for name in dict.fromkeys(rest)]


def _column(name: str) -> Column:
    """`flow_score (DIS)` -> FlowScore (DIS)."""
    known = {c.name: c for c in (*PAPER, Column("text_alignment", "text alignment", 3),
                                 Column("dover_aesthetic", "DOVER aesthetic", 3))}  # fmt: skip
    base, _, network = name.partition(" ")
    return Column(name, f"{known[base].head} {network}".strip(), min(known[base].digits, 3))


def shown(name: str, value: float) -> float:
    """A raw value as the tables show it."""
    return value * SCALES.get(name.partition(" ")[0], 1.0)


def score(frames: Video, picture: Video | None, prompt: str, mask: Video | None, networks: Networks,
          switches: Switches = Switches()) -> Scores:  # fmt: skip
    """Measures a video, uint8 (F, H, W, 3) RGB, F >= 2.

    picture: (H, W, 3), what the video was made from, cropped as the generator saw it; without one, CLIPTemp is left
    out and the rest compares with frame 0. mask: (H, W), non-zero on the picture's one object, whose motion is then
    compared with the one that the prompt asks for.
    """
    out = Scores()
    own = switches.evalcrafter
    reference, pixels = ("consecutive", "evalcrafter") if own else ("image", "clip")

    def attempt(name: str, call: Callable[[], Any], read: Callable[[Any], float] = lambda r: float(r.value)) -> Any:
        try:
            result = call()
        except ValueError as error:  # what metrics raise for what they cannot measure; MissingNetwork is one
            out.reasons[name] = str(error)
            return None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out.reasons[name] = OUT_OF_MEMORY
            return None
        value = read(result)
        if not math.isfinite(value):  # a table has no mean of it
            out.reasons[name] = f"what came out is no finite number ({value})"
            return None
        out.values[name] = value
        out.details[name] = {key: _plain(value) for key, value in dataclasses.asdict(result).items() if key != "value"}
        return result

    def flows(network: FlowNetwork | None, variant: Any) -> None:
        beside = network is None or network.beside_paper
        suffix = "" if network is None or beside else f" ({network.name})"
        attempt("flow_score" + suffix, lambda: flow_score(frames, network, padded=own))
        attempt("warping_error" + suffix, lambda: warping_error(frames, network, variant))

    rated = attempt("dover_vqa", lambda: dover_vqa(frames, networks.dover, switches.seed), lambda r: float(r.technical))
    if rated is not None and rated.aesthetic is not None:
        out.values["dover_aesthetic"] = rated.aesthetic
    attempt("clip_temp", lambda: clip_temp(frames, networks.clip, picture, reference, pixels))  # type: ignore[arg-type]
    flows(networks.raft, "evalcrafter" if own else "fixed")
    if networks.raft is not None and not networks.raft.beside_paper:
        other = f"{networks.raft.name} was given; the paper's columns need RAFT's large network (raft-things.pth)"
        out.reasons |= dict.fromkeys(("flow_score", "warping_error"), other)
    flows(Dis(), "fixed")
    if prompt or networks.clip is None:
        attempt("text_alignment", lambda: text_alignment(frames, networks.clip, prompt))
    _without_networks(out, frames, frames[0] if picture is None else picture, prompt, mask)
    return out


def _without_networks(out: Scores, frames: Video, picture: Video, prompt: str, mask: Video | None) -> None:
    """What the miniature's evaluation measures, on the middle square of the frames."""
    side = min(frames.shape[1:3])
    if len(frames) < 3:
        return
    square = np.stack([centre_crop(frame, side, side) for frame in frames])
    middle = None if mask is None else centre_crop(mask, side, side)
    middle = middle if middle is not None and 0 < np.count_nonzero(middle) < middle.size else None
    try:
        found = measure_clip(square, centre_crop(picture, side, side), middle)
    except ValueError as error:  # of a mask so small that nothing of it is left
        if middle is None:
            raise
        out.reasons["motion_right"] = str(error)
        return
    out.details["pixels"] = found
    out.values |= {name: value for name in UNGUIDED if isinstance(value := found.get(name), float)}
    motion, camera = asked(prompt)
    if motion and not camera and found["motion"] is not None:
        out.values["motion_right"] = float(found["motion"] == motion)


def asked(prompt: str) -> tuple[str, str]:
    """The motions of object and camera that a prompt names in the miniature world's words; "" for none."""
    return (next((m for m in MOTIONS if m in prompt), ""), next((c for c in CAMERAS if c and c in prompt), ""))


def _plain(value: Any) -> Any:
    """For JSON."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def measured_by(networks: Networks, switches: Switches) -> str:
    """A hash over all code that measures, the networks' files and device, versions and switches: other measurements are
    not reused."""
    here, models = Path(__file__).parent, Path(clip_vision.__file__).parent
    versions = torch.__version__, cv2.__version__, np.__version__, networks.device
    digest = hashlib.sha256(repr((sorted(networks.sha256.items()), switches, versions)).encode())
    digest.update(repr(None if networks.dover is None else networks.dover.aesthetic_backbone is not None).encode())
    code = [f for part in ("metrics", "raft", "dover") for f in sorted((here / part).glob("*.py"))]
    code += [here / f"{name}.py" for name in ("clip_network", "flow_networks", "measured", "scores")]
    code += [models / f"{name}.py" for name in ("clip_layers", "clip_text", "clip_vision", "tokenizer")]
    for file in [*code, Path(picture.__file__)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:20]
