"""One step of the training: what is drawn, what is noised, what the loss sees, what is trained."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_training import Toy, same

import train
from i2v import config
from i2v.config import ConfigError
from i2v.data.latents import WorldLatents
from i2v.data.world import WORLDS, captions
from i2v.training import batches as train_batches
from i2v.training import validation
from i2v.training.batches import Batch, Batches
from i2v.training.clips import open_clips
from i2v.training.networks import Networks
from i2v.training.validation import held_out, other_motion, validate


@pytest.fixture(scope="module")
def data(toy: Toy) -> WorldLatents:
    cfg = toy.config()
    return toy.build(cfg).encoded_world(cfg.cache, cfg.world, "train", cfg.clips)


@pytest.fixture
def networks(toy: Toy) -> Networks:
    """With an adapter that has an effect: a fresh one gives zero."""
    built = toy.build(toy.config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in built.named_parameters().items():
            if name.startswith("i2v_adapter."):
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    return built


def drawn(cfg: train.Training, data: WorldLatents, networks: Networks, first: int, count: int) -> Batch:
    return Batches(cfg, data, networks).draw(first, count)


def joined(batches: list[Batch]) -> dict[str, Any]:
    out: dict[str, Any] = {"captions": [c for b in batches for c in b.captions]}
    for name in ("latents", "noise", "timesteps", "image_features"):
        out[name] = torch.cat([getattr(b, name) for b in batches])
    return out


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = [{k: v for k, v in x.items() if isinstance(v, Tensor)} for x in (a, b)]
    return a["captions"] == b["captions"] and same(*tensors)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"workers": -2}, "--workers -2: expected 0 or more"),
        ({"threads": -3}, "--threads -3: expected 0 or more"),
        ({"warmup": -5}, "--warmup -5: expected 0 or more"),
        ({"lr": float("nan")}, "--lr nan: expected 0 or more"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0: expected 0 or more"),
        ({"guidance_scale": -3.0}, "--guidance-scale -3.0: expected 0 or more"),
        ({"fps": 0.0}, "--fps 0.0: expected more than 0"),
        ({"steps": 0}, "--steps 0: expected at least 1"),
        ({"clip_norm": 0.0}, "--clip-norm 0.0: expected more than 0"),
        ({"preset": "tinny"}, "tinny.*known are tiny"),
        ({"report": ("tensorbord",)}, "--report tensorbord: expected tensorboard or wandb"),
    ],
)
def test_settings_out_of_their_range_are_named_at_once(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train.Training(**changed)


def test_what_is_missing_is_told_before_the_clips_are_looked_at(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "open_clips", lambda *_: pytest.fail("the clips were opened"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="--report tensorboard: tensorboard is not installed"):
        toy.run(tmp_path, report=("tensorboard",))
    with pytest.raises(
        ConfigError, match=r"--init absent: there is no such folder .*; the miniature's is /.*weights/tiny"
    ):
        toy.run(tmp_path, init=Path("absent"))


def test_draws_depend_on_seed_and_sample_alone(toy: Toy, data: WorldLatents, networks: Networks) -> None:
    """However the samples are cut into batches, whatever was drawn before: what lets a run stop and go on anywhere."""
    cfg = toy.config()

    def draws(sizes: list[int], first: int = 0, **changed: Any) -> dict[str, Any]:
        starts = [first + sum(sizes[:k]) for k in range(len(sizes))]
        return joined([drawn(replace(cfg, **changed), data, networks, s, n) for s, n in zip(starts, sizes)])

    whole = draws([12])
    assert equal(whole, draws([2] * 6)) and equal(whole, draws([1, 5, 6], batch=3, steps=99, lr=1.0))
    tail = draws([4], first=8)
    assert torch.equal(tail["noise"], whole["noise"][8:]) and tail["captions"] == whole["captions"][8:]
    other = draws([12], seed=1)
    assert all(not torch.equal(whole[k], other[k]) for k in ("latents", "noise", "timesteps", "image_features"))
    assert len({tuple(row.flatten()[:3].tolist()) for row in whole["noise"]}) == 12
    assert whole["latents"].shape == whole["noise"].shape == (12, 3, 4, 4, 4)


def test_a_gpus_way_to_the_batches_gives_the_same(
    toy: Toy, data: WorldLatents, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn ahead by threads, latents in one tensor: what happens on a GPU, here without one. What waits takes none of
    its memory: a batch is sent when its turn comes."""
    batches = Batches(toy.config(), data, networks)
    one_by_one = list(batches.of_steps(1, 9))
    batches.threads, senders = 3, set()
    monkeypatch.setattr(train_batches, "sent", lambda x, device: (senders.add(threading.current_thread()), x)[1])
    assert equal(joined(list(batches.of_steps(1, 9))), joined(one_by_one)) and len(one_by_one) == 8
    assert senders == {threading.main_thread()}
    batches.latents = torch.from_numpy(np.array(data.latents))
    assert equal(joined(list(batches.of_steps(1, 9))), joined(one_by_one))
    few = batches.of_steps(0, 99)
    assert equal(joined([next(few)]), joined([batches.draw(0, 2)]))
    few.close()  # a run that stops leaves no thread at work
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]


