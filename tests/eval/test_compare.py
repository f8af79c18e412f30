"""`python -m eval VIDEOS`: any maker's videos side by side, empty columns with their reasons, refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from eval import __main__, compare, measured, report, scores
from eval.clip_network import CLIP
from eval.flow_networks import Raft
from eval.networks import NetworkFiles, Networks, open_networks
from eval.raft.network import LARGE, RAFT, SMALL
from eval.scores import PAPER, Scores, Switches, asked, columns, score
from eval.videos import Video, described, found, prompts_of
from i2v.config import ConfigError
from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from i2v.video import write_video

EMPTY = Networks(None, None, None, {}, {})


def moving(seed: int = 0, count: int = 4, side: int = 32, step: int = 1) -> np.ndarray:
    """A texture that travels."""
    wide = np.random.default_rng(seed).integers(0, 255, (side // 4 + 8, side // 4 + 8, 3), np.uint8)
    wide = cv2.resize(wide, (side + 32, side + 32), interpolation=cv2.INTER_CUBIC)
    return np.stack([wide[: side + 0, step * k : step * k + side] for k in range(count)])


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Two models' videos of two pictures, as files and as frames; the pictures, and a prompt for each."""
    for i, name in enumerate(("cat", "dog")):
        clip = moving(i)
        write_video(tmp_path / "ours" / f"{name}_0.png", clip, 8)
        write_video(tmp_path / "svd" / f"{name}.mp4", moving(i, step=2), 8)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "pictures" / f"{name}.png"), clip[0, ..., ::-1])
    (tmp_path / "prompts.txt").write_text("a cat runs\na dog sleeps\n")
    return tmp_path


def command(folder: Path, *flags: str) -> list[str]:
    return [f"{folder}/ours", f"svd={folder}/svd", "--out", f"{folder}/out", "--device", "cpu", *flags]


