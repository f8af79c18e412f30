"""The authors' files at small size, given to sample.py by their flags: the reference's video comes out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
import small_published
import torch
from torch import Tensor

import sample
from i2v import assemble, config, noise
from i2v.assemble import ModelFiles
from i2v.diffusion import frame_similarity_prior as prior
from i2v.pipeline import I2VPipeline
from i2v.prompt import TextConditioning

VIDEO = 5e-5  # pixels in [0, 1]; 9e-6 was measured here, and guidance amplifies rounding over the steps
ADAPTER = (".to_q_ff.", ".to_out_ff.")


@pytest.fixture
def folder(golden, tmp_path: Path) -> Path:
    """The reference's own weights under its own names; a text encoder and CLIP, which it stores no weights of."""
    pair, vae = golden("i2v_unet_sd15").weights(), golden("i2v_pipeline").weights("weight_vae")
    small_published.write(tmp_path)
    trained = {key: value for key, value in pair.items() if any(name in key for name in ADAPTER)}
    assert len(trained) == 48
    rest = {key: value for key, value in pair.items() if key not in trained}
    for name, tensors in (("animatediff_v15_v1_ipplus.pth", rest), ("i2v_module.pth", trained), ("vae.bin", vae)):
        small_published.save(tmp_path / name, tensors, torch.float32)
    return tmp_path


def run(golden, folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Tensor:
    """sample.py with the reference's prompt and image embeddings and random numbers; (F, 3, H, W) in [0, 1]."""
    data = golden("i2v_pipeline")
    small_published.use(monkeypatch)
    drawn = {"posterior": data.inputs["vae/posterior_noise"]}
    drawn["start"] = data.inputs["blur_f16/random/randn_like.0"][0].transpose(0, 1)[1:]  # of the unknown frames
    drawn["keep"] = 1 - data.inputs["blur_f16/mask"][0].transpose(0, 1)[1:].float()  # kept where it is below p

    def draw(seed: int, purpose: str, frames: object, step: int, shape: tuple[int, ...]) -> Tensor:
        assert drawn[purpose].shape[1:] == tuple(shape)
        return drawn[purpose]

    def text(pipe: I2VPipeline, request: object, negative: bool = False) -> TextConditioning:
        return TextConditioning(data.inputs["prompt_embeds_negative" if negative else "prompt_embeds"][:1])

    def image(pipe: I2VPipeline, pixels: Tensor, nothing: bool) -> Tensor:
        names = ["image_embeds" if one.any() else "image_embeds_uncond" for one in pixels]
        return torch.cat([data.inputs[name][:1] for name in names])

    start = functools.partial(prior.start_latents, size=9, sigma=18.0)  # the release's blur, which ours is at 512x512
    chunks: list[Tensor] = []
    decoded = I2VPipeline.decoded

    def kept(pipe: I2VPipeline, latents: Tensor, progress: bool = False) -> Iterator[Tensor]:
        for chunk in decoded(pipe, latents, progress):
            chunks.append(chunk)
            yield chunk

    for owner, name, fake in ((noise, "normal", draw), (noise, "uniform", draw), (I2VPipeline, "encode_text", text),
                              (I2VPipeline, "encode_image", image), (I2VPipeline, "decoded", kept),
                              (prior, "start_latents", start)):  # fmt: skip
        monkeypatch.setattr(owner, name, fake)
    picture = folder / "picture.png"
    cv2.imwrite(str(picture), data.inputs["vae/image_uint8"].numpy()[..., ::-1])
    argv = ["--preset", "i2v-sd15", "--image", str(picture), "--output", str(folder / "out.mp4"), "--overwrite"]
    assert sample.main([*argv, "--release", "--steps", "5", "--no-color-match", *flags]) == 0
    return torch.cat(chunks) / 2 + 0.5


def paths(folder: Path) -> list[str]:
    base = [str(folder / name) for name in ("v1-5-pruned-emaonly.safetensors", "animatediff_v15_v1_ipplus.pth")]
    return ["--base", *base, "--vae", str(folder / "vae.bin"), "--i2v", str(folder / "i2v_module.pth"), "--ip-adapter",
            str(folder / "ip-adapter-plus_sd15.safetensors"), "--image-encoder",
            str(folder / "models/image_encoder/model.safetensors")]  # fmt: skip


def test_by_their_flags(golden, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = golden("i2v_pipeline").outputs["blur_f16/video"][0].transpose(0, 1)
    video = run(golden, folder, monkeypatch, *paths(folder))
    assert float((video - reference).abs().max()) < VIDEO


def test_found_in_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same parts, by name and, where the name says nothing, by content."""
    small_published.use(monkeypatch)
    (folder / "vae.bin").unlink()  # of which there would be two
    flags = [flag for flag in paths(folder) if flag not in ("--vae", str(folder / "vae.bin"))]
    given = assemble.plan(config.from_command_line(ModelFiles, ["--preset", "i2v-sd15", *flags]))
    given.refuse()
    (folder / "i2v_module.pth").rename(folder / "renamed.bin")
    found = assemble.plan(ModelFiles("i2v-sd15", models=folder))
    found.refuse()
    assert found.parts.keys() == given.parts.keys() and "renamed.bin" in found.report()
    for name, part in given.parts.items():
        assert all(torch.equal(tensor, found.parts[name].tensors[key]) for key, tensor in part.tensors.items()), name


def test_another_adapter_is_seen(golden, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = small_published.published(small_published.parts_of(small_published.SD15, 1), "i2v-adapter-sd15")
    small_published.save(folder / "i2v_module.pth", other, torch.float32)
    reference = golden("i2v_pipeline").outputs["blur_f16/video"][0].transpose(0, 1)
    video = run(golden, folder, monkeypatch, *paths(folder))
    assert float((video - reference).abs().max()) > 10 * VIDEO