def test_timesteps_are_uniform_and_conditions_are_dropped_as_often_as_asked(
    toy: Toy, data: WorldLatents, networks: Networks
) -> None:
    cfg = toy.config(drop_text=0.3, drop_image=0.2, num_frames=1, clips=6)
    batch = drawn(cfg, data, networks, 0, 400)
    counts = torch.histc(batch.timesteps.float(), 10, 0, 1000)
    assert batch.timesteps.min() >= 0 and batch.timesteps.max() < 1000 and (counts - 40).abs().max() <= 3
    zero = networks.image_features(data, cfg.cache)
    assert batch.image_features is not None and zero is not None
    no_text = [caption == "" for caption in batch.captions]
    no_image = [torch.equal(embeds, zero[-1]) for embeds in batch.image_features]
    assert sum(no_text) / 400 == pytest.approx(0.3, abs=0.07) and sum(no_image) / 400 == pytest.approx(0.2, abs=0.06)
    assert sum(a and b for a, b in zip(no_text, no_image)) / 400 == pytest.approx(0.06, abs=0.035)  # independently
    assert set(batch.captions) - {""} == set(data.captions)
    assert len({tuple(z.flatten().tolist()) for z in batch.latents}) > 40  # single pictures come from the whole clip
    more = drawn(replace(cfg, drop_both=0.25), data, networks, 0, 400)
    assert more.image_features is not None
    together = [not caption and torch.equal(row, zero[-1]) for caption, row in zip(more.captions, more.image_features)]
    assert sum(together) / 400 == pytest.approx(0.25 + 0.75 * 0.06, abs=0.065)
    kept = [k for k, gone in enumerate(together) if not gone]  # to them nothing has happened
    assert [more.captions[k] for k in kept] == [batch.captions[k] for k in kept]
    assert torch.equal(more.image_features[kept], batch.image_features[kept])
    bare = drawn(replace(cfg, parts=("motion",)), data, networks, 0, 2)
    assert bare.image_features is None and torch.equal(bare.latents, batch.latents[:2])


def test_a_clip_keeps_its_whole_motion(toy: Toy, data: WorldLatents, networks: Networks) -> None:
    """First and last frame are always among the frames, the others evenly between."""
    for number, frames in ((2, [0, 15]), (3, [0, 8, 15]), (4, [0, 5, 10, 15]), (16, list(range(16)))):
        clip = drawn(toy.config(num_frames=number), data, networks, 0, 1).latents[0]
        assert any(torch.equal(clip, data.clip(index, frames)) for index in range(len(data)))