def test_two_models_side_by_side(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = command(models, "--reference", f"{models}/pictures", "--prompts", f"{models}/prompts.txt")
    assert __main__.main(given) == 0
    told = capsys.readouterr().out
    assert "Empty: DoverVQA needs DOVER's weights" in told and "No intervals for ours, svd" in told
    results = json.loads((models / "out" / "results.json").read_text())
    assert [(v["model"], v["scene"], v["prompt"]) for v in results["videos"]] == [
        ("ours", "cat", "a cat runs"), ("ours", "dog", "a dog sleeps"),
        ("svd", "cat", "a cat runs"), ("svd", "dog", "a dog sleeps"),
    ]  # fmt: skip
    ours, _, svd, _ = (v["values"] for v in results["videos"])
    assert svd["flow_score (DIS)"] > 1.5 * ours["flow_score (DIS)"] > 0
    assert not {c.name for c in PAPER} & {name for v in results["videos"] for name in v["values"]}
    assert results["videos"][0]["details"]["flow_score (DIS)"]["network"] == "DIS"
    page = (models / "out" / "page.html").read_text()
    assert page.count("data:image/webp") == 6 and "https://" not in page and "<script" not in page
    assert "Motion against error" in page and "cat: a cat runs" in page and "of different size" not in page
    before = (models / "out" / "rows.jsonl").read_text()
    assert __main__.main(given) == 0 and (models / "out" / "rows.jsonl").read_text() == before, "nothing anew"
    assert __main__.main([*given, "--evalcrafter"]) == 0
    assert (models / "out" / "rows.jsonl").read_text().count("measured_by") == 8, "other switches, other measurements"


def test_the_work_can_be_sent_to_other_processes(models: Path) -> None:
    (one, *_) = described(found([f"{models}/ours"]), [models / "pictures"], None)
    work = (one, NetworkFiles(device="cpu"), Switches(), None)
    assert measured._measure(*pickle.loads(pickle.dumps(work))) == measured._measure(*work)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--interval 95", "--interval 95: needs videos of 6 pictures or more, ours has 2; give more videos, or leave"),
        ("--interval 30", "expected a percentage from 50"),
        ("--raft none.pth", "none.pth"),
        ("--frames 5", "5 frames wanted"),
        ("--frames 1", "--frames 1: expected 2 or more"),
        ("--reference nowhere", "nowhere: no pictures there"),
        ("--prompts none.txt", "--prompts none.txt cannot be read"),
    ],
)
def test_mistakes_are_one_line(flags: str, words: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(command(models, *flags.split())) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_videos_of_differing_length_are_refused(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(models / "svd" / "dog_1.mp4", moving(count=3), 8)
    assert __main__.main(command(models)) == 2
    assert "svd/dog_1.mp4 has 3; cut all to 3 frames (--frames 3)" in capsys.readouterr().err
    assert __main__.main(command(models, "--frames", "3")) == 0


def test_what_is_no_video_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, words in ((["nowhere"], "no such videos, and no such evaluation; known are"), ([], "no videos: python"),
                         (["a=nowhere"], "nowhere: there is no such file or folder"),
                         ([str(tmp_path)], "no videos there; they end with .avi")):  # fmt: skip
        assert __main__.main(given) == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["--frames", "3", str(tmp_path)])
    assert "belongs to no flag; videos come before all flags, or after --videos" in capsys.readouterr().err


def test_folders_of_several_models(models: Path) -> None:
    (models / "prompts.txt").unlink()
    (models / "pictures" / "cat.png").unlink()
    (models / "pictures" / "dog.png").unlink()
    assert {name: len(paths) for name, paths in found([str(models)]).items()} == {"ours": 2, "svd": 2}
    assert list(found([f"{models}/svd/cat.mp4"])) == ["svd"] and list(found([f"{models}/ours/cat_0"])) == ["ours"]
    write_video(models / "gifs" / "a.gif", moving(), 8)
    assert [p.name for p in found([str(models / "gifs")])["gifs"]] == ["a.gif"]


def test_two_folders_of_one_name_are_no_one_model(models: Path) -> None:
    write_video(models / "other" / "svd" / "cat.mp4", moving(), 8)
    with pytest.raises(ConfigError, match="svd and .*other/svd are both called svd; give them as NAME=FOLDER"):
        found([str(models / "svd"), str(models / "other" / "svd")])
    assert {k: len(v) for k, v in found([str(models / "svd"), f"b={models}/other/svd"]).items()} == {"svd": 2, "b": 1}
    one_by_one = found([str(path) for path in (models / "svd").iterdir()])
    assert len(one_by_one["svd"]) == 2


def test_a_video_of_ours_tells_picture_prompt_and_start(models: Path) -> None:
    request = {"prompt": "a cat jumps", "t0": 0.8, "p": 0.5, "fit": "stretch"}
    settings = {"request": request, "preset": "tiny", "run": {}, "versions": {}, "weights": {},
                "pictures": [{"frame": 0, "file": f"{models}/pictures/cat.png"}]}  # fmt: skip
    write_video(models / "own" / "clip.mp4", moving(), 8, settings)
    (one,) = described({"own": [models / "own" / "clip.mp4"]}, [], None)
    assert (one.prompt, one.start, one.fit, one.scene) == ("a cat jumps", (0.8, 0.5), "stretch", "cat")
    (other,) = described({"own": [models / "own" / "clip.mp4"]}, [models / "pictures"], models / "prompts.txt")
    assert (other.prompt, other.scene) == ("a cat runs", "cat")


def test_the_recorded_picture_counts_before_the_name(models: Path) -> None:
    """cat_2.mp4 may be the second seed of cat.png, although there is a cat_2.png."""
    cv2.imwrite(str(models / "pictures" / "cat_2.png"), np.zeros((32, 32, 3), np.uint8))
    settings = {"request": {"prompt": "", "t0": 1, "p": 0.5}, "preset": "tiny", "run": {}, "versions": {},
                "weights": {}, "pictures": [{"frame": 0, "file": f"{models}/pictures/cat.png"}]}  # fmt: skip
    write_video(models / "own" / "cat_2.mp4", moving(), 8, settings)
    write_video(models / "other" / "cat_2.mp4", moving(), 8)
    given = {name: [models / name / "cat_2.mp4"] for name in ("own", "other")}
    assert [video.scene for video in described(given, [models / "pictures"], None)] == ["cat", "cat_2"]


def test_two_references_of_one_name_are_refused(models: Path) -> None:
    cv2.imwrite(str(models / "cat.png"), np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ConfigError, match="pictures/cat.png and .*cat.png are both called cat; give them other names"):
        described({}, [models / "pictures", models / "cat.png"], None)
    described({}, [models / "pictures", models / "pictures" / "cat.png"], None)  # the same one twice


def test_how_another_program_fitted_its_pictures(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models_of = found([f"{models}/ours", f"svd={models}/svd"])
    fits = compare.fits_of(["svd=stretch"], list(models_of))
    videos = described(models_of, [models / "pictures"], None, None, fits)
    assert [(v.model, v.fit) for v in videos] == [("ours", "cover")] * 2 + [("svd", "stretch")] * 2
    settings = {"request": {"prompt": "", "t0": 1, "p": 0.5, "fit": "pad"}, "preset": "tiny", "run": {}, "versions": {},
                "weights": {}, "pictures": [{"frame": 0, "file": "cat.png"}]}  # fmt: skip
    write_video(models / "svd" / "cat_1.mp4", moving(), 8, settings)
    told = described({"svd": [models / "svd" / "cat_1.mp4"]}, [], None, None, fits)
    assert told[0].fit == "pad", "what a video tells counts"
    for wrong in ("svd=squeeze", "pika=pad", "stretch"):
        assert __main__.main(command(models, "--fit", wrong)) == 2
        assert f"--fit {wrong}: expected MODEL=FIT, with one of the models ours, svd" in capsys.readouterr().err


def test_what_makes_rows_hard_to_compare_is_told(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(models / "svd" / "bird.mp4", moving(3), 24)
    (models / "pictures" / "cat.txt").write_text("a cat runs")
    assert __main__.main(command(models, "--reference", f"{models}/pictures")) == 0
    told = capsys.readouterr().out
    assert "Rows are means over different pictures: of 3, ours lacks 1." in told
    assert "Frames a second differ (8, 24): FlowScore, WarpingError, flicker and, with --evalcrafter, CLIP" in told
    assert "text alignment is that" not in told
    rates = [v["fps"] for v in json.loads((models / "out" / "results.json").read_text())["videos"]]
    assert rates == [None, None, 24, 8, 8]


def test_each_model_minus_the_first(tmp_path: Path) -> None:
    """Over the pictures of both: a small difference of each pair shows although the pictures differ a lot."""

    def made(model: str, scene: int, value: float) -> measured.Measured:
        one = Video(model, tmp_path / f"{model}{scene}.mp4", str(scene))
        return measured.Measured(one, (4, 32, 32), Scores({"clip_temp": value}))

    spread = np.random.default_rng(0).normal(0, 1, 12)
    models = {"a": [made("a", i, x) for i, x in enumerate(spread)],
              "b": [made("b", i, x + 0.1 + 0.01 * (i % 2)) for i, x in enumerate(spread[:10])],
              "c": [made("c", i, x) for i, x in enumerate(spread[:5])]}  # fmt: skip
    table = report.paired(models, PAPER)
    assert table is not None and [row[:2] for row in table.rows] == [["b", "10"]], "c has too few pictures"
    assert table.head == ["", "pictures", "CLIPTemp"], "columns that nobody has are left out"
    mean, low, high = (float(x.strip("[],")) for x in table.rows[0][2].split())
    assert 0.1 < low < mean < high < 0.11 and "Minus a" in table.title
    assert report.paired({"a": models["a"]}, PAPER) is None
    turned = report.paired(models, PAPER, "b")
    assert turned is not None and [row[0] for row in turned.rows] == ["a"] and turned.rows[0][2].startswith("-0.1")


@pytest.mark.parametrize("error", [BrokenProcessPool("a child"), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_runs_out_is_one_line(
    error: Exception, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*given: object) -> None:
        raise error

    monkeypatch.setattr(compare, "measure", fails)
    assert __main__.main(command(models)) == 2
    assert "out of memory (or a process was killed); give fewer --workers" in capsys.readouterr().err
    monkeypatch.setattr(compare, "measure", lambda *given: {}["a bug"])
    with pytest.raises(KeyError):
        __main__.main(command(models))


def test_videos_of_another_prompt_stand_in_a_row_of_their_own(models: Path) -> None:
    """Those that tell no prompt stand with the first."""
    captions = {"ours": "a cat runs", "more": "a cat sleeps", "svd": ""}
    write_video(models / "more" / "cat.png", moving(0), 8)
    videos = described(found([f"{name}={models}/{name}" for name in captions]), [models / "pictures"], None)
    cats = [dataclasses.replace(v, prompt=captions[v.model]) for v in videos if v.scene == "cat"]
    rows = {}
    for one in (cats, cats[:1]):
        of = [measured.Measured(v, (4, 32, 32), Scores()) for v in one]
        (section,) = report.side_by_side(report.Report("T", "", Path(), {}, EMPTY), of)
        rows[len(one)] = {head: [s.words.partition(",")[0] for s in shots] for head, shots in section.shots.items()}
    assert rows[3] == {"cat: a cat runs": ["the picture", "ours", "svd"], "cat: a cat sleeps": ["the picture", "more"]}
    assert rows[1] == {"cat: a cat runs": ["the picture", "ours"]}


def test_prompts(tmp_path: Path) -> None:
    text = '{"a1": {"category": "art", "prompt": "x"}, "b.jpg": "y", "c": 3, "v1.5 d": "z"}'
    (tmp_path / "meta_data.json").write_text(text)
    assert prompts_of(tmp_path / "meta_data.json", []) == {"a1": "x", "b": "y", "v1.5 d": "z"}
    (tmp_path / "p.txt").write_text("x\n")
    with pytest.raises(ValueError, match="1 lines for 2 pictures; give a line for each"):
        prompts_of(tmp_path / "p.txt", ["a", "b"])


def test_lines_of_prompts_are_in_the_order_in_which_people_count(tmp_path: Path) -> None:
    paths = []
    for name in ("10", "2", "1"):
        paths.append(write_video(tmp_path / "ours" / f"{name}.mp4", moving(count=2), 8).path)
    (tmp_path / "prompts.txt").write_text("one\ntwo\nten\n")
    videos = described({"ours": paths}, [], tmp_path / "prompts.txt")
    assert {v.scene: v.prompt for v in videos} == {"1": "one", "2": "two", "10": "ten"}


def test_a_network_that_is_not_the_papers_never_fills_its_columns() -> None:
    for cfg, side, names in ((SMALL, 256, {"flow_score (RAFT small)", "warping_error (RAFT small)"}),
                             (LARGE, 128, {"flow_score"})):  # fmt: skip
        networks = Networks(Raft(RAFT(cfg).eval(), 20), None, None, {}, {})
        found = score(moving(side=side, count=2), None, "", None, networks)
        assert names <= set(found.values) and ("flow_score" in found.values) == (cfg == LARGE)
        assert found.reasons.get("warping_error", "").startswith("RAFT small was given; the paper's") == (cfg == SMALL)
        paper, others = columns([found])
        assert not [c for c in others if c.name in ("flow_score", "warping_error")]
        assert [c.head for c in paper] == ["DoverVQA", "CLIPTemp", "FlowScore", "WarpingError x 10,000"]
        assert "FlowScore (DIS)" in [c.head for c in others]


def test_pairs_of_which_nothing_was_compared_are_told() -> None:
    """Their 0 is not the best value."""
    video = described({"ours": [Path("a.mp4"), Path("b.mp4")]}, [], None)
    kept = ([0.5, 0.0], [0.1, 0.2])
    scores = [Scores({"warping_error": 0.0}, {}, {"warping_error": {"kept": shares}}) for shares in kept]
    found = [measured.Measured(v, (3, 8, 8), s) for v, s in zip(video, scores, strict=True)]
    empty = report.Report("T", "", Path(), {}, EMPTY)
    told = [line for line in report.warnings(empty, found) if "no pixel" in line]
    assert len(told) == 1 and "WarpingError, 1 video of 2 (ours/a.mp4), has pairs" in told[0]
    assert not [line for line in report.warnings(empty, found[1:]) if "no pixel" in line]


def test_frames_too_small_for_raft_leave_the_column_empty_and_say_what_to_do() -> None:
    networks = Networks(Raft(RAFT(LARGE).eval()), None, None, {}, {})
    found = score(moving(side=120, count=2), None, "", None, networks)
    assert "120 x 120 pixels, expected at least 128 on each side: give larger" in found.reasons["flow_score"]
    assert "expected at least 256" in found.reasons["warping_error"]


def test_what_is_too_large_for_memory_is_a_reason_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, message: str, **__: object) -> None:
        raise RuntimeError(message)

    networks = Networks(Raft(RAFT(LARGE).eval()), None, None, {}, {})
    monkeypatch.setattr(scores, "flow_score", functools.partial(fail, message="can't allocate memory: 8 GB"))
    found = score(moving(side=64, count=2), None, "", None, networks)
    assert "out of memory; give smaller videos" in found.reasons["flow_score"]
    monkeypatch.setattr(scores, "flow_score", functools.partial(fail, message="a fault"))
    with pytest.raises(RuntimeError, match="a fault"):
        score(moving(side=64, count=2), None, "", None, networks)


def test_what_ran_out_of_memory_is_measured_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    calls: list[int] = []
    measure = scores.flow_score
    monkeypatch.setattr(scores, "flow_score", fail)
    assert __main__.main(command(models)) == 0
    monkeypatch.setattr(scores, "flow_score", lambda *a, **k: calls.append(1) or measure(*a, **k))
    assert __main__.main(command(models)) == 0 and len(calls) == 8  # two videos of two models, with RAFT and with DIS
    assert __main__.main(command(models)) == 0 and len(calls) == 8  # whole now, and kept


@pytest.mark.parametrize("fitted", ["cover", "pad", "stretch"])
def test_a_mask_is_fitted_as_its_picture(tmp_path: Path, fitted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[8:24, 4:20] = 255
    for name in ("picture", "mask"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), wide)
    write_video(tmp_path / "clip.webp", moving(side=32), 8)
    video = Video("ours", tmp_path / "clip.webp", "clip", tmp_path / "picture.png", fitted, "", None,
                  tmp_path / "mask.png")  # fmt: skip
    seen: list[np.ndarray] = []
    monkeypatch.setattr(measured, "score", lambda frames, picture, prompt, mask, *_: seen.extend([picture, mask]))
    measured._measure(video, NetworkFiles(device="cpu"), Switches(), None)
    assert np.array_equal(seen[0][..., 0] > 127, seen[1] > 0) and seen[1].any() == (fitted != "cover")


def small_clip() -> CLIP:
    """Random weights."""
    image = CLIPVisionModel(CLIPVisionConfig(32, 64, 2, 2, 32, 64, 16, "quick_gelu")).eval()
    return CLIP(image, CLIPTextModel(CLIPTextConfig(49408, 16, 32, 2, 2, projection_dim=16)).eval(), "small CLIP")


def test_evalcrafters_switch_and_a_missing_picture() -> None:
    networks = Networks(None, None, small_clip(), {}, {})
    frames = moving(side=64)
    ours = score(frames, frames[0], "a cat", None, networks)
    theirs = score(frames, None, "", None, networks, Switches(evalcrafter=True))
    assert ours.details["clip_temp"]["reference"] == "image"
    assert ours.details["text_alignment"]["network"] == "small CLIP"
    assert theirs.details["clip_temp"]["preprocess"] == "evalcrafter" and "text_alignment" not in theirs.reasons
    assert "none was given; give it" in score(frames, None, "", None, networks).reasons["clip_temp"]


def test_the_asked_motion() -> None:
    assert asked("a red ball moves left over a blue sky") == ("moves left", "")
    assert asked("a red ball spins counterclockwise over grass") == ("spins counterclockwise", "")
    assert asked("a fish stays still over grass, the camera pans left") == ("stays still", "the camera pans left")
    assert asked("a man in a boat") == ("", "")


def test_means_have_intervals_from_six_pictures_on() -> None:
    def of(count: int) -> list[measured.Measured]:
        video = described({"m": [Path(f"clip{k}.mp4") for k in range(count)]}, [], None)
        return [measured.Measured(v, (4, 8, 8), Scores({"dover_vqa": 0.1 * k})) for k, v in enumerate(video)]

    column = PAPER[0]
    assert report.mean_cell(of(5), column, None) == "0.2000" and "[" in report.mean_cell(of(6), column, None)
    assert "[" in report.mean_cell(of(5), column, 90) and report.mean_cell(of(5), column, 95) == "0.2000"
    assert report.mean_cell(of(0), column, None) == "-"
    (alone,) = [line for line in report.warnings(report.Report("T", "", Path(), {}, EMPTY), of(1)) if "--ref" in line]
    assert "1 video (m/clip0.mp4)" in alone


def test_paper_rows_stand_below_the_row_of_their_name() -> None:
    found = of_two_models()
    one = report.Report("T", "", Path(), {}, EMPTY, paper={"svd": {"flow_score": 0.6883}, "pika": {"flow_score": 0.1}})
    rows = report._rows(one, report.by_model(found), PAPER, True)
    assert [r[0] for r in rows] == ["ours", "svd", "svd (the paper's)", "pika (the paper's)"]
    assert rows[2][-2] == "0.6883" and rows[2][2] == "-"
    assert len(report._rows(one, report.by_model(found), PAPER, False)) == 2


def of_two_models() -> list[measured.Measured]:
    videos = described({"ours": [Path("a.mp4")], "svd": [Path("a.mp4")]}, [], None)
    return [measured.Measured(v, (4, 8, 8), Scores()) for v in videos]


def test_what_a_measurement_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device and versions as well: rows of others are not taken over."""
    found = [scores.measured_by(dataclasses.replace(EMPTY, device=kind), Switches()) for kind in ("cpu", "cpu", "cuda")]
    monkeypatch.setattr(cv2, "__version__", "0")
    assert found[0] == found[1] and len({*found, scores.measured_by(EMPTY, Switches())}) == 3


def test_networks_are_opened_once(tmp_path: Path) -> None:
    files = NetworkFiles(device="cpu")
    assert open_networks(files) is open_networks(files) and open_networks(files).names == {}
