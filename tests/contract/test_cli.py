"""sample.py as users meet it: its flags, other projects' names for them, every kind of bad input, replay, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import random_miniature
import torch

import sample
from i2v.pipeline import I2VPipeline
from i2v.video import read_settings, read_video

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--steps", "2", "--num-frames", "3")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_miniature.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """sample.py in an empty folder with a picture; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[0:80, 0:80]
    cv2.imwrite("cat.png", np.stack([x * 3, y * 3, (x + y)], -1).astype(np.uint8))

    def main(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = sample.main([*argv, *(() if {"--weights", "i2v-sd15"} & {*argv} else ("--weights", str(model)))])
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return main


def files() -> set[str]:
    return {p.name for p in Path.cwd().iterdir()} - {"cat.png"}


def test_picture_and_prompt_are_enough(run: Run) -> None:
    code, out, err = run("--image", "cat.png", "--prompt", "a red ball moves left", *QUICK)
    assert code == 0 and "cat_0.mp4" in out and "Error" not in err
    assert files() == {"cat_0.mp4", "cat_0.mp4.json"}
    assert read_video(Path("cat_0.mp4")).shape == (3, 64, 64, 3)
    settings = read_settings(Path("cat_0.mp4"))
    assert settings == json.loads(Path("cat_0.mp4.json").read_text())
    assert settings["request"]["prompt"] == "a red ball moves left" and settings["request"]["seed"] == 0
    assert "denoising" in err and "decoding" in err
    assert "dB from your picture" in out and "delta E" in out


def test_nothing_is_overwritten_unless_told(run: Run) -> None:
    for _ in range(3):
        assert run("--image", "cat.png", *QUICK)[0] == 0
    assert {"cat_0.mp4", "cat_0_2.mp4", "cat_0_3.mp4"} <= files()
    before = Path("cat_0.mp4").read_bytes()
    code, _, err = run("--image", "cat.png", "--seed", "5", "--output", "cat_0.mp4", *QUICK)
    assert code == 2 and "--overwrite" in err and Path("cat_0.mp4").read_bytes() == before
    assert run("--image", "cat.png", "--seed", "5", "--output", "cat_0.mp4", "--overwrite", *QUICK)[0] == 0
    assert read_settings(Path("cat_0.mp4"))["request"]["seed"] == 5


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        (("--first_frame_path", "b.png"), "image", ("b.png",)),
        (("-p", "x"), "prompt", "x"),
        (("-hs", "72"), "height", 72),
        (("-ws", "72"), "width", 72),
        (("-l", "8"), "num_frames", 8),
        (("--video_length", "8"), "num_frames", 8),
        (("--frame-num", "8"), "num_frames", 8),
        (("--cfg", "3"), "guidance_scale", 3.0),
        (("--cfg-scale=3",), "guidance_scale", 3.0),
        (("--guidance_scale", "3"), "guidance_scale", 3.0),
        (("--num_inference_steps", "9"), "steps", 9),
        (("--ddim-steps", "9"), "steps", 9),
        (("--sample_steps", "9"), "steps", 9),
        (("--n_prompt", "x"), "negative_prompt", "x"),
        (("--neg_prompt", "x"), "negative_prompt", "x"),
        (("--ip-adapter-scale", "0.5"), "ip_scale", 0.5),
        (("-o", "x.mp4"), "output", Path("x.mp4")),
    ],
)
def test_other_projects_flags(given: tuple[str, ...], field: str, value: object) -> None:
    assert getattr(sample.parse(given)[0], field) == value


def test_every_documented_flag_exists(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "image prompt negative-prompt seed steps guidance-scale num-frames height width fit sampler t0 p i2v-scale "
        "ip-scale color-match fps device dtype output overwrite first-frame release preset from config"
    )
    with pytest.raises(SystemExit) as end:
        sample.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert not [flag for flag in flags.split() if f"--{flag}" not in shown]