def seen_by_unet(networks: Networks, run: Any) -> tuple[Tensor, Tensor]:
    """The UNet's input and the gradient of its output, (B, F, ...), while `run()` makes a loss."""
    caught: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.requires_grad_().retain_grad()
        caught.extend((inputs[0], output))

    hook = networks.unet.register_forward_hook(keep)
    run().sum().backward()
    hook.remove()
    assert caught[1].grad is not None
    return caught[0].unflatten(0, (-1, 3)), caught[1].grad.unflatten(0, (-1, 3))


@pytest.mark.parametrize("clean", [True, False])
def test_the_first_frame_is_clean_and_out_of_the_loss(
    toy: Toy, data: WorldLatents, networks: Networks, clean: bool
) -> None:
    """Off, all of it turns around: the test sees what the setting does."""
    cfg = toy.config(clean_first=clean)
    batch = drawn(cfg, data, networks, 0, 2)
    given, gradient = seen_by_unet(networks, lambda: train.loss_of(cfg, networks, batch))
    noisy = networks.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    assert torch.equal(given[:, 1:], noisy[:, 1:])
    assert torch.equal(given[:, 0], (batch.latents if clean else noisy)[:, 0])
    assert not torch.equal(batch.latents[:, 0], noisy[:, 0])
    assert gradient[:, 1:].flatten(1).any(1).all() and gradient[:, 0].any() == (not clean)

    noise = batch.noise.clone()
    noise[:, 0] += 1
    losses = [train.loss_of(cfg, networks, b).detach() for b in (batch, replace(batch, noise=noise))]
    assert losses[0].shape == (2,) and torch.equal(*losses) == clean
    other = train.loss_of(replace(cfg, clean_first=not clean), networks, batch)
    assert (other - losses[0]).abs().min() > 1e-3


def test_trained_tensors_alone_get_gradients(toy: Toy, data: WorldLatents, networks: Networks) -> None:
    """All of them, and only they."""
    cfg = toy.config()
    chosen = train.trained_tensors(cfg, networks)
    batch = drawn(cfg, data, networks, 0, 2)
    train.loss_of(cfg, networks, batch).mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in chosen.values())
    assert all(p.grad is None for name, p in networks.named_parameters().items() if name not in chosen)


def test_single_pictures_have_no_known_frame(toy: Toy, data: WorldLatents, networks: Networks) -> None:
    cfg = toy.config(num_frames=1, clean_first=True)
    assert torch.isfinite(train.loss_of(cfg, networks, drawn(cfg, data, networks, 0, 2))).all()


def test_bfloat16_computes_and_float32_stores(toy: Toy, data: WorldLatents, networks: Networks) -> None:
    full, half = toy.config(), toy.config(dtype="bfloat16")
    chosen = train.trained_tensors(half, networks)
    batch = drawn(full, data, networks, 0, 2)
    a, b = (train.loss_of(cfg, networks, batch) for cfg in (full, half))
    assert b.dtype == torch.float32 and not torch.equal(a, b) and torch.allclose(a, b, rtol=0.05)
    b.mean().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == p.dtype for p in chosen.values())


