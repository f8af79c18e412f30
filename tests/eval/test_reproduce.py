"""The paper's tables on a random miniature; sets by seed and by list; the paper's numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from eval import __main__, paper_tables, picture_set, reproduce
from eval.paper import METRICS, TABLE_1, TABLE_2, TABLE_3
from eval.picture_set import chosen, of_world, write_list
from i2v import presets
from i2v.data.world import LEVEL_1
from i2v.video import write_video


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate(("boat", "cat", "dog", "house")):
        cv2.imwrite(str(folder / f"{name}.png"), np.full((40, 60, 3), 40 * i, np.uint8))
        (folder / f"{name}.txt").write_text(f"a {name} moves left")
    return folder


@pytest.mark.slow
def test_processes_share_a_table(random_folder: Path, pictures: Path, tmp_path: Path) -> None:
    flags = f"table3 --weights {random_folder} --pictures {pictures} --count 1 --steps 1 --num-frames 2 --device cpu"
    assert __main__.main([*flags.split(), "--out", str(tmp_path / "o"), "--workers", "2"]) == 0
    assert len(list(tmp_path.glob("o/videos/*/*/frame_*.png"))) == 4 * 2


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three frames instead of sixteen."""
    monkeypatch.setitem(presets.PRESETS, "tiny", replace(presets.find("tiny"), num_frames=3))


