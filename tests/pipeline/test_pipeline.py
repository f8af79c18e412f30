"""From picture and prompt to frames: what changes them, what must not, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from i2v import picture
from i2v.config import ConfigError
from i2v.device import Overflow
from i2v.hashes import sha256
from i2v.load import load
from i2v.lora import base_of, merge
from i2v.models.i2v_adapter import remove_i2v_adapter
from i2v.models.lora import TrainedLoRA
from i2v.models.vae import VAE, Posterior
from i2v.pipeline import I2VPipeline
from i2v.presets import released_settings
from i2v.replay import Recipe
from i2v.request import Request
from weights_convert.write_lora import write_lora

Make = Callable[..., NDArray[np.uint8]]


def latents(pipe: I2VPipeline, photo: NDArray[np.uint8], **settings: object) -> torch.Tensor:
    """The run up to the decoder, in float32: differences below one grey level show."""
    request = Request(prompt="a red ball", steps=3, num_frames=6, **settings)  # type: ignore[arg-type]
    request = request.resolved(pipe.preset, photo.shape[:2], pipe.max_frames, pipe.vae.cfg.factor)
    with torch.inference_mode():
        known = pipe.known_frames({0: picture.fit(photo, 64, 64)}, request)
        return pipe.denoise(known, pipe.conditions(photo, request), request)


def test_a_video_and_its_settings(pipe: I2VPipeline, photo: NDArray[np.uint8]) -> None:
    result = pipe(photo, "a red ball moves left", steps=3, num_frames=5)
    assert result.frames.shape == (5, 64, 64, 3) and result.frames.dtype == np.uint8
    assert result.fps == pipe.preset.fps
    assert result.settings["request"]["num_frames"] == 5 and result.settings["request"]["height"] == 64
    assert all(len(part["sha256"]) == 64 for part in result.settings["weights"].values())
    assert json.loads(json.dumps(result.settings)) == result.settings
    assert result.drift["psnr"].keys() == {0}


def test_the_readme_call_takes_a_path(pipe: I2VPipeline, tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    import cv2

    file = tmp_path / "picture.png"
    cv2.imwrite(str(file), photo[..., ::-1])
    result = pipe(file, "a cat", steps=1, num_frames=2)
    assert np.array_equal(result.frames, pipe(photo, "a cat", steps=1, num_frames=2).frames)
    assert result.settings["pictures"][0]["file"] == str(file)


def test_same_seed_same_bits_and_every_setting_acts(make: Make) -> None:
    first = make()
    assert np.array_equal(first, make())
    for change in (
        {"seed": 1}, {"steps": 4}, {"guidance_scale": 6.0}, {"negative_prompt": "blue"}, {"sampler": "dpmpp_2m_sde"},
        {"t0": 0.5}, {"p": 0.0}, {"i2v_scale": 0.0}, {"ip_scale": 0.0}, {"color_match": True}, {"first_frame": "exact"},
        {"motion_scale": 0.5}, {"deep_every": 2}, {"guidance_start": 0.5}, {"guidance_end": 0.5},
        {"fit": "stretch"}, {"posterior": "sample"}, {"unconditional_image": "same"}, {"num_frames": 3},
    ):  # fmt: skip
        other = make(**change)
        assert other.shape != first.shape or not np.array_equal(first, other), f"{change} changed nothing"
    assert np.array_equal(first, make()), "a run left something behind in the pipeline"


def test_scales_act_on_the_adapters_that_are_in_the_unet(pipe: I2VPipeline, photo: NDArray[np.uint8]) -> None:
    """Also where these are not the ones that were loaded."""
    loaded = pipe.unet
    try:
        pipe.unet = copy.deepcopy(loaded)
        videos = {
            name: pipe(photo, "a red ball", steps=2, num_frames=4, **{name: 0.0}).frames.tobytes()
            for name in ("i2v_scale", "ip_scale", "motion_scale")
        }
        videos["full"] = pipe(photo, "a red ball", steps=2, num_frames=4).frames.tobytes()
    finally:
        pipe.unet = loaded
    assert (
        len(set(videos.values())) == 4
        and videos["full"] == pipe(photo, "a red ball", steps=2, num_frames=4).frames.tobytes()
    )


def test_a_lora_that_is_merged_in_python_is_in_the_settings(
    pipe: I2VPipeline, photo: NDArray[np.uint8], tmp_path: Path
) -> None:
    lora = TrainedLoRA(pipe.unet, ["*.attn1.to_q"], 2, torch.Generator())
    base = base_of({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    assert base is not None
    write_lora(tmp_path / "a.safetensors", {"unet": lora.pairs()}, base)
    before = pipe(photo, "a cat", steps=1, num_frames=2).settings
    merged = merge({"unet": pipe.unet}, tmp_path / "a.safetensors")
    during = pipe(photo, "a cat", steps=1, num_frames=2).settings
    count = merged.count["unet"]
    merged.remove()
    assert "LoRAs merged in Python" not in before["weights"]
    assert during["weights"]["LoRAs merged in Python"]["layers"] == count > 0
    (line,) = Recipe(tmp_path, during).changes(before)
    assert "weights of LoRAs merged in Python are others" in line
    assert pipe(photo, "a cat", steps=1, num_frames=2).settings == before


def test_a_pipeline_can_be_copied(pipe: I2VPipeline, photo: NDArray[np.uint8]) -> None:
    twin = copy.deepcopy(pipe)
    one, two = (p(photo, "a cat", steps=1, num_frames=2) for p in (pipe, twin))
    assert np.array_equal(one.frames, two.frames) and one.settings == two.settings


def test_a_text_of_another_width_is_named(pipe: I2VPipeline) -> None:
    x = torch.zeros(2, pipe.unet.cfg.latent_channels, 8, 8)
    with pytest.raises(ValueError, match=r"context \(1, 4, 768\): expected \(R, L, \d+\), of a text encoder"):
        pipe.unet(x, torch.zeros(1), torch.zeros(1, 4, 768), num_frames=2)


def test_frame_0_is_the_vae_s_picture_or_yours(pipe: I2VPipeline, photo: NDArray[np.uint8], make: Make) -> None:
    fitted = picture.fit(photo, 64, 64)
    with torch.inference_mode():
        pixels = pipe.vae.decode(pipe.vae.encode(picture.to_tensor(fitted)[None].to(pipe.device)).mode())
    assert np.array_equal(make()[0], picture.to_uint8(pixels)[0])
    assert np.array_equal(make(first_frame="exact")[0], fitted)


def test_decoding_in_chunks_changes_nothing(pipe: I2VPipeline, photo: NDArray[np.uint8]) -> None:
    z = latents(pipe, photo)
    decoded = []
    with torch.inference_mode():
        for pipe.decode_chunk in (1, 4, 6):
            decoded.append(pipe.decode(z))
    assert (decoded[0] - decoded[2]).abs().max() < 1e-5 and (decoded[1] - decoded[2]).abs().max() < 1e-5


def test_guidance_in_turn_equals_in_one_batch(pipe: I2VPipeline, photo: NDArray[np.uint8]) -> None:
    together = latents(pipe, photo, guidance_scale=5.0)
    pipe.guidance_in_turn = True
    apart = latents(pipe, photo, guidance_scale=5.0)
    scale = together.abs().max()
    assert (together - apart).abs().max() < 1e-4 * scale
    assert (latents(pipe, photo, guidance_scale=5.1) - apart).abs().max() > 1e-3 * scale, "the comparison is blind"


def test_context_keys_are_computed_once_per_run(
    pipe: I2VPipeline, photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = pipe.unet.context_kv
    monkeypatch.setattr(pipe.unet, "context_kv", lambda *a, **k: calls.append(1) or original(*a, **k))
    latents(pipe, photo, guidance_scale=5.0)
    assert len(calls) == 1, "both halves of guidance in one batch"
    latents(pipe, photo, guidance_scale=1.0)
    assert len(calls) == 2, "guidance of 1 runs one half"
    pipe.guidance_in_turn = True
    latents(pipe, photo, guidance_scale=5.0)
    assert len(calls) == 4


def test_the_known_frame_stays_bit_for_bit(pipe: I2VPipeline, photo: NDArray[np.uint8]) -> None:
    request = Request().resolved(pipe.preset, photo.shape[:2], pipe.max_frames, pipe.vae.cfg.factor)
    with torch.inference_mode():
        clean = pipe.known_frames({0: picture.fit(photo, 64, 64)}, request).latents[:, 0]
    assert torch.equal(latents(pipe, photo)[:, 0], clean)


def test_what_is_removed_leaves_the_base_s_bits(pipe: I2VPipeline, photo: NDArray[np.uint8], tmp_path: Path) -> None:
    """A LoRA merged and removed; the I2V-Adapter removed is a pipeline that never had one."""
    first = latents(pipe, photo)
    lora = TrainedLoRA(pipe.unet, ["*.attn?.to_*"], 2, torch.Generator().manual_seed(0))
    pairs = {k: replace(pair, up=torch.ones_like(pair.up)) for k, pair in lora.pairs().items()}
    base = base_of({"unet": pipe.unet, "text_encoder": pipe.text_encoder.encoder})
    assert base is not None
    write_lora(tmp_path / "style.safetensors", {"unet": pairs}, base)
    merged = merge({"unet": pipe.unet}, tmp_path / "style.safetensors", 0.5)
    changed = latents(pipe, photo)
    merged.remove()
    assert (changed - first).abs().max() > 1e-2 and torch.equal(latents(pipe, photo), first)

    for adapter in pipe.i2v_adapter.values():
        adapter.scale = 0.0
    off = latents(pipe, photo)
    remove_i2v_adapter(pipe.unet)
    assert torch.equal(latents(pipe, photo), off) and not torch.equal(off, first)


def test_a_lora_s_folder_is_known_by_the_file_that_is_read(
    pipe: I2VPipeline, miniature: Path, device: torch.device, photo: NDArray[np.uint8], tmp_path: Path
) -> None:
    """As PEFT and diffusers call it; asked for after the denoising, where an error would cost the video."""
    lora = TrainedLoRA(pipe.unet, ["*.attn?.to_*"], 2, torch.Generator().manual_seed(0))
    base = base_of({"unet": pipe.unet, "text_encoder": pipe.text_encoder.encoder})
    assert base is not None
    for name in ("adapter_model", "pytorch_lora_weights"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"not this one")
        write_lora(folder / f"{name}.safetensors", {"unet": lora.pairs()}, base)
        made = load("tiny", device, folder=miniature, lora=folder)(photo, "a cat", steps=1, num_frames=2)
        assert made.settings["weights"]["lora 1"]["sha256"] == sha256(folder / f"{name}.safetensors")


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (16, 40), (104, 24), (72, 88)])
def test_portrait_landscape_and_any_size(pipe: I2VPipeline, photo: NDArray[np.uint8], size: tuple[int, int]) -> None:
    """Every size that the VAE's factor divides, also where the UNet cannot halve it evenly."""
    frames = pipe(photo, "a cat", steps=1, num_frames=2, height=size[0], width=size[1]).frames
    assert frames.shape == (2, *size, 3)
    near = picture.fit(photo, *size).mean(axis=(0, 1))
    assert np.abs(frames[0].mean(axis=(0, 1)) - near).max() < 128, "no picture any more"


