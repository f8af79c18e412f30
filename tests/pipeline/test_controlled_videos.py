"""Videos steered by ControlNets: what acts, what must not change a bit, what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import random_miniature
import torch
from numpy.typing import NDArray

from i2v import picture
from i2v.config import ConfigError
from i2v.control import looked_at
from i2v.load import load, save_part
from i2v.models.controlnet import ControlNetConfig, controlnet_from
from i2v.models.unet import UNet
from i2v.pipeline import I2VPipeline
from i2v.request import Request
from i2v.video import write_video

FRAMES = 4


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random miniature with two random ControlNets: one in its folder, for canny, and one beside it."""
    folder = random_miniature.write(tmp_path_factory.mktemp("controlled"))
    for seed, name in enumerate(("controlnet.safetensors", "other/controlnet.safetensors")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = controlnet_from(UNet(random_miniature.UNET), (8, 8, 8, 8))
            for key, parameter in net.named_parameters():
                if "cond_embedding" in key and parameter.ndim > 1:  # PyTorch's own would let the picture fade
                    torch.nn.init.kaiming_normal_(parameter)
                elif not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.2)
        (folder / name).parent.mkdir(exist_ok=True)
        save_part(folder / name, net, net.cfg, control="canny")
    return folder


@pytest.fixture
def pipe(controlled: Path, device: torch.device) -> I2VPipeline:
    return load("tiny", device, folder=controlled, controlnet=f"pose={controlled}/other/controlnet.safetensors")


