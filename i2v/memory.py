"""How much memory a video needs and how much there is: predicted before anything is read, and a plan chosen by it."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from i2v import load
from i2v.assemble import Plan
from i2v.device import pick_device, pick_dtype
from i2v.diffusion.frame_similarity_prior import timesteps_from
from i2v.footprint import GROWTH, RETAINED, Footprint, footprint
from i2v.free_memory import free_bytes, give_back_freed_memory, is_out_of_memory, keep_freed_memory, used_bytes
from i2v.memory_plans import FULL, IN_UNET, LEAN, PLANS, MemoryPlan, stages_of
from i2v.models.int8 import Int8Weight, quantised
from i2v.models.unet import DeepFeatures
from i2v.networks import Networks, networks
from i2v.pipeline import I2VPipeline
from i2v.request import Request
from i2v.residency import put, streamed_unit
from i2v.sources import IN_ATTENTION

T = TypeVar("T")
GB = 1e9
SMALL_MODEL = 512 * 2**20  # bytes of weights below which nothing is won by letting go of them
SLACK = 0.95  # of the free memory is used
EFFICIENCY = 0.8  # of a large matrix product's rate, over a whole stage
READ = 1.5e9  # bytes a second, of files that the system has in its cache
COMPILER = ("torch._dynamo", "torch._inductor")  # whose errors say that something cannot be compiled here
QUANTISED = 0.3e9  # weights a second that become int8
PIXEL_COPIES = 4  # float32 copies of decoded frames while their colours are finished


@dataclass(frozen=True)
class Stage:
    """One stage of a run. Bytes: of weights in memory, and of what it works with. flops: of all of its calls; reading:
    of weights, seconds."""

    name: str
    weights: int
    work: int
    flops: int
    reading: float

    @property
    def bytes(self) -> int:
        return self.weights + self.work

    def seconds(self, rate: float) -> float:
        """At `rate` operations a second."""
        return self.flops / rate + self.reading


def predict(plan: Plan, request: Request, memory: MemoryPlan, dtype: torch.dtype, device: torch.device) -> list[Stage]:
    """The stages of making one video, in order; request: with every number resolved. Nothing is read or computed."""
    built = as_used(plan, dtype)
    parts = stages_of(plan.parts)
    stages = {stage: sum(weights_of(built, name) for name in names) for stage, names in parts.items()}
    kept = {stage: stages[stage] if stage in memory.keep else 0 for stage in stages}
    unet = stages["unet"] - (streamed_bytes(built) if memory.streamed else 0)
    steps = len(timesteps_from(plan.schedule, request.steps, float(request.t0 or 1)))
    height, width, frames = int(request.height or 0), int(request.width or 0), int(request.num_frames or 0)
    vae, numbers = built.slots["vae"][""], load.dtype_of("vae", plan.parts["vae"].config, dtype)

    def stage(name: str, needs: Sequence[str], own: int, found: Footprint, times: int, extra: int = 0) -> Stage:
        others = sum(kept[other] for other in stages if other not in needs)
        seconds = sum(reading(built, part) for need in needs if not kept[need] for part in parts[need])
        seconds *= calls if memory.streamed and "unet" in needs else 1
        return Stage(name, own + others, round(found.bytes * (1 + RETAINED)) + extra, found.flops * times, seconds)

    with torch.device("meta"):
        pixels = torch.empty(1, 3, height, width, dtype=numbers)
        encoded = footprint(lambda: vae.encode(pixels, memory.tile))
        told = footprint_of_prompt(built, plan, dtype)
        step = footprint_of_run(plan, built, request, memory, dtype, device, steps)
        chunk = min(memory.decode_chunk, frames)
        latents = torch.empty(chunk, vae.cfg.latent_channels, height // vae.cfg.factor, width // vae.cfg.factor)
        decoded = footprint(lambda: vae.decode(latents, memory.tile))
    pixels_made = chunk * 3 * height * width * 4
    both = stages["image"] + stages["text"]
    halves = 2 if memory.guidance_in_turn and float(request.guidance_scale or 0) > 1 else 1
    calls = steps * len(request.windows(0)) * halves
    return [
        stage("picture", ["vae"], stages["vae"], encoded, 1),
        stage("prompt", ["image", "text"], both, told, 2),
        stage("denoising", ["unet"], unet, step, 1),
        stage("decoding", ["vae"], stages["vae"], decoded, math.ceil(frames / chunk), PIXEL_COPIES * pixels_made),
    ]


def as_used(plan: Plan, dtype: torch.dtype) -> Networks:
    """The networks on the meta device, their tensors in the number formats that they are used in."""
    built = networks({name: part.config for name, part in plan.parts.items()})
    for name in sorted(plan.parts, key=lambda name: name != "unet"):  # which is cast with all that is inside
        wanted = built.shapes(name)
        for start, module in built.slots[name].items():
            module.to(load.dtype_of(name, plan.parts[name].config, dtype))
            for key, tensor in module.state_dict().items():
                if plan.files.int8 and start + key in wanted and load.is_int8(name, key, tensor):
                    put(module, key, quantised(tensor))
    return built


def weights_of(built: Networks, part: str) -> int:
    """Bytes of a part."""
    return sum(tensor.nbytes for tensor in built.shapes(part).values())


def reading(built: Networks, part: str) -> float:
    """Seconds."""
    tensors = built.shapes(part).values()
    return sum(t.nbytes / READ + (t.numel() / QUANTISED if isinstance(t, Int8Weight) else 0) for t in tensors)


def streamed_bytes(built: Networks) -> int:
    """What of the UNet's weights is not in memory while its largest level is."""
    units: dict[str, int] = {}
    for name in IN_UNET:
        for key, tensor in built.shapes(name).items():
            if unit := streamed_unit(key.removeprefix(IN_ATTENTION)):
                units[unit] = units.get(unit, 0) + tensor.nbytes
    return sum(units.values()) - max(units.values())


