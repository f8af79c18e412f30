"""FlowScore and WarpingError: the truth on clips of known motion, refusals, names, other thread counts."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import torch

from eval.flow_networks import Dis, FlowNetwork, Raft
from eval.known_flow import MOTIONS, Motion, clip, main, measure, true_flow
from eval.metrics.flow_score import flow_score
from eval.metrics.warping_error import warping_error
from eval.missing import MissingNetwork
from eval.raft.load import load_raft
from eval.raft.network import LARGE, RAFT, SMALL

BY_TITLE = {motion.title: motion for motion in MOTIONS}


@pytest.fixture
def one_and_two_threads() -> Iterator[list[int]]:
    before, cv_before = torch.get_num_threads(), cv2.getNumThreads()
    yield [1, 2]
    torch.set_num_threads(before)
    cv2.setNumThreads(cv_before)


def random_raft(cfg=SMALL) -> Raft:
    """RAFT without its published weights: what it measures means nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Raft(RAFT(cfg).eval(), iterations=2)


@pytest.mark.parametrize("title", ["0.25 px", "1 px", "4 px", "16 px", "rotation, 0.5 degrees", "zoom, 1.03"])
def test_dis_reads_known_motion(title: str) -> None:
    row = measure(BY_TITLE[title], Dis(), 128 if title in ("0.25 px", "1 px", "4 px") else 256)
    assert row.measured == pytest.approx(row.truth, rel=0.04, abs=0.02)
    assert row.error < 0.12
    assert row.warping == pytest.approx(row.warping_truth, rel=0.35, abs=2e-5)
    assert row.warping < row.warping_still / 2


def test_what_is_no_motion_stays_near_zero() -> None:
    assert measure(BY_TITLE["still"], Dis(), 128).measured == 0
    for title in ("still, noise of deviation 5", "still, 5 % brighter"):
        assert 0 < measure(BY_TITLE[title], Dis(), 128).measured < 0.06, title


def test_the_known_flow_is_the_clips() -> None:
    """Sampling the second frame where the flow points gives the first one: the truth that DIS is held against."""
    for motion in (BY_TITLE["2 px"], BY_TITLE["rotation, 0.5 degrees"], BY_TITLE["zoom, 1.01"]):
        first, second = clip(motion, 128, 2).astype(np.float32)
        y, x = np.mgrid[0:128, 0:128].astype(np.float32)

        def mean_error(shift: np.ndarray) -> float:
            back = cv2.remap(second, x + shift[..., 0], y + shift[..., 1], cv2.INTER_CUBIC)
            return float(np.abs(back - first)[8:-8, 8:-8].mean())

        assert mean_error(true_flow(motion, 128)) < 0.6 < 1 < mean_error(0 * true_flow(motion, 128))
        there, back = true_flow(motion, 128), true_flow(motion, 128, backwards=True)
        assert np.abs(there + back).mean() < 0.05 < np.abs(there - back).mean()


def test_the_network_is_named() -> None:
    frames = clip(Motion("", 1), 64, 2)
    for found in (flow_score(frames, Dis()), warping_error(frames, Dis())):
        assert found.network == "DIS" and not found.beside_paper
    large, small = random_raft(LARGE), random_raft()
    assert (large.name, small.name) == ("RAFT", "RAFT small")
    assert Raft(large.model).beside_paper and not large.beside_paper and not Raft(small.model).beside_paper


@pytest.mark.parametrize("metric", [flow_score, warping_error])
def test_a_missing_network_is_one_clear_error(metric) -> None:
    with pytest.raises(MissingNetwork, match="needs RAFT's weights .raft-things.pth.*none were given.*DIS"):
        metric(clip(Motion(""), 64, 2), None)


def test_frames_that_are_too_small_are_refused() -> None:
    network, frames = random_raft(), np.zeros((2, 248, 120, 3), np.uint8)
    with pytest.raises(ValueError, match="FlowScore with RAFT small: frames of 120 x 248 pixels, .* least 128"):
        flow_score(frames, network)
    with pytest.raises(ValueError, match="WarpingError with RAFT small: .* at least 256.*give larger frames.*DIS"):
        warping_error(np.zeros((2, 248, 300, 3), np.uint8), network)
    assert flow_score(frames, Dis()).value == 0
    for wrong in (frames[:1], frames[0], frames.astype(np.float32)):
        with pytest.raises(ValueError, match="expected uint8 .F, H, W, 3., F >= 2"):
            flow_score(wrong, Dis())


def test_variants() -> None:
    frames = clip(Motion("", 1), 64, 2)
    with pytest.raises(ValueError, match="variant 'raw'; expected one of fixed, evalcrafter"):
        warping_error(frames, Dis(), "raw")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with DIS take the variant 'fixed'"):
        warping_error(frames, Dis(), "evalcrafter")


def test_odd_sizes_are_padded_and_the_padding_left_out() -> None:
    frames = clip(Motion("", 2), 136, 2)[:, :133, :131]
    whole = flow_score(frames, Dis())
    assert whole.value == pytest.approx(2, abs=0.05) and whole.value != flow_score(frames, Dis(), padded=True).value
    assert np.isfinite(warping_error(frames, Dis()).value)


@pytest.mark.parametrize("network", [Dis(), random_raft()], ids=lambda network: network.name)
def test_another_number_of_threads(network: FlowNetwork, one_and_two_threads) -> None:
    frames, values = clip(Motion("", 1, 1), 256, 2), []
    for count in one_and_two_threads:
        torch.set_num_threads(count)
        cv2.setNumThreads(count)
        values.append((flow_score(frames, network).value, warping_error(frames, network).value))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_command(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("eval.known_flow.MOTIONS", MOTIONS[:1])
    main([])
    printed = capsys.readouterr().out
    assert "| DIS |" in printed and "| 0.25 px | 0.250 | 0.2" in printed
    with pytest.raises(ValueError, match="--size 100"):
        main(["--size", "100"])
    with pytest.raises(OSError, match="none.pth"):
        main(["--raft", str(tmp_path / "none.pth")])


def test_a_saved_file_is_read(tmp_path) -> None:
    model = random_raft().model
    torch.save(model.state_dict(), tmp_path / "raft-small.pth")
    read = load_raft(tmp_path / "raft-small.pth")
    assert read.cfg == SMALL and not any(p.requires_grad for p in read.parameters())
    assert all(torch.equal(value, read.state_dict()[key]) for key, value in model.state_dict().items())
