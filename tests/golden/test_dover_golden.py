"""DOVER, whole with narrow branches and part by part, against the original's results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from eval.dover import convnext, swin, windows
from eval.dover.convnext import ChannelNorm, ConvNeXtBlock, ConvNeXtConfig
from eval.dover.load import build
from eval.dover.network import DOVER, DOVERConfig, Head
from eval.dover.swin import PatchEmbedding, PatchMerging, SwinBlock, SwinConfig
from eval.dover.views import aesthetic_frames, fragments, normalised, resized, technical_frames
from eval.dover.windows import gate, regions, relative_index

TOLERANCE = 1e-4  # of the largest value
NARROW = DOVERConfig(
    SwinConfig(16, (2, 2, 2, 2), (1, 2, 4, 8)), ConvNeXtConfig((16, 32, 64, 128), (2, 1, 4, 1)), hidden=16
)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want.float()).abs().max() / want.float().abs().max())


class Listed:
    """Stands for a random generator: gives the draws of the reference."""

    def __init__(self, draws: Sequence) -> None:
        self.draws = [np.asarray(draw.tolist() if isinstance(draw, torch.Tensor) else draw) for draw in draws]

    def integers(self, low: int, high: int, size: int | tuple[int, ...]) -> np.ndarray:
        found = self.draws.pop(0)
        assert found.shape == tuple(np.atleast_1d(size)) and low <= found.min() and found.max() < high
        return found


# --- the whole network ---------------------------------------------------------------------------------------------


def whole(data, aesthetic: bool = True) -> DOVER:
    cfg = NARROW if aesthetic else DOVERConfig(NARROW.technical, None, NARROW.hidden)
    return build(data.weights(), "dover", aesthetic, cfg)


def mosaic(data) -> torch.Tensor:
    base = data.inputs["technical_base"]
    return normalised(torch.stack([base[:, t : t + 224, 2 * t : 2 * t + 224] for t in range(32)], dim=1))[None]


def test_technical_branch(golden) -> None:
    data = golden("dover")
    model, seen = whole(data, aesthetic=False), {}
    backbone = model.technical_backbone
    found = {}
    hooks = [backbone.patch_embed.register_forward_hook(lambda m, i, out: seen.update(patch_embed=out))]
    for n in (0, 1, 2):
        hooks.append(backbone.layers[n].register_forward_hook(lambda m, i, out, n=n: seen.update({f"layer{n}": out})))
    found["technical_feat"] = backbone(mosaic(data))
    found["technical_map"] = model.technical_head(found["technical_feat"])
    found["technical_score"] = found["technical_map"].mean()
    first = {name: x.movedim(-1, 1) for name, x in seen.items()}
    found["technical_patch_embed_sub"] = first["patch_embed"][:, :, ::4, ::4, ::4]
    found["technical_layer0_sub"] = first["layer0"][:, :, ::2, ::2, ::2]
    found |= {f"technical_layer{n}": first[f"layer{n}"] for n in (1, 2)}
    assert found.keys() == {key for key in data.outputs if key.startswith("technical")}
    for key, value in found.items():
        assert relative(value, data.outputs[key]) < TOLERANCE, key


def test_aesthetic_branch(golden) -> None:
    data = golden("dover")
    model, x = whole(data), normalised(data.inputs["aesthetic"][0])[None]
    features = model.aesthetic_backbone(x)
    assert relative(features, data.outputs["aesthetic_feat"]) < TOLERANCE
    assert relative(model.aesthetic_head(features), data.outputs["aesthetic_map"]) < TOLERANCE
    assert relative(model.aesthetic(x)[0], data.outputs["aesthetic_score"]) < TOLERANCE
    backbone = model.aesthetic_backbone
    for n, (smaller, stage) in enumerate(zip(backbone.downsample_layers, backbone.stages)):
        x = stage(smaller(x))
        assert relative(x, data.outputs[f"aesthetic_stage{n}"]) < TOLERANCE


@pytest.mark.parametrize("fault", ["gate cut off at 1", "no shift", "tables swapped"])
def test_a_fault_in_the_technical_branch_is_seen(golden, monkeypatch, fault) -> None:
    data = golden("dover")
    weights = data.weights()
    if fault == "gate cut off at 1":
        monkeypatch.setattr(swin, "gate", lambda *args: windows.gate(*args).clamp(max=1))
    if fault == "no shift":
        monkeypatch.setattr(swin, "fitted", lambda size, window, shift: windows.fitted(size, window, (0, 0, 0)))
    if fault == "tables swapped":
        near, apart = "relative_position_bias_table", "fragment_position_bias_table"
        gated = [key for key in weights if key.endswith(apart)]
        for key in gated:
            other = key.replace(apart, near)
            weights[key], weights[other] = weights[other], weights[key]
    model = build(weights, "dover", cfg=DOVERConfig(NARROW.technical, None, NARROW.hidden))
    found = model.technical_backbone(mosaic(data))
    assert relative(found, data.outputs["technical_feat"]) > 20 * TOLERANCE


@pytest.mark.parametrize("fault", ["other gelu", "no scale", "blocks swapped", "no frame but its own"])
def test_a_fault_in_the_aesthetic_branch_is_seen(golden, monkeypatch, fault) -> None:
    data = golden("dover")
    weights = data.weights()
    if fault == "other gelu":
        monkeypatch.setattr(convnext.F, "gelu", lambda x: x * torch.sigmoid(1.702 * x))
    if fault == "no scale":
        weights |= {key: torch.ones_like(value) for key, value in weights.items() if key.endswith(".gamma")}
    backbone = build(weights, "dover", True, NARROW).aesthetic_backbone
    if fault == "blocks swapped":  # of the third stage: the first two differ in how many frames they see
        blocks = backbone.stages[2]
        blocks[0], blocks[1] = blocks[1], blocks[0]
    if fault == "no frame but its own":
        backbone.stages[2][1].dwconv.weight[:, :, [0, 2]] = 0
    found = backbone(normalised(data.inputs["aesthetic"][0])[None])
    assert relative(found, data.outputs["aesthetic_feat"]) > 20 * TOLERANCE


# --- its parts -----------------------------------------------------------------------------------------------------


def loaded(module: torch.nn.Module, data, name: str) -> torch.nn.Module:
    module.load_state_dict(parts(data, name))
    return module.eval()


def parts(data, name: str) -> dict[str, torch.Tensor]:
    start = name + "."
    return {key[len(start) :]: value for key, value in data.weights().items() if key.startswith(start)}


@pytest.mark.parametrize("name, shifted", [("noshift", False), ("shift", True)])
def test_block(golden, name, shifted) -> None:
    data = golden("dover_ops")
    block, x = loaded(SwinBlock(12, 3, (2, 4, 4), shifted, gated=True), data, "block"), data.inputs["block_x"]
    assert relative(block.attention(block.norm1(x)), data.outputs[f"block_{name}_part1"]) < TOLERANCE
    assert relative(block(x), data.outputs[f"block_{name}"]) < TOLERANCE
    block.shift = (0, 0, 0) if shifted else (1, 2, 2)
    assert relative(block(x), data.outputs[f"block_{name}"]) > 20 * TOLERANCE


@pytest.mark.parametrize("room", [swin.ROOM, 1])
def test_block_of_odd_and_of_thin_sizes(golden, monkeypatch, room) -> None:
    """With all windows at once and with one at a time."""
    data = golden("dover_ops")
    monkeypatch.setattr(swin, "ROOM", room)
    block = loaded(SwinBlock(12, 3, (2, 4, 4), True, gated=True), data, "block")
    for name in ("pad", "thin"):
        assert relative(block(data.inputs[f"block_{name}_x"]), data.outputs[f"block_{name}_shift"]) < TOLERANCE
    plain = loaded(SwinBlock(12, 3, (2, 4, 4), True, gated=False), data, "block_nofrag")
    assert relative(plain(data.inputs["block_x"]), data.outputs["block_nofrag"]) < TOLERANCE


def test_windows(golden) -> None:
    data = golden("dover_ops")
    for name, shift in (("noshift", (0, 0, 0)), ("shift", (1, 2, 2))):
        want = data.outputs[f"block_{name}_fgate"].long()
        assert torch.equal(gate((4, 16, 16), (2, 4, 4), shift, (4, 4)).repeat(2, 2, 2), want)
    assert want.max() > 1, "a distance, not a gate of 0 and 1"
    number = regions((4, 16, 16), (2, 4, 4), (1, 2, 2))
    mask = (number[:, :, None] != number[:, None]).to(torch.uint8)
    assert torch.equal(mask, data.outputs["block_attn_mask"])
    assert not regions((4, 16, 16), (2, 4, 4), (0, 0, 0)).any()
    assert torch.equal(relative_index((8, 7, 7)), data.outputs["relative_position_index_w877"].long())
    assert torch.equal(relative_index((2, 4, 4)), data.outputs["relative_position_index_w244"].long())


def test_faults_in_windows_are_seen(golden) -> None:
    want = golden("dover_ops").outputs
    size, window, shift = (4, 16, 16), (2, 4, 4), (1, 2, 2)
    distances = gate(size, window, shift, (4, 4)).repeat(2, 2, 2)
    for fault, wrong in (("a gate of 0 and 1", distances.clamp(max=1)), ("rows alone", distances // 2),
                         ("shifted the other way", gate(size, window, (1, -2, -2), (4, 4)).repeat(2, 2, 2)),
                         ("one fragment more", gate(size, window, shift, (5, 5)).repeat(2, 2, 2))):  # fmt: skip
        assert not torch.equal(wrong, want["block_shift_fgate"].long()), fault
    for fault, moved in (("no mask", (0, 0, 0)), ("no shift in time", (0, 2, 2))):
        wrong = regions(size, window, moved)
        mask = (wrong[:, :, None] != wrong[:, None]).to(torch.uint8)
        assert not torch.equal(mask, want["block_attn_mask"]), fault
    index = relative_index(window)
    for fault, wrong in (("negated", index.max() - index), ("rows before time", relative_index((4, 2, 4)))):
        assert not torch.equal(wrong, want["relative_position_index_w244"].long()), fault


@pytest.mark.parametrize(
    "fault", ["no gate", "biases swapped", "heads swapped", "other gelu", "eps", "no padding mask"]
)
def test_faults_in_a_block_are_seen(golden, monkeypatch, fault) -> None:
    data = golden("dover_ops")
    weights, given = parts(data, "block"), "block"
    block = SwinBlock(12, 3, (2, 4, 4), True, gated=True)
    near, apart = "attn.relative_position_bias_table", "attn.fragment_position_bias_table"
    if fault == "no gate":
        weights[apart] = weights[near]
    if fault == "biases swapped":
        weights[near], weights[apart] = weights[apart], weights[near]
    if fault == "heads swapped":
        weights[near] = weights[near].flip(1)
    if fault == "other gelu":
        monkeypatch.setattr(swin.F, "gelu", lambda x: x * torch.sigmoid(1.702 * x))
    if fault == "eps":
        block.norm1.eps = block.norm2.eps = 0.1
    if fault == "no padding mask":  # windows that the rolled and padded tokens fill are not told apart
        given = "block_pad"
        monkeypatch.setattr(swin, "regions", lambda *size: torch.zeros_like(regions(*size)))
    block.load_state_dict(weights)
    assert relative(block.eval()(data.inputs[f"{given}_x"]), data.outputs[f"{given}_shift"]) > 20 * TOLERANCE


@pytest.mark.parametrize("name, module", [("conv1", ConvNeXtBlock(8, 1)), ("conv3", ConvNeXtBlock(8, 3)),
                                          ("ln_cf", ChannelNorm(8)), ("head", Head(8, 4))])  # fmt: skip
def test_layers(golden, name, module) -> None:
    data = golden("dover_ops")
    x = data.inputs["conv_x"]
    assert relative(loaded(module, data, name)(x), data.outputs[name]) < TOLERANCE
    assert relative(module(x.flip(-1)), data.outputs[name]) > 20 * TOLERANCE


def test_patches(golden) -> None:
    data = golden("dover_ops")
    merged = loaded(PatchMerging(6), data, "merge")(data.inputs["merge_x"])
    assert relative(merged, data.outputs["merge"]) < TOLERANCE
    embedded = loaded(PatchEmbedding(8), data, "embed")(data.inputs["embed_x"])
    assert relative(embedded.movedim(-1, 1), data.outputs["embed"]) < TOLERANCE
    turned = loaded(PatchMerging(6), data, "merge")(data.inputs["merge_x"].transpose(2, 3)).transpose(2, 3)
    assert relative(turned, data.outputs["merge"]) > 20 * TOLERANCE, "rows before columns"


# --- what it sees --------------------------------------------------------------------------------------------------


def test_fragments(golden) -> None:
    data = golden("dover_ops")
    video, rows, columns = (data.inputs[f"frag_{x}"] for x in ("video", "offsets_h", "offsets_w"))
    assert torch.equal(fragments(video, Listed([rows, columns]), (3, 4), 8, 4).float(), data.outputs["frag"])
    wrong = fragments(video, Listed([rows.flip(0), columns]), (3, 4), 8, 4)
    assert not torch.equal(wrong.float(), data.outputs["frag"])
    small, draw = data.inputs["frag_small_video"], data.inputs["frag_small_rand0"]
    assert torch.equal(fragments(small, Listed([draw]), (3, 4), 8, 4).float(), data.outputs["frag_small"])
    apart = (resized(video, (24, 32)).int() - data.outputs["resized"].int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 1e-4, "halves, which another PyTorch's last bit rounds elsewhere"
    assert (resized(video.flip(-1), (24, 32)).int() - data.outputs["resized"].int()).abs().float().mean() > 1


def test_frame_indices(golden) -> None:
    table = golden("dover_ops").meta["frame_indices"]
    assert len(table) > 15 and any(row["technical_random"] for row in table.values())
    for count, row in table.items():
        assert technical_frames(int(count), Listed(row["technical_random"])).reshape(-1).tolist() == row["technical"]
        assert aesthetic_frames(int(count), Listed(row["aesthetic_random"])).tolist() == row["aesthetic"]
    assert technical_frames(15, Listed([])).reshape(-1).tolist() != table["16"]["technical"]


def test_published_files(manifest) -> None:
    """Every key of DOVER.pth is accounted for; DOVER-Mobile is called by its name."""
    tensors = {key: torch.zeros(row["shape"]) for key, row in manifest("dover")["tensors"].items()}
    assert sum(p.numel() for p in build(tensors, "DOVER.pth").parameters()) == pytest.approx(28.1e6, rel=0.01)
    both = build(tensors, "DOVER.pth", aesthetic=True)
    assert sum(p.numel() for p in both.parameters()) == pytest.approx(56.2e6, rel=0.01)
    mobile = {key: torch.zeros(1) for key in manifest("dover_mobile")["tensors"]}
    with pytest.raises(ValueError, match="m.pth: this is DOVER-Mobile, .*give DOVER.pth"):
        build(mobile, "m.pth")
    with pytest.raises(ValueError, match="x.pth: expected DOVER's weights"):
        build({"a": torch.zeros(1)}, "x.pth")
    del tensors["technical_head.fc_last.bias"]
    with pytest.raises(ValueError, match="technical_head.fc_last.bias: missing"):
        build(tensors, "DOVER.pth")