def footprint_of_prompt(built: Networks, plan: Plan, dtype: torch.dtype) -> Footprint:
    """The picture and the grey one through the image encoder; a prompt works with little beside it."""
    side, image = plan.parts["image_encoder"].config.image_size, built.slots["image_encoder"][""]
    found = footprint(lambda: image(torch.empty(2, 3, side, side, dtype=dtype)))
    texts = [name for name in ("text_encoder", "text_encoder_2") if name in plan.parts]
    products = sum(
        2 * plan.parts[name].config.max_length * p.numel()
        for name in texts
        for key, p in built.slots[name][""].named_parameters()
        if p.ndim > 1 and "embedding" not in key
    )
    return Footprint(found.bytes, found.flops + products)


def footprint_of_run(
    plan: Plan,
    built: Networks,
    request: Request,
    memory: MemoryPlan,
    dtype: torch.dtype,
    device: torch.device,
    steps: int,
) -> Footprint:
    """What a call of the UNet holds, with the keys and values of text and picture; the operations of all calls."""
    unet, config, content = built.unet, plan.parts["unet"].config, plan.parts["image_projection"].config
    unet.budget = memory.budget(device)
    guided, windows = len(request.guided_steps(steps)), len(request.windows(0))
    rows = 1 if memory.guidance_in_turn or not guided else 2
    factor, frames = plan.parts["vae"].config.factor, int(request.window or request.num_frames or 0)
    sides = int(request.height or 0) // factor, int(request.width or 0) // factor
    latents = torch.empty(rows * frames, config.latent_channels, *sides, dtype=dtype)
    text = torch.empty(rows, plan.parts["text_encoder"].config.max_length, config.context_dim, dtype=dtype)
    tokens = torch.empty(rows, content.tokens, config.context_dim, dtype=dtype)
    more: dict[str, Any] = {}
    if config.pooled_dim:
        more = {"pooled": torch.empty(rows, config.pooled_dim, dtype=dtype), "size_ids": torch.zeros(rows, 6)}
    times = torch.zeros(rows)

    def step(deep: DeepFeatures | None) -> None:
        control: list[Tensor] = []
        for net in built.controlnets.values() if request.control else ():
            net.budget = unet.budget
            hint = latents.new_empty(frames, config.channels[0], *sides)
            found = net(latents, times, text, hint, num_frames=frames, **more)
            control = [control.pop(0) + found.pop(0) for _ in range(len(control))] if control else found
        kv = unet.context_kv(text, tokens)
        unet(latents, times, kv, num_frames=frames, control=control or None, deep=deep, **more)

    halves = windows * (steps + guided) / rows  # calls for all steps
    deep = DeepFeatures() if request.deep_every > 1 else None
    whole = footprint(lambda: step(deep))
    if deep is None or deep.state is None:
        return replace(whole, flops=round(whole.flops * halves))
    others = (windows * (2 if guided else 1) - rows) / rows  # calls whose features are kept meanwhile
    shallow, computed = footprint(lambda: step(deep)), math.ceil(steps / request.deep_every) / steps
    return Footprint(
        round(whole.bytes + deep.state.numel() * deep.state.element_size() * others),
        round(halves * (whole.flops * computed + shallow.flops * (1 - computed))),
    )