def test_a_table_is_made_and_not_made_again(random_folder: Path, pictures: Path, tmp_path: Path, short: None,
                                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = tmp_path / "out"
    flags = ["table3", "--weights", str(random_folder), "--pictures", str(pictures), "--count", "1", "--steps", "2",
             "--out", str(out), "--device", "cpu"]  # fmt: skip
    assert __main__.main(flags) == 0
    told = capsys.readouterr().out
    lines = [line.split("  ")[0] for line in told.splitlines() if "(the paper's)" in line]
    assert lines == [f"{row.name} (the paper's)" for row in TABLE_3]
    assert "full model (the paper's) 50 0.0887 0.9389 0.7124 11.8388" in " ".join(told.split())
    assert "WarpingError x 10,000, text alignment: empty; the miniature draws pictures of 64 pixels" in told
    results = json.loads((out / "results.json").read_text())
    assert len(results["videos"]) == 4 and not [v for v in results["videos"] if set(v["values"]) & set(METRICS)]
    assert {name for v in results["videos"] for name in v["values"]} <= {
        "motion_right", "similarity_psnr", "similarity_ssim", "flow_score (DIS)"
    }  # fmt: skip
    made = {f: f.stat().st_mtime_ns for f in out.glob("videos/*/*/frame_*.png")}
    assert len(made) == 4 * 3
    written = json.loads((Path(results["videos"][0]["file"]) / "settings.json").read_text())
    assert written["request"]["i2v_scale"] == written["request"]["ip_scale"] == 0
    assert __main__.main(flags) == 0
    assert {f: f.stat().st_mtime_ns for f in made} == made, "nothing is made twice"
    listed = json.loads((out / "pictures.json").read_text())["pictures"]
    assert len(listed) == 1 and len(listed[0]["sha256"]) == 64
    again = reproduce.Reproduction(pictures=pictures, set_seed=7, list_=out / "pictures.json")
    pairs = reproduce.picture_set(again, reproduce.assemble.plan(reproduce.ModelFiles()), tmp_path / "again")
    assert [pair.name for pair in pairs] == [row["name"] for row in listed]


def test_videos_of_another_format_or_version_are_made_again(
    random_folder: Path, pictures: Path, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an overflow in float16: a row holds no two kinds."""
    for kind in ("png", "txt"):
        for file in pictures.glob(f"*.{kind}"):
            file.rename(file.with_name(f"v1.5 {file.name}"))
    flags = f"table1 --weights {random_folder} --pictures {pictures} --count 1 --steps 1 --out {tmp_path}/o"
    made: list[object] = []
    make = reproduce._make
    monkeypatch.setattr(reproduce, "_make", lambda *given: made.append(given[0]) or make(*given))
    for number, more in ((1, []), (1, []), (2, ["--dtype", "bfloat16"]), (2, ["--dtype", "bfloat16"])):
        assert __main__.main([*flags.split(), "--device", "cpu", *more]) == 0
        assert len(made) == number
    monkeypatch.setattr(reproduce, "__version__", "another")
    assert __main__.main([*flags.split(), "--device", "cpu", "--dtype", "bfloat16"]) == 0 and len(made) == 3


def test_other_methods_beside_ours(random_folder: Path, pictures: Path, tmp_path: Path, short: None,
                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Of the set's pictures alone; another length is told before anything is made, and may be cut."""
    for name in ("boat", "cat", "dog", "house", "elephant"):
        write_video(tmp_path / "svd" / f"{name}.mp4", np.zeros((5, 64, 64, 3), np.uint8), 8)
    flags = f"table1 --weights {random_folder} --pictures {pictures} --steps 1 --out {tmp_path}/o --device cpu"
    given = [*flags.split(), "--videos", f"SVD={tmp_path}/svd"]
    assert __main__.main(given) == 2
    assert "a video of this model has 3; cut all to 3 frames (--frames 3)" in capsys.readouterr().err
    assert not (tmp_path / "o" / "videos").exists()
    assert __main__.main([*given, "--frames", "3"]) == 0
    assert "--videos: 1 video of other pictures left out" in capsys.readouterr().out
    results = json.loads((tmp_path / "o" / "results.json").read_text())["videos"]
    assert sorted(v["scene"] for v in results if v["model"] == "SVD") == ["boat", "cat", "dog", "house"]
    assert __main__.main([*given[:-1], f"SVD={tmp_path}/svd/elephant.mp4"]) == 2
    assert "none is of the set's pictures" in capsys.readouterr().err


def test_rows_share_their_noise(random_folder: Path, pictures: Path, tmp_path: Path, short: None) -> None:
    flags = f"table2 --weights {random_folder} --pictures {pictures} --count 1 --steps 2 --out {tmp_path}/o"
    assert __main__.main([*flags.split(), "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [v["model"] for v in results["videos"]] == [row.name for row in TABLE_2]
    settings = [json.loads((Path(v["file"]) / "settings.json").read_text())["request"] for v in results["videos"]]
    assert len({s["seed"] for s in settings}) == 1
    assert [(s["t0"], s["p"]) for s in settings] == [(r.settings["t0"], r.settings["p"]) for r in TABLE_2]
    assert "t0, p" in (tmp_path / "o" / "page.html").read_text()


def test_rows_of_each_preset() -> None:
    assert [r.name for r in reproduce.rows_of("table1", "i2v-sd15")] == ["I2V-Adapter (SD1.5)"]
    assert [r.name for r in reproduce.rows_of("table1", "tiny")] == ["I2V-Adapter (tiny)"]
    assert len(reproduce.rows_of("table2", "tiny")) == 10 and len(reproduce.rows_of("table3", "i2v-sdxl")) == 4


def test_the_papers_numbers_agree_with_each_other() -> None:
    assert TABLE_3[-1].numbers == TABLE_1[-1].numbers, "the full model of Table 3 is SDXL's row of Table 1"
    assert paper_tables.ABLATIONS["full"] == (1.0, 1.0, 0.7124, 11.8388)
    assert paper_tables.ABLATIONS["without both"] == (0.0, 0.0, 1.5671, 24.5928)
    assert paper_tables.PAPER_FLOW[1.0, 0.9] == 0.9895 and paper_tables.PAPER_FLOW[0.6, 1.0] == 0.1428
    for table, sums in ((TABLE_1, (0.5405, 6.2585, 3.5178, 91.6671)), (TABLE_2, (0.9135, 9.4204, 6.0015, 105.2868)),
                        (TABLE_3, (0.2392, 3.4401, 3.9012, 69.7637))):  # fmt: skip
        assert tuple(sum(column) for column in zip(*(r.numbers for r in table))) == pytest.approx(sums, abs=1e-6)


def test_mjhq_by_seed(tmp_path: Path, pictures: Path) -> None:
    meta = {}
    for i in range(60):
        name, category = f"{i:02d}aa", "art" if i % 2 else "food"
        (tmp_path / "mjhq30k_imgs" / category).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mjhq30k_imgs" / category / f"{name}.jpg").write_bytes(bytes([i]))
        meta[name] = {"category": category, "prompt": f"prompt {i}"}
    (tmp_path / "meta_data.json").write_text(json.dumps(meta))
    one, same, other = (chosen(tmp_path, None, None, seed) for seed in (0, 0, 1))
    assert one == same != other and len(one) == 50 and one[0].category in ("art", "food")
    write_list(one, tmp_path / "list.json", {})
    assert chosen(tmp_path, None, None, 7, tmp_path / "list.json") == one
    one[3].file.write_bytes(b"other")
    with pytest.raises(ValueError, match=f"1 pictures or prompts are others here, such as {one[3].name}"):
        chosen(tmp_path, None, None, 0, tmp_path / "list.json")
    one[3].file.unlink()
    with pytest.raises(ValueError, match="1 of the 60 pictures .* are not there.*unpack all of"):
        chosen(tmp_path, None, None, 0)
    with pytest.raises(ValueError, match="pictures are not in this folder"):
        chosen(pictures, None, None, 0, tmp_path / "list.json")


def test_a_folder(pictures: Path) -> None:
    every = chosen(pictures, None, None, 0)
    assert {p.name for p in every} == {"boat", "cat", "dog", "house"}
    assert chosen(pictures, None, 2, 0) == every[:2], "a trial is the start of the larger run"
    assert len({tuple(p.name for p in chosen(pictures, None, 2, seed)) for seed in range(9)}) > 1
    with pytest.raises(ValueError, match="--count 5: .* has 4 pictures"):
        chosen(pictures, None, 5, 0)
    (pictures / "cat.txt").unlink()
    with pytest.raises(ValueError, match="1 pictures have no prompt, the first is cat.png; give --prompts, or cat.txt"):
        chosen(pictures, None, None, 0)
    (pictures / "cat.jpg").write_bytes((pictures / "cat.png").read_bytes())
    with pytest.raises(ValueError, match="two pictures named cat"):
        chosen(pictures, None, None, 0)
    with pytest.raises(ValueError, match="no list of pictures"):
        picture_set._as_listed([], pictures / "dog.txt")
    write_list([], pictures / "none.json", {})
    with pytest.raises(ValueError, match="none.json: it lists no picture"):
        picture_set._as_listed([], pictures / "none.json")
    for text in ('["a"]', '{"a": "b"}', '{"a": {"category": "art"}}'):
        (pictures / "meta_data.json").write_text(text)
        with pytest.raises(ValueError, match="meta_data.json is not MJHQ-30K's: expected an object of ids"):
            chosen(pictures, None, None, 0)


def test_the_worlds_pictures(tmp_path: Path) -> None:
    pairs = of_world(LEVEL_1, 3, 0, 4, 64, tmp_path)
    assert of_world(LEVEL_1, 2, 0, 4, 64, tmp_path) == pairs[:2]
    assert len({p.name for p in pairs}) == 3 and of_world(LEVEL_1, 3, 1, 4, 64, tmp_path) != pairs
    for pair in pairs:
        assert pair.mask is not None and " over " in pair.prompt
        mask = cv2.imread(str(pair.mask), cv2.IMREAD_GRAYSCALE)
        assert mask is not None and set(np.unique(mask)) == {0, 255}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("table1 --preset i2v-sd15", "v1-5-pruned-emaonly.safetensors"),
        ("table2 --raft raft.pth --clip x.pt", "--raft, --clip: the miniature draws pictures of 64 pixels"),
        ("table2 --pictures none", "--pictures none: there is no such folder"),
        ("table2 --count 0", "--count 0: expected 1 or more"),
        ("table1 --count 10001", "--count 10001: the miniature's world has 10,000 pictures"),
        ("table3 --count 3 --interval 95", "--interval 95: needs videos of 6 pictures or more"),
        ("table3 --list x.json", "give the pictures' folder too"),
    ],
)
def test_mistakes_are_one_line(flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([*flags.split(), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and not (tmp_path / "out" / "videos").exists()