def test_released_settings_run(make: Make, photo: NDArray[np.uint8]) -> None:
    assert make(**{**released_settings(), "steps": 2}).shape == (4, *picture.released_size(90, 120, 64), 3)


def test_bfloat16(miniature: Path, photo: NDArray[np.uint8], device: torch.device, make: Make) -> None:
    half = load("tiny", device, torch.bfloat16, miniature)
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16, torch.float32}
    assert all(p.dtype == torch.float32 for m in half.i2v_adapter.values() for p in m.parameters())
    frames = half(photo, "a red ball moves left", steps=3, num_frames=4).frames
    assert np.abs(frames.astype(int) - make().astype(int)).mean() < 8, "not the float32 video any more"


def test_the_unguided_half_s_picture(pipe: I2VPipeline, photo: NDArray[np.uint8]) -> None:
    """A grey one, the user's, or zeros in place of what CLIP sees in it; CLIP looks at each picture once."""
    tokens: dict[str, torch.Tensor] = {}
    seen: list[int] = []
    pipe.image_encoder.register_forward_pre_hook(lambda encoder, given: seen.append(len(given[0])))
    for name in ("zero-pixels", "zero-embedding", "same"):
        request = Request(prompt="a red ball", unconditional_image=name, num_frames=4)  # type: ignore[arg-type]
        request = request.resolved(pipe.preset, photo.shape[:2], pipe.max_frames, pipe.vae.cfg.factor)
        with torch.inference_mode():
            unguided, guided = pipe.conditions(photo, request)
        tokens[name], own = unguided.inputs.image_tokens, guided.inputs.image_tokens
    with torch.inference_mode():
        zeros = pipe.image_projection(torch.zeros(1, pipe.image_config.image_dim, device=pipe.device))
    assert torch.allclose(tokens["zero-embedding"], zeros, atol=1e-6) and torch.equal(tokens["same"], own)
    assert seen == [2, 1, 1]
    assert not torch.equal(tokens["zero-pixels"], zeros) and not torch.equal(tokens["zero-pixels"], own)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_numbers_that_overflow_are_no_black_video(
    miniature: Path, photo: NDArray[np.uint8], device: torch.device, part: str
) -> None:
    broken = load("tiny", device, folder=miniature)
    next(reversed(list(getattr(broken, part).parameters()))).data.fill_(torch.inf)
    with pytest.raises(Overflow, match="latents.*float32; lower" if part == "unet" else "frames.*float32; lower"):
        broken(photo, "a red ball", steps=1, num_frames=2)


