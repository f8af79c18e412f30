"""A preset or files -> a built, strictly loaded pipeline: `load("tiny")(image, prompt)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from i2v import assemble, config
from i2v.assemble import TEXT_FILES, ModelFiles, Part, Plan
from i2v.config import ConfigError
from i2v.device import pick_device, pick_dtype
from i2v.free_memory import give_back_freed_memory
from i2v.hashes import known_sha256
from i2v.lora import Changes, check
from i2v.memory_plans import FULL, IN_UNET, MemoryPlan, stages_of
from i2v.models import cpu
from i2v.models.int8 import quantised
from i2v.networks import Networks, networks
from i2v.parts import KINDS, PartFile, open_part, save_part
from i2v.pipeline import I2VPipeline
from i2v.prompt import OneEncoder, TwoEncoders
from i2v.residency import Residency, Streamed, streamed_unit, take
from i2v.sources import CONTROLNET, IN_ATTENTION, PROJECTION, schedule_of
from weights_convert import files
from weights_convert.lora import weights_of
from weights_convert.mapped import release

__all__ = ["PROJECTION", "TEXT_FILES", "PartFile", "header", "load", "save_part", "schedule_of"]

STREAMED = "levels"  # in place of the UNet's parts where they are read level by level
Ready = Callable[[str, str, Tensor], Tensor]  # of a part, its key and the tensor: what the network takes


def load(
    preset: str = "tiny",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    folder: str | Path | None = None,
    *,
    models: str | Path | None = None,
    base: str | Path | Sequence[str | Path] = (),
    motion: str | Path | None = None,
    i2v: str | Path | None = None,
    ip_adapter: str | Path | None = None,
    image_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    motion_lora: str | Path | Sequence[str | Path] = (),
    lora_ignore_alpha: bool = False,
    controlnet: str | Sequence[str] = (),
    tokenizer: str | Path | None = None,
    int8: bool = False,
) -> I2VPipeline:
    """The preset, ready to run, with the given files in place of its own.

    folder: one file per part, in place of the preset's (`--weights`). models: where the preset's published files are
    looked for. base to tokenizer: files or folders in any published format, as sample.py's flags of these names.
    int8: the UNet's weights are held so, an approximation.
    Raises ConfigError for files that are missing, damaged or do not belong together, before any weight is read.
    """

    def path(value: str | Path | None) -> Path | None:
        return None if value is None else Path(value)

    def several(value: str | Path | Sequence[str | Path]) -> list[str]:
        return [str(value)] if isinstance(value, (str, Path)) else [str(one) for one in value]

    given = ModelFiles(
        preset=preset, weights=path(folder), models=path(models), base=tuple(map(Path, several(base))),
        motion=path(motion), i2v=path(i2v), ip_adapter=path(ip_adapter), image_encoder=path(image_encoder),
        vae=path(vae), lora=tuple(several(lora)), motion_lora=tuple(several(motion_lora)),
        lora_ignore_alpha=lora_ignore_alpha, controlnet=tuple(several(controlnet)), tokenizer=path(tokenizer),
        int8=int8,
    )  # fmt: skip
    return build(assemble.plan(given), device, dtype)


def build(
    plan: Plan,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    progress: bool = False,
    memory: MemoryPlan = FULL,
) -> I2VPipeline:
    """The planned model. Raises ConfigError for a plan that is not complete.

    Networks are built without memory on the meta device and then given the files' tensors one by one, in `dtype`;
    the adapter stays float32 and is cast where it is used. Every tensor has its place, and every place a tensor.
    memory: what is read now and stays; the rest is read when it is needed.
    """
    plan.refuse()
    place = pick_device(device)
    number = pick_dtype(dtype, place, plan.parameters)
    built = networks({name: part.config for name, part in plan.parts.items()})
    changes = Changes(plan.files.lora_ignore_alpha)
    for name, path, scale in plan.loras:
        changes.add(check(built.changed_by(name), path), scale)
    residency = resident(plan, built, place, number, memory, changes)
    if memory.freed == "level" and place.type == "cpu":
        trim_after_levels(built.unet)
    now = [stage for stage in residency.stages if stage in residency.keep]
    with tqdm(total=len(now), desc="loading", unit="part", delay=1, disable=not progress) as bar:
        for stage in now:
            residency.load(stage)
            bar.update()
    encoders = [built.slots[name][""] for name in ("text_encoder", "text_encoder_2") if name in built.slots]
    tokenizers = plan.tokenizers()
    text = TwoEncoders(encoders, tokenizers) if len(encoders) > 1 else OneEncoder(encoders[0], tokenizers[0])
    content = plan.parts["image_projection"].config
    return I2VPipeline(
        preset=plan.preset,
        unet=built.unet,
        vae=built.slots["vae"][""],
        text_encoder=text.eval(),
        image_encoder=built.slots["image_encoder"][""],
        image_projection=built.slots["image_projection"][""],
        image_config=content,
        i2v_adapter=built.added("i2v_adapter"),
        ip_adapter=built.added("ip_adapter"),
        controlnets=built.controlnets,
        schedule=plan.schedule,
        max_frames=plan.parts["motion"].config.max_frames,
        device=place,
        dtype=number,
        weights=Facts(plan),
        files={name: value for name, value in config.to_dict(plan.files).items() if value and name != "preset"},
        decode_chunk=memory.decode_chunk,
        decode_tile=memory.tile,
        guidance_in_turn=memory.guidance_in_turn,
        residency=residency,
    )


def resident(
    plan: Plan, built: Networks, device: torch.device, number: torch.dtype, memory: MemoryPlan, changes: Changes
) -> Residency:
    """When the parts of a model are in memory, under a plan of it."""
    stages = stages_of(plan.parts)
    for network in (built.unet, *built.controlnets.values()):
        network.budget = memory.budget(device)

    def ready(name: str, key: str, tensor: Tensor) -> Tensor:
        """A part's tensor, in the number format of its use, as its network takes it."""
        network = "unet" if name in IN_UNET else name
        tensor = changes.made(network, key.removeprefix(IN_ATTENTION), tensor.to(device))
        if device.type == "cpu":
            tensor = cpu.sorted_weight(tensor)
        return quantised(tensor) if plan.files.int8 and is_int8(name, key, tensor) else tensor

    def read(name: str) -> None:
        part = plan.parts[name]
        dtype = dtype_of(name, part.config, number)
        if all(tensor.dtype == dtype for tensor in part.tensors.values() if tensor.is_floating_point()):
            give_back_freed_memory()  # of the stage before: what stays mapped makes no use of it
        fill(built, name, part, dtype, ready)

    def empty(name: str) -> None:
        wanted = built.shapes(name)
        for start, module in built.slots[name].items():
            for key in [key for key in module.state_dict() if start + key in wanted]:
                take(module, key)
        release(plan.parts[name].tensors.values())

    paths = {key.removeprefix(IN_ATTENTION): (name, key) for name in IN_UNET for key in built.shapes(name)}

    def read_one(path: str, tensor: Tensor) -> Tensor:
        name, key = paths[path]
        dtype = dtype_of(name, plan.parts[name].config, number)
        return ready(name, key, tensor.to(dtype) if tensor.is_floating_point() else tensor)

    if memory.streamed:
        stored = {path: plan.parts[name].tensors[key] for path, (name, key) in paths.items()}
        streamed = Streamed(built.unet, stored, read_one)
        parts = [name for name in stages["unet"] if name.startswith(CONTROLNET)]
        stages = {**stages, "unet": [STREAMED, *parts]}
        return Residency(
            stages,
            lambda name: streamed.fill(streamed.resident) if name == STREAMED else read(name),
            lambda name: streamed.empty(streamed.resident) if name == STREAMED else empty(name),
            memory.keep,
        )
    return Residency(stages, read, empty, memory.keep)