def test_release_sets_what_the_authors_script_does() -> None:
    cfg, _ = sample.parse(["--release"])
    assert (cfg.steps, cfg.guidance_scale, cfg.t0, cfg.p) == (25, 7.5, 1.0, 0.5)
    assert (cfg.fit, cfg.posterior, cfg.unconditional_image) == ("released", "sample", "zero-pixels")
    assert cfg.color_match and cfg.sampler == "ddim" and cfg.ip_scale == 1.0
    assert sample.parse(["--release", "--steps", "10", "--no-color-match"])[0].steps == 10


def test_config_file(run: Run) -> None:
    Path("c.json").write_text(json.dumps({"image": "cat.png", "steps": 2, "num_frames": 3, "seed": 9}))
    assert run("--config", "c.json")[0] == 0 and "cat_9.mp4" in files()


def spoil(name: str) -> str:
    """A file that only looks like a picture."""
    good = Path("cat.png").read_bytes()
    if name == "truncated.png":
        Path(name).write_bytes(good[: len(good) // 2])
    elif name == "text.png":
        Path(name).write_text("this is a letter, not a picture\n")
    elif name == "empty.png":
        Path(name).touch()
    elif name == "dot.png":
        cv2.imwrite(name, np.zeros((1, 1, 3), np.uint8))
    elif name == "huge.png":
        cv2.imwrite(name, np.zeros((20_000, 20_000), np.uint8))
    elif name == "folder.png":
        Path(name).mkdir()
    return name


@pytest.mark.parametrize(
    "name", ["missing.png", "truncated.png", "text.png", "empty.png", "dot.png", "huge.png", "folder.png"]
)
def test_a_bad_picture_is_one_line_and_code_2(run: Run, name: str) -> None:
    spoil(name)
    code, _, err = run("--image", name)
    assert code == 2 and err.startswith("sample.py: error: ") and err.count("\n") == 1 and name in err, err
    assert not [f for f in files() if f.endswith((".mp4", ".json", ".tmp"))]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--image", "cat.png", "--height", "63", "--width", "64"), ["--height 63", "multiple"]),
        (("--image", "cat.png", "--num-frames", "10000"), ["--num-frames 10000", "9999"]),
        (("--image", "cat.png", "--height", "8", "--width", "8"), ["--height 8", "16"]),
        (("--image", "cat.png", "--height", "999936", "--width", "64"), ["--height 999936", "16384"]),
        (("--image", "cat.png", "--decode-chunk", "0"), ["--decode-chunk 0"]),
        (("--image", "cat.png", "--output", "a.gif", "--fps", "60"), ["60", "50"]),
        (("--image", "cat.png", "--t0", "0"), ["--t0"]),
        (("--image", "cat.png", "--t0", "0.0001"), ["raise t0"]),
        (("--image", "cat.png", "--p", "2"), ["--p"]),
        (("--image", "cat.png", "--steps", "0"), ["--steps"]),
        (("--image", "cat.png", "--deep-every", "0"), ["--deep-every 0", "1000"]),
        (("--image", "cat.png", "--deep-every", "2", "--control", "canny=cat.png"), ["--deep-every 2", "--control"]),
        (("--image", "cat.png", "--guidance-start", "0.5", "--guidance-end", "0.2"), ["--guidance-start 0.5"]),
        (("--image", "cat.png", "--guidance-end", "0.5", "--guidance-scale", "1"), ["--guidance-scale 1"]),
        (("--image", "cat.png", "--step", "5"), ["did you mean --steps?"]),
        (("--image", "cat.png", "--negative_promt", "x"), ["did you mean --negative-prompt?"]),
        (("--image", "cat.png", "--sampler", "plms"), ["ddim"]),
        (("--image", "cat.png", "--sampler", "eular"), ["did you mean euler?"]),
        (("--image", "cat.png", "--output", "clip.xyz"), [".xyz", ".mp4"]),
        (("--image", "cat.png", "--output", "cat.png/clip.mp4"), ["cat.png"]),
        (("--image", "cat.png", "--output", "/proc/clip.mp4"), ["/proc"]),
        (("--image", "cat.png", "--preset", "i2v-sd15"), ["i2v_module.pth"]),
        (("--image", "cat.png", "--preset", "big"), ["tiny"]),
        (("--image", "cat.png", "--weights", "nowhere"), ["nowhere", "unet.safetensors"]),
        (("--image", "cat.png", "--device", "abacus"), ["abacus"]),
        (("--prompt", "x"), ["--image"]),
        (("--from", "none.mp4"), ["none.mp4"]),
        (("--from", "cat.png"), ["cat.png"]),
        (("cat.png",), ["cat.png"]),
    ],
)
def test_bad_input_is_one_line_and_code_2(run: Run, argv: tuple[str, ...], words: list[str]) -> None:
    code, _, err = run(*argv)
    assert code == 2 and err.startswith("sample.py: error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert files() == set()


@pytest.mark.parametrize("prompt", ["", "ball " * 500 + "far end"])
def test_empty_and_very_long_prompts(run: Run, prompt: str, caplog: pytest.LogCaptureFixture) -> None:
    assert run("--image", "cat.png", "--prompt", prompt, *QUICK)[0] == 0
    assert ("far end" in caplog.text and "cut" in caplog.text) == bool(prompt)


def test_bfloat16(run: Run) -> None:
    assert run("--image", "cat.png", "--dtype", "bfloat16", *QUICK)[0] == 0
    assert read_settings(Path("cat_0.mp4"))["run"]["dtype"] == "bfloat16"


def test_a_video_is_made_again_from_its_own_file(run: Run, tmp_path: Path) -> None:
    assert run("--image", "cat.png", "--prompt", "a cat", "--seed", "3", "--t0", "0.8", "--sampler", "euler_ancestral",
               "--deep-every", "2", "--guidance-end", "0.5", "--output", "one.mp4", *QUICK)[0] == 0  # fmt: skip
    code, out, _ = run("--from", "one.mp4", "--output", "two.mp4")
    assert code == 0 and "made as recorded" in out
    assert np.array_equal(read_video(Path("one.mp4")), read_video(Path("two.mp4")))
    assert read_settings(Path("one.mp4")) == read_settings(Path("two.mp4"))
    assert Path("one.mp4").read_bytes() == Path("two.mp4").read_bytes()
    code, out, _ = run("--from", "one.mp4", "--decode-chunk", "1", "--output", "chunk.mp4")
    assert code == 0 and "decode_chunk was 8, is 1" in out
    code, out, _ = run("--from", "one.mp4", "--memory", "low", "--output", "low.mp4")
    assert code == 0 and "decode_chunk was 8, is 1" in out, "a plan that is asked for decides about decoding, too"
    assert "decode_tile was 0, is 256; the video differs slightly: tiles are not exact" in out
    code, out, _ = run("--from", "one.mp4", "--seed", "4", "--output", "three.mp4")
    assert code == 0 and "seed was 3, is 4" in out
    other = random_miniature.write(tmp_path / "other", seed=1)
    code, out, _ = run("--from", "one.mp4", "--output", "four.mp4", "--weights", str(other))
    assert code == 0 and "weights of unet are others" in out and "not as recorded" in out
    assert not np.array_equal(read_video(Path("one.mp4")), read_video(Path("four.mp4")))
    Path("cat.png").rename("moved.png")
    code, _, err = run("--from", "one.mp4", "--output", "five.mp4")
    assert code == 2 and "--image" in err and "cat.png" in err
    code, out, _ = run("--from", "one.mp4", "--image", "moved.png", "--output", "five.mp4")
    assert code == 0 and "made as recorded" in out


def test_a_video_of_the_released_rounding_keeps_its_size(run: Run) -> None:
    """64x128 by a height of 78 is no size that the rounding makes of itself: at 64 the width would be 64."""
    cv2.imwrite("wide.png", np.zeros((40, 51, 3), np.uint8))
    assert run("--image", "wide.png", "--fit", "released", "--height", "78", "--output", "one.mp4", *QUICK)[0] == 0
    code, out, _ = run("--from", "one.mp4", "--output", "two.mp4")
    assert code == 0 and "made as recorded" in out and read_video(Path("two.mp4")).shape[1:3] == (64, 128)
    code, out, _ = run("--from", "one.mp4", "--height", "140", "--output", "three.mp4")
    assert code == 0 and read_video(Path("three.mp4")).shape[1:3] == (128, 192), "a new height acts alone"
    code, out, _ = run("--from", "one.mp4", "--fit", "cover", "--output", "four.mp4")
    assert code == 0 and read_video(Path("four.mp4")).shape[1:3] == (64, 128), "another fit, the size that it had"


def test_from_and_release_together(run: Run) -> None:
    assert run("--image", "cat.png", "--guidance-scale", "3", "--output", "one.mp4", *QUICK)[0] == 0
    cfg, _ = sample.parse(["--from", "one.mp4", "--release", "--steps", "2"])
    assert (cfg.guidance_scale, cfg.fit, cfg.num_frames, cfg.steps) == (7.5, "released", 3, 2)


@pytest.mark.parametrize(
    ("group", "value", "word"),
    [
        ("pictures", "cat.png", "pictures"),
        ("weights", [1], "weights"),
        ("request", {"stepz": 2}, "did you mean steps?"),
        ("pictures", [{"frame": 0, "file": None}], "--image"),
        ("pictures", [{"file": "cat.png"}], "frames"),
    ],
)
def test_spoilt_settings_are_one_line_and_code_2(run: Run, group: str, value: object, word: str) -> None:
    assert run("--image", "cat.png", "--output", "one.mp4", *QUICK)[0] == 0
    settings = json.loads(Path("one.mp4.json").read_text())
    Path("spoilt.json").write_text(json.dumps({**settings, group: value}))
    code, _, err = run("--from", "spoilt.json")
    assert code == 2 and err.startswith("sample.py: error: ") and err.count("\n") == 1 and word in err, err


def test_out_of_memory_is_one_line_and_code_2(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(I2VPipeline, "denoise", full)
    code, _, err = run("--image", "cat.png")
    assert code == 2 and "out of memory" in err and files() == set()


def _start(
    tmp_path: Path, model: Path, *argv: str, limit: int | None = None, python: Sequence[str] = ()
) -> subprocess.Popen[str]:
    command = [sys.executable, *python, str(ROOT / "sample.py"), "--image", "cat.png", "--weights", str(model), *argv]
    if limit is not None:  # of bytes per file: what a full disk does, at a chosen place
        code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (%d, %d)); import sample; sys.exit(sample.main(sys.argv[1:]))"  # noqa: E501
        command[1:2] = ["-c", code % (limit, limit)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_ctrl_c_leaves_nothing_behind(run: Run, tmp_path: Path, model: Path) -> None:
    process = _start(tmp_path, model, "--steps", "999")
    assert process.stderr is not None
    seen = ""
    deadline = time.monotonic() + 60
    while "denoising" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert files() == set()


def test_ctrl_c_during_the_imports_is_quiet(run: Run, tmp_path: Path, model: Path) -> None:
    process = _start(tmp_path, model, "--steps", "999", python=("-X", "importtime"))  # tells every import on stderr
    assert process.stderr is not None
    for line in process.stderr:
        if " torch." in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "stopped" in err, err
    assert "i2v.pipeline" not in err, "it came after the imports"
    assert files() == set()


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="PyTorch before 2.8 writes files itself while it is imported")
def test_a_full_disk_leaves_nothing_behind(run: Run, tmp_path: Path, model: Path) -> None:
    process = _start(tmp_path, model, "--prompt", "ball " * 50 + "far end", *QUICK, limit=1000)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "sample.py: error: " in err and "Traceback" not in err, err
    assert "cut off: " in err and "far end" in err, "what is logged reaches the terminal"
    assert files() == set()