def needed(stages: Sequence[Stage]) -> int:
    """Bytes at the worst moment, above what the process has now."""
    return round(max(stage.bytes for stage in stages) + GROWTH)


def order(plan: Plan, dtype: torch.dtype, device: torch.device, wanted: str) -> list[MemoryPlan]:
    """The plans to be tried, the first one first.

    "auto" begins with `lean` on a CPU, where letting go of a mapped part costs nothing, and with `full` on a GPU and
    for small models. A plan's name: that one, and after it those that need less.
    """
    names = list(PLANS)
    if wanted != "auto":
        return [PLANS[name] for name in names[names.index(wanted) :]]
    built = as_used(plan, dtype)
    small = sum(weights_of(built, name) for name in plan.parts) < SMALL_MODEL
    first = FULL if small or device.type != "cpu" else LEAN
    return [PLANS[name] for name in names[names.index(first.name) :]]


def rate(dtype: torch.dtype, device: torch.device, side: int = 1024) -> float:
    """Operations a second of a matrix product here, now."""
    a = torch.ones(side, side, dtype=dtype, device=device)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def table(stages: Sequence[Stage], used: int, speed: float) -> str:
    """A line a stage. used: bytes of the process now; speed: operations a second."""
    lines = [f"{'stage':10}  {'weights':>8}  {'work':>8}  {'memory':>8}  {'time':>8}"]
    for stage in stages:
        total = (stage.bytes + used + GROWTH) / GB
        lines.append(f"{stage.name:10}  {stage.weights / GB:5.2f} GB  {stage.work / GB:5.2f} GB  {total:5.2f} GB  "
                     f"{duration(stage.seconds(speed)):>8}")  # fmt: skip
    worst = max(stages, key=lambda stage: stage.bytes)
    peak, seconds = (needed(stages) + used) / GB, sum(stage.seconds(speed) for stage in stages)
    return "\n".join([*lines, f"peak {peak:.2f} GB ({worst.name}), about {duration(seconds)}"])


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Fitting:
    """A model that is built under the first plan that fits, and under the next one where memory runs out all the same.

    Args:
        plan: of the model. device, dtype: as `load.build` takes them.
        wanted: a plan's name, or "auto". decode_chunk, decode_tile, guidance_in_turn: in place of what the plans say.
        say: is told in a line what is done. compiled: the UNet by torch.compile, under the plan `full`.
    """

    def __init__(
        self,
        plan: Plan,
        device: str | torch.device,
        dtype: str | torch.dtype,
        wanted: str = "auto",
        decode_chunk: int | None = None,
        decode_tile: int | None = None,
        guidance_in_turn: bool = False,
        say: Callable[[str], object] = lambda line: None,
        compiled: bool = False,
    ):
        self.plan, self.device, self.say, self.compiled = plan, pick_device(device), say, compiled
        self.dtype = pick_dtype(dtype, self.device, plan.parameters)
        self.plans = [
            replace(
                one,
                decode_chunk=decode_chunk or one.decode_chunk,
                tile=one.tile if decode_tile is None else decode_tile,
                guidance_in_turn=guidance_in_turn or one.guidance_in_turn,
            )
            for one in order(plan, self.dtype, self.device, wanted)
        ]
        self.chosen = wanted != "auto"  # by the user: what is predicted does not change it
        self.pipe: I2VPipeline | None = None
        self.told = ""

    def choose(self, request: Request) -> list[Stage]:
        """The stages of the first plan that fits, which then heads the list; of the last one where none does.

        request: with every number resolved.
        """
        held = 0 if self.pipe is None else held_bytes(self.pipe)  # the prediction counts it, too
        free = free_bytes(self.device)
        while True:
            stages = predict(self.plan, request, self.plans[0], self.dtype, self.device)
            fits = free is None or needed(stages) <= SLACK * (free + held)
            if fits or self.chosen or len(self.plans) == 1:
                break
            self.next()
        used = used_bytes() - held if self.device.type == "cpu" else 0
        line = f"memory: {self.plans[0].name} ({self.plans[0].about}), about {(needed(stages) + used) / GB:.1f} GB"
        if free is not None:
            line += f" of {(free + held + used) / GB:.0f} GB" + ("" if fits else ", which may not suffice")
        if self.plans[0].name != self.told:
            self.say(line)
        self.told = self.plans[0].name
        return stages

    def report(self, request: Request) -> str:
        """What `--dry-run` prints: the stages of `choose`."""
        speed = rate(self.dtype, self.device) * EFFICIENCY
        return table(self.choose(request), used_bytes() if self.device.type == "cpu" else 0, speed)

    def next(self, plans: int = 1) -> None:
        """On by so many plans; the model is let go of."""
        self.plans, self.pipe = self.plans[plans:], None
        gc.collect()  # a compiled network refers to itself
        give_back_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def model(self) -> I2VPipeline:
        """Built under the plan that heads the list."""
        if self.pipe is None:
            keep_freed_memory(self.plans[0].freed != "at once")
            self.pipe = load.build(self.plan, self.device, self.dtype, progress=True, memory=self.plans[0])
            for told in self.plan.told_loras():
                self.say(f"LoRA {told}")
            if self.compiled and self.plans[0].name == FULL.name:
                self.pipe.compile()
                self.say("compiling the UNet: its first step takes minutes, and so does that of another size")
            elif self.compiled:
                self.say(f"--compile: not under the plan {self.plans[0].name}, which frees memory or works in pieces; "
                         "see --memory full")  # fmt: skip
        return self.pipe

    def run(self, request: Request, work: Callable[[I2VPipeline], T]) -> T:
        """work(model), again under the next plan where memory runs out; raises what `work` does."""
        self.choose(request)
        while True:
            try:
                return work(self.model())
            except (MemoryError, RuntimeError) as error:
                uncompiled = self.compiled and type(error).__module__.startswith(COMPILER)
                if not uncompiled and (not is_out_of_memory(error) or len(self.plans) == 1):
                    raise
                told = [*str(error).strip().splitlines(), type(error).__name__][0]
            # here the error, whose traceback holds the model, is gone
            if uncompiled:
                self.compiled = False
                self.next(0)
                self.say(f"--compile: failed, the video is made without ({told})")
                continue
            failed = self.plans[0].name
            self.next()
            self.say(f"memory: {failed} was not enough, trying {self.plans[0].name} ({self.plans[0].about})")


def held_bytes(pipe: I2VPipeline) -> int:
    """Of weights that a model has in memory now."""
    networks = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.image_encoder, pipe.image_projection)
    tensors = [t for net in (*networks, *pipe.controlnets.values()) for t in (*net.parameters(), *net.buffers())]
    return sum(t.nbytes for t in tensors if t.device.type != "meta")