def is_int8(part: str, key: str, tensor: Tensor) -> bool:
    """What `int8` holds so of a part: weights of linear layers and convolutions in the UNet's stage.

    Not the trained part, and not the first and last convolution: small as they are, they cost the miniature 2 dB.
    """
    mine = part in IN_UNET and part != "i2v_adapter" or part.startswith(CONTROLNET)
    outer = key.endswith(("conv_in.weight", "conv_out.weight"))
    return mine and tensor.ndim > 1 and not outer


class Facts(Mapping[str, dict[str, Any]]):
    """`facts_of` a plan, found aside while the first video is made: to hash gigabytes takes seconds, the first time."""

    def __init__(self, plan: Plan):
        self.found: Future[dict[str, dict[str, Any]]] = Future()
        Thread(target=self._find, args=(plan,), daemon=True).start()

    def _find(self, plan: Plan) -> None:
        try:
            self.found.set_result(facts_of(plan))
        except (OSError, ValueError) as error:
            self.found.set_exception(error)  # raised where the facts are asked for

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.found.result()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found.result())

    def __len__(self) -> int:
        return len(self.found.result())

    def __reduce__(self) -> tuple[type[dict], tuple[dict[str, dict[str, Any]]]]:
        return dict, (dict(self),)  # copied and pickled as what was found