@pytest.mark.parametrize("able", [True, False])
def test_the_chosen_number_format_is_recorded(
    toy: Toy, tmp_path: Path, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another kind of processor the run is not gone on with in another format unasked."""
    chosen, other = ("bfloat16", "float32") if able else ("float32", "bfloat16")
    monkeypatch.setattr("i2v.device.computes_bfloat16", lambda: able)
    toy.run(tmp_path, dtype="auto", steps=1)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == chosen
    monkeypatch.setattr("i2v.device.computes_bfloat16", lambda: not able)
    with pytest.raises(ConfigError, match=f"dtype: '{chosen}' -> '{other}'"):
        toy.run(tmp_path, dtype="auto", steps=1)
    toy.run(tmp_path, dtype=chosen, steps=1)


def test_patterns_choose_what_is_trained(toy: Toy, networks: Networks) -> None:
    cfg = toy.config(train=("i2v_adapter.*.to_q.weight", "unet.conv_in.*"))
    chosen = train.trained_tensors(cfg, networks)
    assert {k.rsplit(".", 2)[-2] for k in chosen} == {"to_q", "conv_in"}
    assert chosen.keys() == {k for k, p in networks.named_parameters().items() if p.requires_grad}
    count = networks.summary(chosen)
    assert count["i2v_adapter"]["trained"] == sum(p.numel() for k, p in chosen.items() if "to_q" in k)
    assert count["motion"]["trained"] == 0 and count["motion"]["all"] > 0


def test_a_pattern_that_matches_nothing_is_an_error(toy: Toy, tmp_path: Path) -> None:
    for wrong in (("i2v_adaptor.*",), ("i2v_adapter.*", "i2v_adaptor.*")):
        with pytest.raises(ConfigError, match="--train 'i2v_adaptor.*' matches no tensor") as error:
            toy.run(tmp_path / "out", train=wrong)
        assert "names are like" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(
        ConfigError, match="--new motion begins a part anew of which --train names no tensor.*'motion.*'"
    ):
        toy.run(tmp_path / "out", new=("i2v_adapter", "motion"))
    assert not (tmp_path / "out").exists()


def test_validation_is_repeatable_and_told_by_words(
    toy: Toy, data: WorldLatents, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = toy.config()
    monkeypatch.setattr(validation, "MOST", 4)

    def validated(**changed: Any) -> dict[str, float]:
        other = replace(cfg, **changed)
        return validate(other, networks, held_out(other, networks, open_clips(other, networks)), train.loss_of)

    row = validated()
    assert set(row) == {f"{kind}_{t}" for kind in ("val", "gap") for t in (200, 400, 600, 800, 950)}
    assert row == validated(seed=5, drop_text=1.0, drop_image=1.0, drop_both=1.0)
    assert all(abs(v) > 1e-7 for k, v in row.items() if k.startswith("gap"))  # even a random text encoder is heard
    assert not [k for k in validated(num_frames=1) if k.startswith("gap")]


@pytest.mark.parametrize("level", WORLDS)
def test_another_motion_is_another_true_caption(level: str) -> None:
    world = WORLDS[level]
    known = set(captions(world))
    for caption in sorted(known)[::197]:
        others = {other_motion(world, caption, turn) for turn in range(len(world.motions))}
        assert caption not in others and len(others) == len(world.motions) - 1 and others <= known


@pytest.mark.parametrize("name", ["1-image", "2-motion", "3-content", "4-i2v"])
def test_the_stages_settings_are_settings(root: Path, name: str) -> None:
    """Each file is read without a complaint, and the last stage trains what the paper trains."""
    cfg = config.from_command_line(train.Training, ["--config", str(root / "configs" / "tiny" / f"{name}.json")])
    assert cfg != train.Training() and {f.name for f in fields(cfg)} == set(config.to_dict(cfg))
    if name == "4-i2v":
        assert cfg.train == ("i2v_adapter.*",) and cfg.clean_first and cfg.num_frames == 16


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [("--learning-rate", "0.5", "lr"), ("--max-train-steps", "7", "steps"), ("--max_grad_norm", "0.5", "clip_norm"),
     ("--snr-gamma", "5", "min_snr"), ("--lr-scheduler", "cosine", "decay"), ("--mixed-precision", "float16", "dtype"),
     ("--output-dir", "x", "out"), ("--rank", "8", "lora"), ("--lr-warmup-steps", "3", "warmup")],
)  # fmt: skip
def test_other_trainers_flags(flag: str, value: str, name: str) -> None:
    cfg = config.from_command_line(train.Training, [flag, value], "train.py")
    assert str(getattr(cfg, name)) in (value, f"{value}.0")
    assert replace(cfg, **{name: getattr(train.Training(), name)}) == train.Training(), "nothing else is changed"


def test_recomputation_has_its_usual_name_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.from_command_line(train.Training, ["--gradient-checkpointing"], "train.py").checkpointing
    with pytest.raises(SystemExit):
        config.from_command_line(train.Training, ["--gradient-checkpoint"], "train.py")
    assert "did you mean --checkpointing?" in capsys.readouterr().err, "and not its contrary"