def test_a_vae_that_float16_does_not_hold_goes_on_in_float32(
    miniature: Path, photo: NDArray[np.uint8], device: torch.device, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """In both directions; numbers that float32 does not hold either are told as before."""
    half = load("tiny", device, torch.float16, miniature)
    encode, decode = type(half.vae).encode, type(half.vae).decode

    def encoded(vae: VAE, x: torch.Tensor, tile: int) -> Posterior:
        made = encode(vae, x, tile)
        return Posterior(made.mean * (torch.nan if x.dtype == torch.float16 else 1), made.std)

    def decoded(vae: VAE, z: torch.Tensor, tile: int) -> torch.Tensor:
        return decode(vae, z, tile) * (torch.inf if z.dtype == torch.float16 else 1)

    plain = half(photo, "a red ball", steps=1, num_frames=2).frames
    for name, spoilt in (("encode", encoded), ("decode", decoded)):
        half.vae.half()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            caplog.clear()
            patch.setattr(type(half.vae), name, spoilt)
            frames = half(photo, "a red ball", steps=1, num_frames=2).frames
        assert caplog.text.count("too large for float16: the VAE goes on in float32") == 1
        assert half.vae_dtype == torch.float32 and np.abs(frames.astype(int) - plain).mean() < 3


def test_no_tensor_stays_on_meta(pipe: I2VPipeline) -> None:
    for name in ("unet", "vae", "text_encoder", "image_encoder", "image_projection"):
        module = getattr(pipe, name)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        assert tensors and all(not t.is_meta and t.device.type == pipe.device.type for t in tensors.values())
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_a_long_prompt_says_what_is_cut(make: Make, caplog: pytest.LogCaptureFixture, pipe: I2VPipeline) -> None:
    with caplog.at_level(logging.WARNING):
        make(negative_prompt="")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        make(negative_prompt="ball " * 400 + "the very end")
    assert "the very end" in caplog.text and "cut" in caplog.text


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_frames": 10_000}, "--num-frames 10000"),
        ({"num_frames": 30, "window": 25}, "--window 25: expected 4 to 24"),
        ({"num_frames": 30, "window": 3}, "--window 3: expected 4 to 24"),
        ({"num_frames": 30, "window": 8, "window_overlap": 7}, "--window-overlap 7: expected 0 to 6"),
        ({"num_frames": 8, "window_overlap": 2}, "--window-overlap 2: 8 frames are one window"),
        ({"motion_scale": -1.0}, "--motion-scale -1"),
        ({"num_frames": 1}, "--num-frames 1"),
        ({"height": 63}, "--height 63"),
        ({"width": 0, "height": 64}, "--width 0"),
        ({"t0": 0.0}, "--t0 0.0"),
        ({"t0": 1.5}, "--t0 1.5"),
        ({"t0": float("nan")}, "--t0 nan"),
        ({"p": -0.1}, "--p -0.1"),
        ({"steps": 0}, "--steps 0"),
        ({"steps": 1001}, "--steps 1001"),
        ({"fit": "squeeze"}, "--fit squeeze"),
        ({"sampler": "plms"}, "--sampler plms"),
        ({"guidance_scale": -1.0}, "--guidance-scale -1"),
        ({"fps": 0}, "--fps 0"),
    ],
)
def test_values_out_of_range_are_named(make: Make, settings: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make(**settings)


def test_size_from_the_picture(pipe: I2VPipeline) -> None:
    wide = replace(pipe.preset, any_aspect=True, side=512, multiple=64)

    def size(preset: object = wide, **given: object) -> tuple[int | None, int | None]:
        full = Request(**given).resolved(preset, (720, 1280), 24, 8)  # type: ignore[arg-type]
        return full.height, full.width

    height, width = size()
    assert height and width and height % 64 == width % 64 == 0 and width > height and height * width <= 512 * 512
    assert size(fit="released") == (512, 896)
    assert size(height=256) == (256, 448) and size(width=256) == (128, 256)
    assert size(height=72, width=104) == (72, 104)
    assert size(pipe.preset) == (64, 64)


def test_the_shipped_model_in_bfloat16(photo: NDArray[np.uint8]) -> None:
    """The same video as in float32, but for rounding; another seed's is far from it."""

    def made(dtype: torch.dtype, seed: int = 0) -> NDArray[np.float64]:
        result = load("tiny", dtype=dtype)(photo, "a red ball moves left", seed=seed, steps=4, num_frames=4)
        return result.frames.astype(np.float64)

    exact = made(torch.float32)
    error = np.square(made(torch.bfloat16) - exact).mean()
    assert error < 255**2 / 10**4, "at least 40 dB"
    assert np.square(made(torch.float32, seed=1) - exact).mean() > 10 * error


def test_numbers_and_pictures_of_other_packages(pipe: I2VPipeline, photo: NDArray[np.uint8]) -> None:
    """NumPy's integers are kept as plain ones, which the video's settings hold; a PIL picture is told how to be one."""
    request = Request(seed=np.int64(3), num_frames=np.int32(4))  # type: ignore[arg-type]
    request = request.resolved(pipe.preset, (64, 64), pipe.max_frames, pipe.vae.cfg.factor)
    assert json.loads(json.dumps({"seed": request.seed, "frames": request.num_frames})) == {"seed": 3, "frames": 4}
    with pytest.raises(ConfigError, match="--seed 3.7: expected a whole number"):
        Request(seed=3.7).resolved(pipe.preset, (64, 64), pipe.max_frames, 8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got a Image; give np.array"):
        pipe(Image.fromarray(photo), "a red ball")  # type: ignore[arg-type]
