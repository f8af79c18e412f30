"""RAFT, large and small, in the original's names and in torchvision's, against the original's results."""

from __future__ import annotations

import json

import pytest
import torch

from eval.raft import network
from eval.raft.correlation import look_up, places, pyramid, sample
from eval.raft.load import build
from eval.raft.network import RAFT, upsample
from eval.raft.padding import pad, pads, unpad

TOLERANCE = 1e-4  # of the largest value
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.inference_mode():
        yield


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


def pair(data) -> tuple[torch.Tensor, torch.Tensor]:
    return data.inputs["image1"].float(), data.inputs["image2"].float()


def first_flow(data, model: RAFT) -> torch.Tensor:
    """After the fourth iteration, upsampled."""
    last = list(model.steps(*pair(data), 4))[-1]
    return upsample(last.flow, last.mask)


@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
def test_every_iteration(golden, name) -> None:
    data = golden(name)
    model = build(data.weights(), name)
    found = {}
    for n, step in enumerate(model.steps(*pair(data), 4)):
        found[f"corr_iter{n}"], found[f"net_iter{n}"] = step.correlations, step.hidden
        found[f"delta_flow_iter{n}"], found[f"flow_up_iter{n}"] = step.correction, upsample(step.flow, step.mask)
    found["init_iters2_flow_low"] = list(model.steps(*pair(data), 2, data.inputs["flow_init"]))[-1].flow
    one, two = (2 * (picture / 255) - 1 for picture in pair(data))
    found["fmap1"], found["cnet"] = model.fnet(one), model.cnet(one)
    found |= {f"corr_pyramid_{n}": level for n, level in enumerate(pyramid(found["fmap1"], model.fnet(two)))}
    known = data.outputs.keys() & found.keys()
    assert len(known) >= 6
    for key in known:
        assert relative(found[key], data.outputs[key]) < TOLERANCE, key


@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
def test_twenty_iterations(golden, name) -> None:
    data = golden(name)
    model = build(data.weights(), name)
    last = list(model.steps(*pair(data), 20))[-1]
    assert relative(last.flow, data.outputs["iters20_flow_low"]) < TOLERANCE
    if "iters20_flow_up" in data.outputs:
        assert relative(upsample(last.flow, last.mask), data.outputs["iters20_flow_up"]) < TOLERANCE


@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
def test_torchvisions_names_give_the_same_flow(golden, manifest, name) -> None:
    data, weights = golden(name), golden(name).weights()
    names = json.loads((data.path.parent.parent / "manifests" / f"{name}_torchvision.json").read_text())
    theirs = {key: weights[ours] for key, ours in names["official_keys"].items()}
    assert theirs.keys() == manifest(f"{name}_torchvision")["tensors"].keys()
    prefixed = {f"module.{key}": value for key, value in weights.items()}
    want = build(weights, name)(*pair(data), 3)
    assert torch.equal(build(theirs, "torchvision")(*pair(data), 3), want)
    assert torch.equal(build(prefixed, "prefixed")(*pair(data), 3), want)


def transposed_window(monkeypatch) -> None:
    def wrong(levels, centres, radius):
        n, _, h, w = centres.shape
        found = look_up(levels, centres, radius).view(n, 4, 2 * radius + 1, 2 * radius + 1, h, w)
        return found.transpose(2, 3).reshape(n, -1, h, w)

    monkeypatch.setattr(network, "look_up", wrong)


def pictures_not_scaled(monkeypatch) -> None:
    monkeypatch.setattr(RAFT, "forward", None)
    plain = RAFT.steps
    monkeypatch.setattr(RAFT, "steps", lambda self, a, b, n: plain(self, a / 255, b / 255, n))


@pytest.mark.parametrize("fault", [transposed_window, pictures_not_scaled])
@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
def test_a_fault_in_the_code_is_seen(golden, monkeypatch, name, fault) -> None:
    data = golden(name)
    fault(monkeypatch)
    assert relative(first_flow(data, build(data.weights(), name)), data.outputs["flow_up_iter3"]) > 20 * TOLERANCE


@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
@pytest.mark.parametrize("swap", [("convr", "convz"), ("cnet.layer1.0.conv1", "cnet.layer1.1.conv1")])
def test_swapped_weights_are_seen(golden, name, swap) -> None:
    data, weights = golden(name), golden(name).weights()
    one, two = swap
    changed = {key.replace(one, two) if one in key else key.replace(two, one): value for key, value in weights.items()}
    assert relative(first_flow(data, build(changed, name)), data.outputs["flow_up_iter3"]) > 20 * TOLERANCE


