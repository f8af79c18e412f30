"""I2VPipeline: picture and prompt -> video. Encode both, make the start, denoise, decode."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from i2v import __version__, config, noise, picture
from i2v.config import ConfigError
from i2v.control import Maps, Residuals, looked_at
from i2v.device import finite
from i2v.diffusion import frame_similarity_prior as prior
from i2v.diffusion.first_frame import KnownFrames
from i2v.diffusion.guidance import Condition, guide
from i2v.diffusion.samplers import SAMPLERS
from i2v.diffusion.schedule import Schedule
from i2v.diffusion.windows import blended
from i2v.models.clip_vision import CLIPVisionModel
from i2v.models.controlnet import ControlNet
from i2v.models.i2v_adapter import FirstFrameAttention
from i2v.models.ip_adapter import ImageCrossAttention, IPAdapterConfig
from i2v.models.motion import MotionModule
from i2v.models.unet import DeepFeatures, UNet
from i2v.models.vae import VAE
from i2v.presets import Preset
from i2v.prompt import Encoded, OneEncoder, TextConditioning, TwoEncoders, join
from i2v.replay import described, weights_in_use
from i2v.request import FirstFrame, Fit, Posterior, Request, Sampler, UnconditionalImage, active_steps
from i2v.residency import Residency, during, needed
from i2v.video import read_image

log = logging.getLogger(__name__)

Picture = NDArray[np.uint8]
Image = Picture | str | Path


@dataclass(frozen=True)
class Result:
    """A finished video: frames (F, H, W, 3) uint8 RGB, and all that is needed to make it again.

    settings: "request" (every number used), "preset", "files" (what the user put in place of the preset's),
    "pictures" (with their frames) and "weights" (names and sha256), "versions", and "run": how it was made, which
    changes the last bits, and with `decode_tile`, which is not exact, a little more.
    drift: how far the frames' colours wander from the first, and how near known frames are, see `picture.finish`.
    """

    frames: NDArray[np.uint8]
    fps: int
    settings: dict[str, Any]
    drift: dict[str, Any]


@dataclass
class Stream:
    """A video whose frames are decoded as they are taken: a `Result` that needs no memory for all of them at once.

    frames: (H, W, 3) uint8 RGB each, to be gone through once. drift: filled when they are at their end.
    """

    frames: Iterator[Picture]
    fps: int
    settings: dict[str, Any]
    drift: dict[str, Any]


@dataclass
class I2VPipeline:
    """A loaded model. `load("tiny")` makes one; calling it makes a video."""

    preset: Preset
    unet: UNet
    vae: VAE
    text_encoder: OneEncoder | TwoEncoders
    image_encoder: CLIPVisionModel
    image_projection: nn.Module
    image_config: IPAdapterConfig
    i2v_adapter: Mapping[str, FirstFrameAttention]
    ip_adapter: Mapping[str, ImageCrossAttention]
    schedule: Schedule
    max_frames: int
    device: torch.device
    dtype: torch.dtype
    weights: Mapping[str, Mapping[str, Any]]  # name and sha256 of every file that is in use
    files: Mapping[str, Any] = field(default_factory=dict)  # the settings of `assemble.ModelFiles` that gave them
    controlnets: Mapping[str, ControlNet] = field(default_factory=dict)  # by the type of their pictures
    decode_chunk: int = 8  # frames that the VAE decodes at once
    decode_tile: int = 0  # pixels of the tiles that the VAE works in; 0: whole frames
    guidance_in_turn: bool = False  # the two halves of guidance one after the other: half the memory
    residency: Residency | None = None  # reads parts when they are needed; None: all are in memory
    compiled: bool = False  # whether `compile` was called

    def __call__(
        self,
        image: Image | Mapping[int, Image],
        prompt: str = "",
        *,
        negative_prompt: str = "",
        seed: int = 0,
        steps: int = 25,
        guidance_scale: float | None = None,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        deep_every: int = 1,
        num_frames: int | None = None,
        window: int | None = None,
        window_overlap: int | None = None,
        window_anchor: bool = True,
        fps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fit: Fit = "cover",
        sampler: Sampler = "ddim",
        t0: float | None = None,
        p: float | None = None,
        motion_scale: float = 1.0,
        i2v_scale: float = 1.0,
        ip_scale: float = 1.0,
        color_match: bool = False,
        first_frame: FirstFrame = "vae",
        posterior: Posterior = "mode",
        unconditional_image: UnconditionalImage | None = None,
        loop: bool = False,
        control: str | Sequence[str] = (),
        control_scale: float = 1.0,
        control_start: float = 0.0,
        control_end: float = 1.0,
        control_first_frame: bool = True,
        progress: bool = False,
    ) -> Result:
        """A video that begins with `image`, (H, W, 3) uint8 RGB of any size or a file's path, and follows `prompt`.

        Several pictures are given by frame number, -1 for the last: `{0: "a.png", -1: "b.png"}`. The first one is what
        the I2V-Adapter and the Content-Adapter see, and decides about the size.
        None stands for the preset's value. `i2v.request.Request` has the meaning and range of each argument.
        Raises ConfigError for a value out of its range, before anything is computed.
        """
        control = (control,) if isinstance(control, str) else tuple(control)
        request = Request(
            prompt=prompt, negative_prompt=negative_prompt, seed=seed, steps=steps, guidance_scale=guidance_scale,
            guidance_start=guidance_start, guidance_end=guidance_end, deep_every=deep_every, num_frames=num_frames,
            window=window, window_overlap=window_overlap, window_anchor=window_anchor, fps=fps, height=height,
            width=width, fit=fit, sampler=sampler, t0=t0, p=p, motion_scale=motion_scale, i2v_scale=i2v_scale,
            ip_scale=ip_scale, color_match=color_match, first_frame=first_frame, posterior=posterior,
            unconditional_image=unconditional_image, loop=loop, control=control, control_scale=control_scale,
            control_start=control_start, control_end=control_end, control_first_frame=control_first_frame,
        )  # fmt: skip
        return self.run(image, request, progress)

    def run(self, image: Image | Mapping[int, Image], request: Request, progress: bool = False) -> Result:
        """As calling the pipeline, with the settings in one object; `progress` shows bars with the time left."""
        video = self.stream(image, request, progress)
        return Result(np.stack(list(video.frames)), video.fps, video.settings, video.drift)

    @torch.inference_mode()
    def stream(self, image: Image | Mapping[int, Image], request: Request, progress: bool = False) -> Stream:
        """As `run`, but for the frames: the latents are made here, and decoded a few at a time when they are asked for.

        `i2v.video.write_video` takes them, so that a long video never lies in memory whole.
        """
        images = request.known(image if isinstance(image, Mapping) else {0: image}, self.preset)
        pictures = {frame: pixels_of(one) for frame, one in images.items()}
        anchor = min(pictures)
        original = pictures[anchor]
        request = request.resolved(self.preset, original.shape[:2], self.max_frames, self.vae.cfg.factor)
        timesteps = prior.timesteps_from(self.schedule, request.steps, float(request.t0 or 0))
        request.guided_steps(len(timesteps))
        maps = looked_at(request, list(self.controlnets), len(timesteps))
        for prompt in (request.prompt, request.negative_prompt):
            if cut := self.text_encoder.tokenizer.truncated(prompt):
                log.warning("the prompt is longer than this model reads; cut off: %s", cut)
        for module in self.unet.modules():
            if isinstance(module, MotionModule):
                module.scale = request.motion_scale
            elif isinstance(module, FirstFrameAttention):
                module.scale = request.i2v_scale
            elif isinstance(module, ImageCrossAttention):
                module.scale = request.ip_scale

        # the authors' rounding follows a picture's own shape; the others take the first one's size
        others: Fit = "stretch" if request.fit == "released" else request.fit
        fitted = {
            frame: picture.fit(one, *_size(request), request.fit if frame == anchor else others)
            for frame, one in pictures.items()
        }
        known = self.known_frames(fitted, request)
        latents = self.denoise(known, self.conditions(original, request), request, progress, maps)
        drift: dict[str, Any] = {}
        chunks = self.decoded(latents, progress)
        frames = picture.finished(chunks, fitted, request.color_match, request.first_frame, drift)
        weights = {name: dict(facts) for name, facts in weights_in_use(self.weights, request.control).items()}
        if count := sum("_loras" in m.__dict__ for part in (self.unet, self.text_encoder) for m in part.modules()):
            weights["LoRAs merged in Python"] = {"sha256": "not known", "layers": count}
        settings = {
            "request": config.to_dict(request),
            "preset": self.preset.name,
            "pictures": described(images, pictures, request.loop),
            "controls": [one.facts() for one in maps],
            "weights": weights,
            "versions": {"i2v-adapter": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "run": {
                "device": self.device.type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "decode_chunk": self.decode_chunk,
                "decode_tile": self.decode_tile,
                "guidance_in_turn": self.guidance_in_turn,
                "compile": self.compiled,
                "threads": torch.get_num_threads(),
            },
            "files": dict(self.files),
        }
        return Stream(frames, int(request.fps or 0), settings, drift)

    @property
    def vae_dtype(self) -> torch.dtype:
        """The number format of the VAE, float32 where its activations overflow in the pipeline's."""
        return next(self.vae.parameters()).dtype

    def compile(self) -> None:
        """The UNet by torch.compile from now on: its first call, and that of every other size, takes minutes.

        It computes all at once, whatever the memory plan says. Not for weights that are held as int8.
        """
        import torch._dynamo  # takes a second

        for name in ("recompile_limit", "cache_size_limit"):  # PyTorch 2.7 or newer, 2.6; 8 by itself
            if hasattr(torch._dynamo.config, name):
                setattr(torch._dynamo.config, name, 64)
        self.unet.budget = 0
        self.unet.compile(dynamic=False)
        self.compiled = True

    # -- the four steps ------------------------------------------------------------------------------------------

    @during("vae")
    def known_frames(self, fitted: Mapping[int, Picture], request: Request) -> KnownFrames:
        """The fitted pictures as clean latents; the first is the anchor of every other frame's attention."""
        latents = {}
        for frame, one in fitted.items():
            pixels = picture.to_tensor(one)[None].to(self.device)
            posterior = self.vae.encode(pixels.to(self.vae_dtype), self.decode_tile)
            if self.too_large(posterior.mean, "the picture's latents"):
                posterior = self.vae.encode(pixels.to(self.vae_dtype), self.decode_tile)
            # one draw for all pictures, so that the two ends of a loop are equal
            eps = noise.normal(request.seed, "posterior", [0], 0, posterior.mean.shape[1:])
            latents[frame] = (posterior.mode() if request.posterior == "mode" else posterior.sample(eps)).float()
        return KnownFrames.at(latents, int(request.num_frames or 0))

    @during("image", "text")
    def conditions(self, original: Picture, request: Request) -> list[Condition]:
        """The unguided and the guided half; each is text, image tokens and their keys and values."""
        pixels = picture.clip_pixels(original, self.image_encoder.cfg.image_size)
        if request.unconditional_image == "zero-pixels":
            # as released: zeros after normalisation, which is a picture of CLIP's mean colour
            pixels = torch.cat([pixels, torch.zeros_like(pixels)])
        tokens = self.encode_image(pixels, nothing=request.unconditional_image == "zero-embedding")
        tokens, other = tokens[:1], tokens[-1:]
        return [
            Condition("negative", Encoded(self.encode_text(request, negative=True), other)),
            Condition("positive", Encoded(self.encode_text(request), tokens), scale=float(request.guidance_scale or 0)),
        ]

    @during("unet")
    def denoise(
        self,
        known: KnownFrames,
        conditions: Sequence[Condition],
        request: Request,
        progress: bool = False,
        maps: Sequence[Maps] = (),
    ) -> Tensor:
        """The video's latents, (1, F, C, h, w) float32, from the prior's start at `t0`, steered by `maps`."""
        unknown = known.indices(False)
        shape = tuple(known.latents.shape[2:])
        timesteps = prior.timesteps_from(self.schedule, request.steps, float(request.t0 or 0))

        def draw(purpose: str, step: int) -> Tensor:
            return noise.normal(request.seed, purpose, unknown, step, shape)[None].to(self.device)

        keep = prior.keep_mask(noise.uniform(request.seed, "keep", unknown, 0, shape)[None], float(request.p or 0))
        pictures = known.latents[:, known.nearest()]
        x = prior.start_latents(pictures, draw("start", 0), keep.to(self.device), self.schedule, int(timesteps[0]))

        count = len(timesteps)
        steps = active_steps("control", count, request.control_start, request.control_end) if maps else []
        silent = known.known & (not request.control_first_frame)
        times = [int(timesteps[step]) for step in steps]
        residuals = Residuals.of(maps, self.controlnets, request.control_scale, times, silent)

        step_of = {int(t): step for step, t in enumerate(timesteps)}
        kept: dict[tuple[int, ...], tuple[int, DeepFeatures]] = {}

        def deep(step: int, *calls: int) -> DeepFeatures | None:
            """What the calls with these numbers share from one step to the next, anew at every n-th of them."""
            if request.deep_every == 1:
                return None
            for stale in [key for key, (made, _) in kept.items() if step - made >= request.deep_every]:
                del kept[stale]
            return kept.setdefault(calls, (step, DeepFeatures()))[1]

        def predict(video: Tensor, t: int, given: Encoded, numbers: Sequence[int]) -> Tensor:
            if given.context_kv is None:
                given.context_kv = self.unet.context_kv(given.text.context, given.image_tokens)
            rows, frames = video.shape[:2]
            conditions = len(given.text.context) // rows
            folded = video.flatten(0, 1).to(self.dtype)
            out = self.unet(
                folded,
                torch.full((rows,), t, device=self.device),
                given.context_kv,
                num_frames=frames,
                pooled=given.text.pooled,
                size_ids=given.text.size_ids,
                control=residuals(folded.repeat(conditions, 1, 1, 1), t, given.text, numbers),
                anchor=numbers.index(known.anchor) if known.anchor in numbers else 0,
                conditions=conditions,
                deep=deep(step_of[t], id(given), *numbers),
            )
            return out.unflatten(0, (-1, frames))

        guided = {int(timesteps[step]) for step in request.guided_steps(count)}
        model = guide(predict, conditions, join=None if self.guidance_in_turn else join, at=guided)
        with tqdm(total=count, desc="denoising", unit="step", leave=False, disable=not progress) as bar:
            x = SAMPLERS[request.sampler](
                known.wrap(blended(model, request.windows(known.anchor))),
                x,
                self.schedule,
                timesteps,
                noise=lambda step: draw("sampler", step),
                callback=lambda step, t, x: bar.update(),
            )
        return finite(known.insert(x), "the denoised latents", self.dtype)

    def decode(self, latents: Tensor, progress: bool = False) -> Tensor:
        """(1, F, C, h, w) -> pixels (F, 3, H, W) float32 in [-1, 1] on the CPU."""
        return torch.cat(list(self.decoded(latents, progress)))

    @torch.inference_mode()
    def decoded(self, latents: Tensor, progress: bool = False) -> Iterator[Tensor]:
        """As `decode`, `decode_chunk` frames at a time, each when it is asked for."""
        bar = tqdm(total=latents.shape[1], desc="decoding", unit="frame", leave=False, disable=not progress)
        with needed(self, "vae"), bar:
            for chunk in latents[0].split(self.decode_chunk):
                made = self.vae.decode(chunk.to(self.vae_dtype), self.decode_tile)
                if self.too_large(made, "the decoded frames"):
                    made = self.vae.decode(chunk.to(self.vae_dtype), self.decode_tile)
                yield finite(made, "the decoded frames", self.vae_dtype).clamp(-1, 1).cpu()
                bar.update(len(chunk))

    def too_large(self, made: Tensor, what: str) -> bool:
        """Whether float16 did not hold what the VAE made, as of some fine-tuned ones: it is float32 from now on."""
        if self.vae_dtype != torch.float16 or bool(made.isfinite().all()):
            return False
        log.warning("%s are too large for float16: the VAE goes on in float32", what)
        self.vae.float()
        return True

    # -- what the steps are made of --------------------------------------------------------------------------------

    @during("text")
    def encode_text(self, request: Request, negative: bool = False) -> TextConditioning:
        """The prompt or the negative one, by the rules of the base model."""
        prompt = request.negative_prompt if negative else request.prompt
        return self.text_encoder(prompt, _size(request), negative)

    @during("image")
    def encode_image(self, pixels: Tensor, nothing: bool = False) -> Tensor:
        """CLIP's normalised pixels (N, 3, S, S) -> image tokens (N, M, C) of the Content-Adapter.

        nothing: and then as many of zeros in place of what CLIP sees, (2 N, M, C).
        """
        output = self.image_encoder(pixels.to(self.device, self.dtype))
        # the resampler reads the patches before CLIP's last layer, the linear projection the picture's embedding
        seen = output.hidden_states[-2] if self.image_config.kind == "plus" else output.image_embeds
        return self.image_projection(torch.cat([seen, torch.zeros_like(seen)]) if nothing else seen)


def _size(request: Request) -> tuple[int, int]:
    return int(request.height or 0), int(request.width or 0)


def pixels_of(image: Image) -> Picture:
    """The picture, read if it is a path; raises ConfigError for an array of another kind."""
    pixels = read_image(Path(image)) if isinstance(image, (str, Path)) else image
    if not isinstance(pixels, np.ndarray):
        raise ConfigError(f"image: expected a path or (H, W, 3) uint8 RGB, got a {type(image).__name__}; give "
                          "np.array(image.convert('RGB')) of a PIL picture")  # fmt: skip
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ConfigError(f"image: expected (H, W, 3) uint8 RGB, got {pixels.shape} {pixels.dtype}")
    return pixels
