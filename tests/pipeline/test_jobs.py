"""Many videos in one run: what is listed, what they are called, what is skipped, what fails alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

import sample
from i2v import jobs, load
from i2v.config import ConfigError
from i2v.device import Place
from i2v.pipeline import I2VPipeline
from i2v.request import Request
from i2v.video import read_settings, read_video

QUICK = ("--steps", "1", "--num-frames", "2", "--guidance-scale", "1")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, miniature: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """sample.py in a folder with the pictures a, b and c, wide, tall and square; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name, size in (("a", (40, 60)), ("b", (60, 40)), ("c", (50, 50))):
        y, x = np.mgrid[0 : size[0], 0 : size[1]]
        cv2.imwrite(f"in/{name}.png", np.stack([x * 4, y * 4, np.full_like(x, 9 * ord(name))], -1).astype(np.uint8))

    def main(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = sample.main([*QUICK, "--weights", str(miniature), *argv])
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return main


def write(*lines: object, name: str = "jobs.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return name


def videos() -> set[str]:
    return {path.as_posix() for path in Path().rglob("*") if path.suffix in (".mp4", ".gif", ".webp")}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every model that is built."""
    seen: list[int] = []
    build = load.build
    monkeypatch.setattr(load, "build", lambda *args, **named: seen.append(1) or build(*args, **named))
    return seen


def test_a_file_of_jobs(run: Run, loads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(
        {"image": "in/a.png", "prompt": "a red ball", "output": "one.mp4", "seed": 4},
        {"image": "in/a.png", "prompt": "a blue ball", "output": "two.gif", "num_frames": 3},
        {"image": "in/a.png", "prompt": "a blue ball"},
        {"image": "in/a.png", "prompt": "a green ball"},
        {"image": ["in/b.png", "in/c.png@-1"], "num_frames": 4, "height": 72, "width": 104},
    )
    code, out, err = run("--jobs", file, "--output", "out")
    assert code == 0, err
    made = {"out/one.mp4", "out/two.gif", "out/a_0.mp4", "out/a_0_2.mp4", "out/b_0.mp4"}
    assert videos() == made and loads == [1]
    assert [f"[{n}/5] jobs.jsonl line {n}: out/" in out for n in range(1, 6)] == [True] * 5
    assert read_settings("out/one.mp4")["request"]["seed"] == 4
    assert read_settings("out/two.gif")["request"]["prompt"] == "a blue ball"
    assert read_settings("out/a_0_2.mp4")["request"]["prompt"] == "a green ball"
    assert read_video("out/b_0.mp4").shape == (4, 72, 104, 3)
    assert [one["frame"] for one in read_settings("out/b_0.mp4")["pictures"]] == [0, 3]

    before = {name: Path(name).stat().st_mtime_ns for name in made}
    code, out, _ = run("--jobs", file, "--output", "out")
    assert code == 0 and out.count("is there already") == 5 and loads == [1], "nothing is loaded for nothing"
    Path("out/two.gif").unlink()
    Path("in/c.png").rename("in/d.png")  # the last job's picture changes
    Path("in/a.png").rename("in/c.png")
    Path("in/d.png").rename("in/a.png")
    code, out, _ = run("--jobs", file, "--output", "out")
    assert code == 2 and loads == [1, 1], "one.mp4 is of another picture and is not replaced"
    assert {name: Path(name).stat().st_mtime_ns for name in made - {"out/two.gif"}} == {
        name: before[name] for name in made - {"out/two.gif"}
    }
    assert run("--jobs", file, "--output", "out", "--overwrite")[0] == 0
    assert Path("out/one.mp4").stat().st_mtime_ns > before["out/one.mp4"]


def test_a_folder_of_pictures(run: Run, loads: list[int]) -> None:
    Path("in/a.txt").write_text(" the red ball\nmoves left ")
    Path("in/notes.md").write_text("no picture")
    code, out, _ = run("--image", "in", "--prompt", "it stands", "--output", "out")
    assert code == 0 and videos() == {"out/a_0.mp4", "out/b_0.mp4", "out/c_0.mp4"} and loads == [1]
    prompts = {name: read_settings(f"out/{name}_0.mp4")["request"]["prompt"] for name in "abc"}
    assert prompts == {"a": "the red ball moves left", "b": "it stands", "c": "it stands"}
    code, out, _ = run("--image", "in/[ab].png", "--prompt", "it stands", "--output", "out")
    assert code == 0 and out.count("is there already") == 2 and "[2/2]" in out
    code, out, _ = run("--image", "in/b.png", "in/c.png", "--prompt", "it stands", "--output", "out")
    assert code == 0 and out.count("is there already") == 2
    code, out, _ = run("--image", "in", "--prompt", "it moves", "--output", "out")
    assert code == 0 and videos() >= {"out/b_0_2.mp4", "out/c_0_2.mp4"} and len(videos()) == 5


def test_hidden_files_are_no_pictures(run: Run) -> None:
    """macOS's notes on files, and half-written ones."""
    for name in ("._a.png", ".b.part.png"):
        Path("in", name).write_bytes(b"no picture")
    code, out, _ = run("--image", "in", "--output", "out")
    assert code == 0 and "[3/3]" in out and videos() == {"out/a_0.mp4", "out/b_0.mp4", "out/c_0.mp4"}


def test_looking_at_jobs_reads_nothing_twice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many prompts for one picture, over as many older videos: each of these and the picture are read once."""
    older = write(*({"prompt": f"left {k}"} for k in range(4)))
    assert run("--jobs", older, "--image", "in/a.png")[0] == 0 and len(videos()) == 4
    read: list[str] = []
    for name in ("recipe", "read_image"):
        real = getattr(jobs, name)
        monkeypatch.setattr(jobs, name, lambda path, real=real: read.append(str(path)) or real(path))
    newer = write(*({"prompt": f"right {k}"} for k in range(4)), name="newer.jsonl")
    assert run("--jobs", newer, "--image", "in/a.png")[0] == 0 and len(videos()) == 8
    assert sorted(read) == ["a_0.mp4", "a_0_2.mp4", "a_0_3.mp4", "a_0_4.mp4", "in/a.png"]


def test_one_picture_and_many_prompts(run: Run) -> None:
    file = write({"prompt": "left"}, {"prompt": "right"})
    assert run("--jobs", file, "--image", "in/a.png")[0] == 0 and videos() == {"a_0.mp4", "a_0_2.mp4"}


def test_a_default_name_that_another_program_takes_meanwhile(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs choose their names before the work; a name given by the user stays his."""
    stream = I2VPipeline.stream

    def slow(self: I2VPipeline, *args: object, **named: object) -> object:
        for name in ("a_0.mp4", "given.mp4"):
            Path(name).write_text("another program's")
        return stream(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(I2VPipeline, "stream", slow)
    file = write({"prompt": "left"}, {"prompt": "right"})
    code, out, _ = run("--jobs", file, "--image", "in/a.png")
    assert code == 0 and videos() == {"a_0.mp4", "a_0_2.mp4", "a_0_3.mp4", "given.mp4"} and "a_0_3.mp4 (" in out
    assert Path("a_0.mp4").read_text() == "another program's"
    assert {read_settings(f"a_0_{n}.mp4")["request"]["prompt"] for n in (2, 3)} == {"left", "right"}
    Path("given.mp4").unlink()
    code, _, err = run("--image", "in/a.png", "--output", "given.mp4")
    assert code == 2 and "given.mp4 already exists" in err and Path("given.mp4").read_text() == "another program's"


def test_what_fails_is_told_and_stops_no_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("in/b.png").write_text("a letter")
    file = write({"image": "in/a.png"}, {"image": "in/b.png"}, {"image": "none.png"}, {"image": "in/a.png", "p": 7},
                 {"image": "in/c.png", "seed": 666}, {"image": "in/c.png"})  # fmt: skip
    denoise = I2VPipeline.denoise

    def full(pipe: I2VPipeline, known: object, conditions: object, request: Request, *more: object) -> object:
        if request.seed == 666:
            raise RuntimeError("CUDA out of memory")
        return denoise(pipe, known, conditions, request, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(I2VPipeline, "denoise", full)
    code, out, err = run("--jobs", file)
    assert code == 2 and videos() == {"a_0.mp4", "c_0.mp4"}
    end = err[err.index("sample.py: error: ") :].splitlines()
    assert end[0] == "sample.py: error: 4 of 6 failed" and len(end) == 5
    words = ("in/b.png", "none.png", "--p 7", "out of memory")
    for line, number, word in zip(end[1:], (2, 3, 4, 5), words, strict=True):
        assert line.startswith(f"  jobs.jsonl line {number}: ") and word in line and line.strip() in out + err
    monkeypatch.setattr(I2VPipeline, "denoise", lambda *_: [][1])
    with pytest.raises(IndexError):  # a fault of the program is no failed job
        run("--image", "in/a.png", "in/c.png", "--seed", "5")


def test_a_dry_run_tells_of_every_job(run: Run, loads: list[int]) -> None:
    """Also after an impossible one, which is named."""
    file = write({"image": "none.png"}, {"image": "in/a.png", "p": 7}, {"image": "in/c.png"})
    code, out, err = run("--jobs", file, "--dry-run")
    assert code == 2 and not loads and not videos()
    lines = out.splitlines()
    assert "none.png" in lines[lines.index("jobs.jsonl line 1") + 1] and out.count("denoising") == 1
    assert "jobs.jsonl line 3" in lines and "2 of 3 failed" in err and "  jobs.jsonl line 2: --p 7" in err
    code, _, err = run("--image", "none.png", "--dry-run")
    assert code == 2 and err.startswith("sample.py: error: none.png") and err.count("\n") == 1


def test_nothing_is_loaded_where_all_is_wrong(run: Run, loads: list[int]) -> None:
    code, _, err = run("--jobs", write({"image": "x.png"}, {"image": "y.png"}))
    assert code == 2 and "2 of 2 failed" in err and not loads and not videos()


def test_ctrl_c_leaves_what_is_finished(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    denoise = I2VPipeline.denoise
    made: list[int] = []

    def stopped(*args: object) -> object:
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return denoise(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(I2VPipeline, "denoise", stopped)
    code, _, err = run("--image", "in", "--output", "out")
    assert code == 130 and "stopped" in err and {p.name for p in Path("out").iterdir()} == {"a_0.mp4", "a_0.mp4.json"}
    monkeypatch.setattr(I2VPipeline, "denoise", denoise)
    code, out, _ = run("--image", "in", "--output", "out")
    assert code == 0 and out.count("is there already") == 1 and len(videos()) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"image": "in/a.png", "promt": "x"}', ["line 1", "promt", "did you mean prompt?"]),
        ('\n{"image": "in/a.png", "steps": "x"}', ["line 2", "steps"]),
        ('{"image": "in/a.png"', ["line 1", "json"]),
        ("[1]", ["line 1", "list"]),
        ('{"prompt": "x"}', ["line 1", "image"]),
        ('{"image": ["in/a.png", "in/b.png"]}', ["frame 0", "in/b.png"]),
        ('{"image": "in/a.png", "sampler": "eular"}', ["did you mean euler?"]),
        ('{"image": "in/a.png", "output": "x.mp4"}\n{"image": "in/b.png", "output": "./x.mp4"}', ["line 1", "line 2"]),
        ('{"image": "in/a.png", "lora": "x"}', ["no setting 'lora'"]),
        ("\n", ["holds no job"]),
        ("\udcff", ["UTF-8"]),
    ],
)
def test_a_wrong_file_is_one_line_before_any_work(run: Run, text: str, words: list[str], loads: list[int]) -> None:
    Path("jobs.jsonl").write_text(text, errors="surrogateescape")
    code, _, err = run("--jobs", "jobs.jsonl")
    assert code == 2 and err.startswith("sample.py: error: ") and err.count("\n") == 1, err
    assert all(word in err for word in ["jobs.jsonl", *words] if word != "jobs.jsonl" or "frame 0" not in words), err
    assert not loads and not videos()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--jobs", "none.jsonl"), ["none.jsonl"]),
        (("--jobs", "in"), ["in", "cannot be read"]),
        (("--image", "in/*.jpg"), ["in/*.jpg", "no pictures"]),
        (("--image", "."), ["no pictures", ".png"]),
        (("--image", "in", "--output", "x.mp4"), ["--output x.mp4", "folder"]),
        (("--image", "in/a.png", "in/b.png", "in/c.png@1"), ["frame 0", "in/b.png"]),
        (("--image", "in/a.png@0", "in/b.png@1"), ["all 2 frames"]),
        (("--image", "in/a.png@9",), ["frames 0 to 1"]),
        (("--image", "in/a.png@x",), ["in/a.png@x"]),
        (("--image", "in/a.png@1", "--loop"), ["--loop"]),
        (("--image", "in", "in/a.png@1"), ["--image in: a folder or pattern", "each with its frame"]),
        (("--image", "in/*.png@1"), ["--image in/*.png@1: a folder or pattern", "each with its frame"]),
        (("--image", "in@1"), ["--image in@1: a folder or pattern"]),
    ],
)  # fmt: skip
def test_wrong_flags(run: Run, argv: tuple[str, ...], words: list[str], loads: list[int]) -> None:
    code, _, err = run(*argv)
    assert code == 2 and err.startswith("sample.py: error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words) and not loads and not videos(), err


def test_an_end_frame_is_recorded_and_made_again(run: Run) -> None:
    Path("in/at@3.png").write_bytes(Path("in/b.png").read_bytes())
    more = ("--num-frames", "4", "--guidance-scale", "1")
    for flags, name in ((("in/a.png", "--image", "in/at@3.png@-1"), "ends"), (("in/a.png", "--loop"), "loop")):
        code, out, err = run("--image", *flags, "--output", f"{name}.gif", *more)
        assert code == 0 and "frame 0 " in out and "frame 3 " in out and out.count("from your picture") == 2, err
        code, out, err = run("--from", f"{name}.gif", "--output", f"{name}2.gif", *more)
        assert code == 0 and "made as recorded" in out, err
        assert read_settings(f"{name}.gif") == read_settings(f"{name}2.gif")
        assert Path(f"{name}.gif").read_bytes() == Path(f"{name}2.gif").read_bytes()
    Path("in/at@3.png").rename("in/moved.png")
    code, _, err = run("--from", "ends.gif", *more)
    assert code == 2 and "in/at@3.png" in err and "in/a.png" not in err and "--image" in err
    code, out, _ = run("--from", "ends.gif", "--image", "in/a.png", "in/moved.png@2", "--output", "x.mp4", *more)
    assert code == 0 and "the picture of frame 2 is another" in out and "the picture of frame 3 is another" in out


def test_listed_without_a_model() -> None:
    (job,), several = jobs.listed(["a.png", "b.png@-1"], None, Request(), Path("x.mp4"))
    assert not several and job.images == {0: Path("a.png"), -1: Path("b.png")} and job.output == Path("x.mp4")
    both, several = jobs.listed(["a.png", "b.png"], None, Request(seed=3), Path("out"))
    assert several and [job.name for job in both] == ["a.png", "b.png"] and {job.request.seed for job in both} == {3}
    with pytest.raises(ConfigError, match="b.png@1: frame 1 has a.png"):
        jobs.listed(["a.png@1", "b.png@1"], None, Request(), None)


def test_several_processes_share_the_jobs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts them: each makes every other video, under the names that one process would give."""
    alone = run("--image", "in", "--output", "alone")
    assert alone[0] == 0
    for rank, made in ((0, ["a", "c"]), (1, ["b"])):
        monkeypatch.setattr(sample, "place", lambda: Place(rank, 2, rank))  # noqa: B023
        before = videos()
        code, out, _ = run("--image", "in", "--output", "shared")
        assert code == 0 and videos() - before == {f"shared/{name}_0.mp4" for name in made}
        assert all(f"[{'abc'.index(name) + 1}/3]" in out for name in made) and out.count("/3]") == len(made)
    for path in Path("alone").glob("*.mp4"):
        assert np.array_equal(read_video(path), read_video(Path("shared") / path.name))
