"""What must not change a result, to the bit or within rounding; each with a case that does change it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from miniature import CLIPS, CONFIG, FRAMES, MOTION, base, complete, inputs, randomize
from torch import Tensor

from i2v.models.i2v_adapter import add_i2v_adapter, remove_i2v_adapter
from i2v.models.ip_adapter import add_ip_adapter, remove_ip_adapter
from i2v.models.motion import add_motion_modules, remove_motion_modules
from i2v.models.unet import DeepFeatures, UNet

ROUNDING = 1e-5
PER_FRAME_NORMS = dataclasses.replace(MOTION, resnet_norm_over_frames=False)


@torch.no_grad()
def run(unet: UNet, given: dict[str, Tensor] | None = None) -> Tensor:
    return unet(**({"num_frames": FRAMES} | (given or inputs())))


def without_image() -> dict[str, Tensor]:
    return {k: v for k, v in inputs().items() if k != "image_tokens"}


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_a_fresh_adapter_changes_no_bit():
    unet = base()
    add_motion_modules(unet, MOTION)
    randomize(unet, 1)
    before = run(unet, without_image())
    added = add_i2v_adapter(unet)
    assert torch.equal(run(unet, without_image()), before)
    next(iter(added.values())).to_out.bias.data += 0.1
    assert not torch.equal(run(unet, without_image()), before)


def test_fresh_motion_modules_change_no_bit():
    """Nothing but the norms that they set, here to single frames."""
    unet = base()
    before = run(unet, without_image())
    added = add_motion_modules(unet, PER_FRAME_NORMS)
    assert torch.equal(run(unet, without_image()), before)
    next(iter(added.values())).proj_out.bias.data += 0.1
    assert not torch.equal(run(unet, without_image()), before)


def test_scale_0_is_no_adapter():
    unet = complete()
    with_adapter = run(unet)
    for module in unet.modules():
        if getattr(module, "i2v_adapter", None) is not None:
            module.i2v_adapter.scale = 0.0
    silent = run(unet)
    remove_i2v_adapter(unet)
    assert torch.equal(run(unet), silent)
    assert apart(silent, with_adapter) > 100 * ROUNDING


@pytest.mark.parametrize("part", ["i2v_adapter", "ip_adapter", "motion"])
def test_add_and_remove_restores(part):
    unet = base()
    given, before, keys = without_image(), run(unet, without_image()), list(unet.state_dict())
    if part == "i2v_adapter":
        added, remove = add_i2v_adapter(unet), remove_i2v_adapter
    elif part == "ip_adapter":
        added, remove, given = add_ip_adapter(unet), remove_ip_adapter, inputs()
    else:
        added, remove = add_motion_modules(unet, MOTION), remove_motion_modules
    for module in added.values():
        randomize(module)
    assert apart(run(unet, given), before) > 100 * ROUNDING
    remove(unet)
    assert list(unet.state_dict()) == keys
    assert torch.equal(run(unet, without_image()), before)


@pytest.mark.parametrize("add", [add_i2v_adapter, add_ip_adapter, lambda unet: add_motion_modules(unet, MOTION)])
def test_adding_twice_is_refused(add):
    unet = base()
    add(unet)
    with pytest.raises(ValueError, match="call remove_"):
        add(unet)


def test_what_is_added_is_named_by_its_path():
    unet = base()
    for added in (add_motion_modules(unet, MOTION), add_i2v_adapter(unet), add_ip_adapter(unet)):
        assert added
        for path, module in added.items():
            assert unet.get_submodule(path) is module


def test_a_batch_of_two_is_two_of_one():
    unet, both = complete(), inputs()
    together = run(unet, both)
    for clip in range(CLIPS):
        own = {k: v[clip * len(v) // CLIPS : (clip + 1) * len(v) // CLIPS] for k, v in both.items()}
        assert apart(run(unet, own), together[clip * FRAMES : (clip + 1) * FRAMES]) < ROUNDING
    other = both | {"context": both["context"].flip(0)}
    assert apart(run(unet, other), together) > 100 * ROUNDING


def test_nothing_is_remembered_between_runs():
    """A, B, A: the third run has the bits of the first."""
    unet, other = complete(), inputs(seed=9, clips=1, frames=5, side=(4, 6))
    first = run(unet)
    run(unet, other | {"num_frames": 5})
    assert torch.equal(run(unet), first)


@pytest.mark.parametrize("names", [("timesteps",), ("context",), ("image_tokens",), ("timesteps", "context")])
def test_a_row_per_frame_is_a_row_per_clip(names):
    unet, given = complete(), inputs()
    per_frame = {name: given[name].repeat_interleave(FRAMES, dim=0) for name in names}
    if "context" in names:  # text and image tokens may have rows of their own
        assert len(given["image_tokens"]) == CLIPS
    want = run(unet, given)
    assert apart(run(unet, given | per_frame), want) < ROUNDING
    name = names[0]
    rows = per_frame[name]
    changed = torch.cat([rows[:1] * 0, rows[1:]])
    assert apart(run(unet, given | per_frame | {name: changed}), want) > 10 * ROUNDING


def test_keys_and_values_made_once():
    unet, given = complete(), inputs()
    kv = unet.context_kv(given["context"], given["image_tokens"])
    rest = {k: v for k, v in given.items() if k not in ("context", "image_tokens")}
    want = run(unet, given)
    assert apart(run(unet, rest | {"context": kv}), want) < ROUNDING  # not a bit with newer PyTorch; 1e-6 with 2.6
    other = unet.context_kv(given["context"].flip(0), given["image_tokens"])
    assert apart(run(unet, rest | {"context": other}), want) > 100 * ROUNDING


def test_deep_features_are_the_network_s_own():
    """Taken over into the call that made them they change no bit; into another they stand in for all but the last
    layer."""
    unet, given, deep = complete(), inputs(), DeepFeatures()
    want = run(unet, given)
    assert torch.equal(run(unet, given | {"deep": deep}), want)
    assert deep.state is not None and deep.state.shape == (CLIPS * FRAMES, 32, 8, 8)
    kept = deep.state.clone()
    assert torch.equal(run(unet, given | {"deep": deep}), want)
    other = given | {"latents": given["latents"] * 0.9}
    near = run(unet, other | {"deep": deep})
    assert not torch.equal(near, want), "the last layer was not computed"
    assert apart(near, run(unet, other)) > 100 * ROUNDING, "the other layers were"
    assert torch.equal(deep.state, kept), "written over"


def test_deep_features_of_others_are_refused():
    unet, given, deep = complete(), inputs(), DeepFeatures()
    run(unet, given | {"deep": deep})
    one = {k: v[: len(v) // CLIPS] for k, v in given.items()}
    with pytest.raises(ValueError, match="deep features of 6 frames, expected 3"):
        run(unet, one | {"deep": deep})
    with pytest.raises(ValueError, match="control"):
        run(unet, given | {"deep": deep, "control": []})


def test_stale_keys_and_values_are_refused():
    unet, given = complete(), inputs()
    kv = unet.context_kv(given["context"], given["image_tokens"])
    rest = {k: v for k, v in given.items() if k not in ("context", "image_tokens")}
    with pytest.raises(ValueError, match="another UNet's"):
        run(complete(), rest | {"context": kv})
    with pytest.raises(ValueError, match="already holds"):
        run(unet, given | {"context": kv})
    remove_ip_adapter(unet)
    with pytest.raises(ValueError, match="call context_kv again"):
        run(unet, rest | {"context": kv})


def test_the_anchor_is_the_frame_that_is_shared():
    """Anchor i on a clip is anchor 0 on the clip with frame i first, where nothing else knows the order."""
    unet, given = base(), without_image()
    add_i2v_adapter(unet)
    randomize(unet, 1)
    order = torch.tensor([2, 0, 1])
    frames = torch.cat([order + clip * FRAMES for clip in range(CLIPS)])
    want = run(unet, given | {"latents": given["latents"][frames]})
    assert apart(run(unet, given | {"anchor": 2})[frames], want) < ROUNDING
    assert apart(run(unet, given | {"anchor": 0})[frames], want) > 100 * ROUNDING


@pytest.mark.parametrize("side", [(8, 8), (5, 7), (1, 3)])
def test_any_latent_size(side):
    given = inputs(side=side)
    assert run(complete(), given).shape == given["latents"].shape


def test_zero_control_changes_nothing():
    unet, given = complete(), inputs()
    shapes = [(32, 8, 8), (32, 8, 8), (32, 4, 4), (48, 4, 4), (48, 4, 4)]
    zeros = [torch.zeros(CLIPS * FRAMES, *shape) for shape in shapes]
    want = run(unet, given)
    assert torch.equal(run(unet, given | {"control": zeros}), want)
    per_clip = [torch.ones(CLIPS, *shape) for shape in shapes]
    per_frame = [torch.ones(CLIPS * FRAMES, *shape) for shape in shapes]
    changed = run(unet, given | {"control": per_clip})
    assert torch.equal(run(unet, given | {"control": per_frame}), changed)
    assert apart(changed, want) > 100 * ROUNDING


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_frames": 4}, "6 latents are no clips of 4 frames"),
        ({"anchor": 3}, "no clips of 3 frames with anchor 3"),
        ({"timesteps": torch.zeros(4)}, "timesteps has 4 rows, expected one per clip"),
        ({"context": torch.zeros(3, 7, 24)}, "context has 3 rows"),
        ({"image_tokens": None}, "has an IP-Adapter: pass image_tokens"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        complete()(**{**inputs(), "num_frames": FRAMES, **changed})


def test_image_tokens_without_an_adapter_are_refused():
    with pytest.raises(ValueError, match="call add_ip_adapter first"):
        run(base())


def test_sdxl_needs_its_pooled_text():
    unet = base(dataclasses.replace(CONFIG, pooled_dim=12, size_dim=8))
    given = without_image()
    with pytest.raises(ValueError, match="pass pooled"):
        run(unet, given)
    extra = {"pooled": torch.ones(CLIPS, 12), "size_ids": torch.full((CLIPS, 6), 64.0)}
    per_frame = {k: v.repeat_interleave(FRAMES, dim=0) for k, v in extra.items()}
    want = run(unet, given | extra)
    assert apart(run(unet, given | per_frame), want) < ROUNDING
    assert apart(run(unet, given | extra | {"size_ids": extra["size_ids"] * 2}), want) > 100 * ROUNDING