@pytest.fixture
def maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A white square that moves down, as a folder of pictures."""
    monkeypatch.chdir(tmp_path)
    Path("maps").mkdir()
    for number in range(FRAMES):
        frame = np.zeros((64, 64, 3), np.uint8)
        frame[8 + 8 * number : 24 + 8 * number, 20:40] = 255
        cv2.imwrite(f"maps/{number}.png", frame)
    return tmp_path


def latents(pipe: I2VPipeline, photo: NDArray[np.uint8], **settings: object) -> torch.Tensor:
    """The run up to the decoder, in float32."""
    request = Request(prompt="a red ball", steps=4, num_frames=FRAMES, **settings)  # type: ignore[arg-type]
    request = request.resolved(pipe.preset, photo.shape[:2], pipe.max_frames, pipe.vae.cfg.factor)
    maps = looked_at(request, list(pipe.controlnets), 4)
    with torch.inference_mode():
        known = pipe.known_frames({0: picture.fit(photo, 64, 64)}, request)
        return pipe.denoise(known, pipe.conditions(photo, request), request, maps=maps)


def test_without_controls_the_base_s_bits_are_back(pipe, controlled, photo, maps: Path) -> None:  # type: ignore
    steered = latents(pipe, photo, control=("canny=maps",))
    after = latents(pipe, photo)
    (controlled / "controlnet.safetensors").rename(controlled / "aside.safetensors")
    try:
        plain = load("tiny", pipe.device, folder=controlled)
    finally:
        (controlled / "aside.safetensors").rename(controlled / "controlnet.safetensors")
    assert not plain.controlnets and set(pipe.controlnets) == {"canny", "pose"}
    base = latents(plain, photo)
    assert torch.equal(after, base)
    assert torch.equal(latents(pipe, photo, control=("canny=maps",), control_scale=0.0), base)
    assert (steered - base).abs().max() > 1e-2


def test_every_setting_acts(pipe: I2VPipeline, photo: NDArray[np.uint8], maps: Path) -> None:
    first = latents(pipe, photo, control=("canny=maps",))
    assert torch.equal(latents(pipe, photo, control=("canny=maps",)), first)
    assert torch.equal(latents(pipe, photo, control=("canny=maps:0.5",), control_scale=2.0), first)
    for change in (
        {"control": ("pose=maps",)}, {"control": ("canny=maps", "pose=maps")}, {"control": ("canny=maps:0.5",)},
        {"control": ("canny=maps/0.png",)}, {"control_scale": 0.5}, {"control_start": 0.5}, {"control_end": 0.5},
        {"control_first_frame": False},
    ):  # fmt: skip
        other = latents(pipe, photo, **{"control": ("canny=maps",), **change})
        assert (other - first).abs().max() > 1e-3, f"{change} changed nothing"


def test_the_clean_first_frame_is_reached_by_default(
    pipe: I2VPipeline, photo: NDArray[np.uint8], maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own map is what the UNet is given for it, nothing with the switch off; other frames stay."""
    seen: list[torch.Tensor] = []
    forward = pipe.unet.forward

    def spy(*a: object, control: list[torch.Tensor] | None = None, **k: object) -> torch.Tensor:
        assert control is not None
        seen.append(control[0].unflatten(0, (-1, FRAMES)).clone())
        return forward(*a, control=control, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(pipe.unet, "forward", spy)
    latents(pipe, photo, control=("canny=maps",), guidance_scale=5.0)
    on = seen[0]
    seen.clear()
    latents(pipe, photo, control=("canny=maps",), guidance_scale=5.0, control_first_frame=False)
    off = seen[0]
    assert on.shape[0] == 2 and (on[:, 0].abs().amax(dim=(1, 2, 3)) > 0).all()
    assert not off[:, 0].any() and torch.equal(off[:, 1:], on[:, 1:])
    cv2.imwrite("maps/0.png", np.zeros((64, 64, 3), np.uint8))
    seen.clear()
    latents(pipe, photo, control=("canny=maps",), guidance_scale=5.0)
    assert not torch.equal(seen[0][:, 0], on[:, 0]) and torch.equal(seen[0][:, 1:], on[:, 1:])


def test_windows_of_a_long_video_bring_their_own_maps(
    pipe: I2VPipeline, photo: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a frame is given depends on its own map alone, whichever window it stands in; the first picture's in all."""
    clip = np.zeros((12, 64, 64, 3), np.uint8)
    for number in range(12):
        clip[number, 4 * number : 4 * number + 16, 20:40] = 255
    monkeypatch.chdir(tmp_path)
    given = {"control": ["canny=maps"], "steps": 1, "num_frames": 12, "window": 6, "window_overlap": 2}
    parts = Request(num_frames=12, window=6, window_overlap=2).windows(0)
    assert len(parts) == 3 and all(part.frames[0] == 0 for part in parts)
    seen: list[torch.Tensor] = []
    forward = UNet.forward

    def spy(*a: object, control: list[torch.Tensor] | None = None, num_frames: int, **k: object) -> torch.Tensor:
        assert control is not None
        seen.append(control[0].unflatten(0, (-1, num_frames)).clone())
        return forward(*a, control=control, num_frames=num_frames, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(UNet, "forward", spy)

    def made(frames: NDArray[np.uint8], **settings: object) -> tuple[NDArray[np.uint8], list[torch.Tensor]]:
        """The video, and the residuals of the first step's windows."""
        write_video("maps", frames, 8, overwrite=True)
        seen.clear()
        return pipe(photo, "a red ball", **{**given, **settings}).frames, list(seen[: len(parts)])

    first, residuals = made(clip)
    assert first.shape[0] == 12 and [x.shape[1] for x in residuals] == [6, 6, 6]
    for changed in (0, 9):
        other = clip.copy()
        other[changed] = np.roll(clip[changed], 24, axis=1)
        frames, found = made(other)
        for part, before, after in zip(parts, residuals, found, strict=True):
            touched = [frame for i, frame in enumerate(part.frames) if not torch.equal(before[:, i], after[:, i])]
            assert touched == ([changed] if changed in part.frames else []), (changed, part.frames)
        assert not np.array_equal(frames[1:], first[1:])
    whole = [made(clip, window=window, window_overlap=None)[0] for window in (12, None)]
    assert np.array_equal(*whole)


def test_guidance_in_turn_equals_in_one_batch(pipe: I2VPipeline, photo: NDArray[np.uint8], maps: Path) -> None:
    given = {"control": ("canny=maps",), "guidance_scale": 5.0}
    together = latents(pipe, photo, **given)
    pipe.guidance_in_turn = True
    scale = together.abs().max()
    assert (latents(pipe, photo, **given) - together).abs().max() < 1e-4 * scale
    other = latents(pipe, photo, **{**given, "control": ("canny=maps:0.9",)})
    assert (other - together).abs().max() > 1e-3 * scale, "the comparison is blind"


def test_what_is_recorded(pipe: I2VPipeline, photo: NDArray[np.uint8], maps: Path) -> None:
    given = {"steps": 2, "num_frames": FRAMES, "control": ["canny=maps:0.7"]}
    settings = pipe(photo, "a red ball", **given).settings  # type: ignore[arg-type]
    assert json.loads(json.dumps(settings)) == settings
    assert settings["request"]["control"] == ["canny=maps:0.7"]
    assert [one["file"] for one in settings["controls"]] == ["maps"] and len(settings["controls"][0]["sha256"]) == 64
    used = {name for name in settings["weights"] if name.startswith("controlnet")}
    assert used == {"controlnet canny"}, "one that no control names changes nothing"
    assert settings["files"]["controlnet"][0].startswith("pose=")
    alone = pipe(photo, "a red ball", **{**given, "control": "canny=maps:0.7"}).settings  # type: ignore[arg-type]
    assert alone == settings, "a text is one control"


def test_bfloat16(controlled: Path, photo: NDArray[np.uint8], maps: Path, device: torch.device) -> None:
    half = load("tiny", device, torch.bfloat16, controlled)
    assert half.controlnets["canny"].conv_in.weight.dtype == torch.bfloat16
    frames = half(photo, "a red ball", steps=2, num_frames=FRAMES, control=["canny=maps"]).frames
    assert frames.shape == (FRAMES, 64, 64, 3)


def test_of_another_size_is_refused(controlled: Path, tmp_path: Path) -> None:
    import dataclasses

    config = dataclasses.replace(random_miniature.UNET, context_dim=40)
    with torch.random.fork_rng(devices=[]):
        net = controlnet_from(UNet(config), (8, 8, 8, 8))
    path = save_part(tmp_path / "controlnet.safetensors", net, net.cfg)
    with pytest.raises(ConfigError, match="text of width 40.*take one made for this base"):
        load("tiny", folder=controlled, controlnet=f"pose={path}")
    with torch.random.fork_rng(devices=[]):
        net = controlnet_from(UNet(random_miniature.UNET), (8, 8))
    assert isinstance(net.cfg, ControlNetConfig)
    path = save_part(tmp_path / "controlnet.safetensors", net, net.cfg)
    with pytest.raises(ConfigError, match="makes a latent of 2 pixels, expected 8"):
        load("tiny", folder=controlled, controlnet=f"pose={path}")