def test_parts(golden) -> None:
    data = golden("raft_ops")
    given, want = data.inputs, data.outputs
    levels = pyramid(given["corr_fmap1"], given["corr_fmap2"])
    for n in (1, 2, 3):
        assert relative(levels[n], want[f"corr_pyramid_{n}"]) < TOLERANCE
    for radius in (3, 4):
        assert relative(look_up(levels, given["corr_coords"], radius), want[f"corr_lookup_r{radius}"]) < TOLERANCE
    assert relative(upsample(given["convex_flow"], given["convex_mask"]), want["convex_up"]) < TOLERANCE
    assert relative(upsample(given["convex_flow"], None), want["upflow8"]) < TOLERANCE
    assert relative(sample(given["sampler_img"], given["sampler_xy"]), want["sampler"]) < TOLERANCE
    assert torch.equal(places(torch.empty(1, 1, 3, 4)), want["coords_grid"])


def test_faults_in_the_parts_are_seen(golden) -> None:
    """What a rewrite gets wrong, each at least twenty times the tolerance from the reference."""
    data = golden("raft_ops")
    given, want = data.inputs, data.outputs
    one, two, centres = (given[f"corr_{name}"] for name in ("fmap1", "fmap2", "coords"))
    levels = pyramid(one, two)
    image, points = given["sampler_img"], given["sampler_xy"]
    size = torch.tensor(image.shape[:1:-1])
    flow, mask = given["convex_flow"], given["convex_mask"]
    window = look_up(levels, centres, 3).unflatten(1, (4, 7, 7))
    wrong = {
        "rows before columns": (look_up(levels, centres.flip(1), 3), "corr_lookup_r3"),
        "the window upright": (window.transpose(2, 3).flatten(1, 3), "corr_lookup_r3"),
        "centres not halved": (look_up(levels[:1] * 4, centres, 3), "corr_lookup_r3"),
        "no square root": (pyramid(one, two)[1] * one.shape[1] ** 0.5, "corr_pyramid_1"),
        "pictures swapped": (pyramid(two, one)[1], "corr_pyramid_1"),
        "largest, not mean": (torch.nn.functional.max_pool2d(levels[0], 2), "corr_pyramid_1"),
        "corners not aligned": (torch.nn.functional.grid_sample(image, 2 * (points + 0.5) / size - 1,
                                                                align_corners=True), "sampler"),
        "the edge repeated": (sample(image, points, "border"), "sampler"),
        "mask read the other way": (upsample(flow, mask.unflatten(1, (9, 64)).transpose(1, 2).flatten(1, 2)),
                                    "convex_up"),
        "mask not normalised": (upsample(flow, 2 * mask), "convex_up"),
        "coarse pixels": (upsample(flow, None) / 8, "upflow8"),
    }  # fmt: skip
    for fault, (found, name) in wrong.items():
        assert relative(found, want[name]) > 20 * TOLERANCE, fault
    assert not torch.equal(places(torch.empty(1, 1, 3, 4)).flip(1), want["coords_grid"])


def test_padding(golden) -> None:
    data = golden("raft_ops")
    for title, want in data.meta["pads"].items():
        mode, size = title.split()
        height, width = map(int, size.split("x"))
        if mode == "sintel":  # the other one, "kitti", pads at the top alone
            assert pads(height, width) == tuple(want), size
    x = data.inputs["pad_x"]
    assert torch.equal(pad(x), data.outputs["pad_y"])
    assert torch.equal(unpad(pad(x), *x.shape[-2:]), data.outputs["pad_unpad"])
    assert pads(65, 64) != tuple(data.meta["pads"]["kitti 65x64"])


def test_sizes_of_the_published_files(manifest) -> None:
    """Every key of the four files is accounted for, and the network has no other."""
    for name in ("raft_things", "raft_small", "raft_large_torchvision", "raft_small_torchvision"):
        listed = manifest(name)["tensors"]
        tensors = {key: torch.zeros(entry["shape"]) for key, entry in listed.items()}
        assert build(tensors, name).cfg.small == ("small" in name)


def test_a_duplicate_that_differs_is_refused(golden) -> None:
    weights = golden("raft_large").weights()
    weights["cnet.layer2.0.norm3.weight"] = weights["cnet.layer2.0.norm3.weight"] + 1
    with pytest.raises(ValueError, match="norm3.weight: its values are not what was expected"):
        build(weights, "spoilt.pth")


def test_what_raft_cannot_read_says_so() -> None:
    model = RAFT(network.SMALL)
    with pytest.raises(ValueError, match="160 x 120 pixels; RAFT needs at least 128"):
        model(torch.zeros(1, 3, 120, 160), torch.zeros(1, 3, 120, 160))
    with pytest.raises(ValueError, match="multiples of 8"):
        model(torch.zeros(1, 3, 130, 160), torch.zeros(1, 3, 130, 160))
    with pytest.raises(ValueError, match="0 iterations"):
        model(torch.zeros(1, 3, 128, 128), torch.zeros(1, 3, 128, 128), 0)
    with pytest.raises(ValueError, match="x.pth: expected RAFT's weights"):
        build({"a.weight": torch.zeros(1)}, "x.pth")
    short = {key: value for key, value in model.state_dict().items() if key != "fnet.conv2.bias"}
    with pytest.raises(ValueError, match="fnet.conv2.bias: missing"):
        build(short, "x.pth")
