"""On a device that is not the CPU nothing is left on the CPU, and videos and trained weights are the CPU's.

By a stand-in (other_device.py), on any machine; not a substitute for `I2V_TEST_DEVICE=cuda pytest`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot be given a device of Python's",
)

BEGIN = """
import sys
sys.path.insert(0, "tests")
from other_device import OtherDevice
import numpy as np, torch
from i2v.load import load
"""

SAMPLE = """
def made(device, **files):
    pipe = load("tiny", device, **files)
    return [pipe("examples/red_ball.png", "a red ball moves left", num_frames=6, steps=2, **how).frames for how in HOW]

want = made("cpu", **{**FILES, "dtype": torch.float32})
with OtherDevice():
    got = made("other", **FILES)
for how, one, other in zip(HOW, want, got):
    far = np.abs(one.astype(int) - other).max()
    assert far <= 2, (how, far)  # of 255
"""

PLAIN = """
HOW = [
    {},
    {"t0": 0.8, "posterior": "sample", "sampler": "dpmpp_2m_sde", "color_match": True},
    {"window": 4, "loop": True, "deep_every": 2, "guidance_end": 0.5, "sampler": "euler_ancestral"},
]
FILES = {}
"""

HALF = """
HOW = [{"t0": 0.9}]
FILES = {"dtype": torch.float16}
"""

WITH_FILES = """
HOW = [{"control": ["canny=examples/red_ball.png"]}]
FILES = {
    "lora": "weights/tiny-lora/night.safetensors:0.5",
    "controlnet": "canny=weights/tiny-control/canny.safetensors",
}
"""

TRAIN = """
import train
from safetensors.torch import load_file
out = sys.argv[1]
flags = ["--config", "configs/overfit.json", "--train", "i2v_adapter.*", "--steps", "2", "--save-every", "1",
         "--clips-made", "1", "--dtype", "float32", "--cache", f"{out}/cache"]
assert train.main([*flags, "--device", "cpu", "--out", f"{out}/cpu"]) == 0
with OtherDevice():
    more = ["--device", "other", "--out", f"{out}/other", "--workers", "0"]
    assert train.main([*flags, *more, "--checkpointing"]) == 0
    again = ["--steps", "3", "--allow-change", "steps"]
    assert train.main([*flags, *more, "--checkpointing", *again]) == 0
assert train.main([*flags, "--device", "cpu", "--out", f"{out}/cpu", *again]) == 0
want, got = (load_file(f"{out}/{kind}/weights/i2v_adapter.safetensors") for kind in ("cpu", "other"))
assert want.keys() == got.keys()
for key in want:
    far = (want[key].float() - got[key].float()).abs().max()
    assert far <= 1e-5, (key, far)
"""

PUBLISHED = """
import pytest
import planted, small_published, train
from pathlib import Path
from safetensors.torch import load_file
from i2v.training import validation

out, preset = Path(sys.argv[1]), sys.argv[2]
patch = pytest.MonkeyPatch()
small_published.use(patch)
patch.setattr(validation, "TIMESTEPS", (800,))
models = small_published.write(out / "models", preset)
planted.write(out / "clips" / "one.mp4", planted.moving(0, 4))
trained = dict(
    preset=preset, models=models, train=("i2v_adapter.*out*",), data=out / "clips", cache=out / "cache", fps=8,
    num_frames=4, height=32, width=64, batch=2, micro_batch=1, steps=1, hold_out=0.0, clips_made=1, workers=0,
    dtype="float32",
)

def made(device, int8):
    pipe = load(preset, device, models=models, int8=int8)
    return pipe("examples/red_ball.png", "a red ball", num_frames=4, steps=2, height=64, width=64).frames

def adapter(device):
    assert train.train(train.Training(**trained, device=device, out=out / device), train.Processes()) == 0
    return load_file(out / device / "weights" / "i2v_adapter.safetensors")

for int8, bound in ((False, 2), (True, 6)):
    want = made("cpu", int8)
    with OtherDevice():
        far = np.abs(want.astype(int) - made("other", int8)).max()
    assert far <= bound, (int8, far)  # of 255
want = adapter("cpu")
with OtherDevice():
    got = adapter("other")
assert want.keys() == got.keys()
# the first step of AdamW is the rate with the gradient's sign, which is chance where the gradient is nearly 0
far = torch.cat([(want[key].float() - got[key].float()).abs().flatten() for key in want])
assert far.mean() <= 1e-6, far.mean()
"""

LEFT_BEHIND = """
from i2v.diffusion import frame_similarity_prior as prior
start = prior.start_latents
prior.start_latents = lambda *given: start(*given).cpu()
"""

UNSENT = """
from i2v.training import batches
batches.sent = lambda tensor, device: tensor
"""


def run(program: str, root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    threads = {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", BEGIN + program, *args], cwd=root, env=os.environ | threads,
                          capture_output=True, text=True, timeout=400)  # fmt: skip


@pytest.mark.parametrize("files", [PLAIN, HALF, WITH_FILES], ids=["plain", "float16", "LoRA and ControlNet"])
def test_videos_are_those_of_the_cpu(files: str, root: Path) -> None:
    done = run(files + SAMPLE, root)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("program", [LEFT_BEHIND + PLAIN + SAMPLE, UNSENT + TRAIN], ids=["sampling", "training"])
def test_a_tensor_that_is_left_on_the_cpu_is_seen(program: str, root: Path, tmp_path: Path) -> None:
    done = run(program, root, str(tmp_path))
    assert done.returncode != 0 and "on the same device" in done.stderr


@pytest.mark.parametrize("preset", ["i2v-sd15", "i2v-sdxl"])
def test_published_files_are_sampled_and_trained_from(preset: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    done = run(PUBLISHED, root, str(tmp_path), preset)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_training_goes_as_on_the_cpu(root: Path, tmp_path: Path) -> None:
    done = run(TRAIN, root, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