def facts_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """Name and sha256 of every file that the plan uses, the scales of LoRA, whether their alpha counts and how many
    layers they change, where weights are held as int8, and the tokenizer: what is recorded with a video."""
    facts: dict[str, dict[str, Any]] = {}
    for name, part in plan.parts.items():
        facts[name] = {"file": part.source.path.name, "sha256": part.source.sha256}
        if plan.files.int8 and any(is_int8(name, key, tensor) for key, tensor in part.tensors.items()):
            facts[name]["int8"] = True
    for number, ((name, path, scale), count) in enumerate(zip(plan.loras, plan.layers, strict=True), 1):
        made = {"file": path.name, "sha256": known_sha256(weights_of(path)), "scale": scale, "layers": count}
        facts[f"{name} {number}"] = {**made, "ignore_alpha": True} if plan.files.lora_ignore_alpha else made
    for tokenizer in plan.tokenizers()[:1]:  # the second one differs in what it pads with
        facts["tokenizer"] = {"sha256": tokenizer.sha256}
    return facts


def dtype_of(name: str, config: Any, number: torch.dtype) -> torch.dtype:
    """The trained part stays float32, and so does an autoencoder whose activations overflow in float16."""
    overflows = name == "vae" and number == torch.float16 and not config.float16_safe
    return torch.float32 if name == "i2v_adapter" or overflows else number


def as_it_is(part: str, key: str, tensor: Tensor) -> Tensor:
    """A `Ready`."""
    return tensor


def fill(built: Networks, name: str, part: Part, dtype: torch.dtype, ready: Ready = as_it_is) -> None:
    """Put a file's tensors into modules built on meta, whose shapes were compared before; ready: done to each."""
    wanted = built.shapes(name)
    for start, module in built.slots[name].items():
        module.requires_grad_(False).eval()
        keys = [start + key for key in module.state_dict() if start + key in wanted]
        given = {key: part.tensors[key] for key in keys}
        made = files.cast(given, dtype, part.source.path, functools.partial(ready, name))
        placed = {key.removeprefix(start): tensor for key, tensor in made.items()}
        module.load_state_dict(module.state_dict() | placed, strict=True, assign=True)


def trim_after_levels(unet: nn.Module) -> None:
    """What a level of the UNet freed goes back to the system when it is done, for a few percent of its time."""
    for level in {streamed_unit(name) for name, _ in unet.named_parameters()} - {""}:
        unet.get_submodule(level).register_forward_hook(lambda *_: give_back_freed_memory())


def header(path: Path) -> PartFile:
    """One part, no tensor read; the file's name says which part it is."""
    if path.stem not in KINDS:
        raise ConfigError(f"{path}: no part has this name, expected one of {', '.join(KINDS)}; name the file so")
    return open_part(path, KINDS[path.stem])
