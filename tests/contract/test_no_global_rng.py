"""No draw comes from a global random generator: neither in the source nor while a video is made."""

from __future__ import annotations

import ast
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from random_miniature import write

from i2v.load import load
from i2v.request import Sampler

ROOT = Path(__file__).resolve().parents[2]
FILES = [p for name in ("i2v", "weights_convert", "eval") for p in sorted((ROOT / name).rglob("*.py"))]
FILES += [ROOT / "train.py", ROOT / "sample.py"]
DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "normal", "bernoulli", "multinomial"}
IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_"}
OWN_GENERATORS = {"Generator", "Philox", "PCG64", "SeedSequence", "default_rng"}


def global_draws(source: str) -> list[str]:
    """Calls that read or seed a global generator.

    Initial weights are drawn by constructors, as torch's own layers do: `nn.init` and `nn.Parameter(torch.randn(...))`
    are fine, and so is seeding inside `with torch.random.fork_rng(...)`, which puts the state back.
    """
    found: list[str] = []

    def visit(node: ast.AST, forked: bool) -> None:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "nn.Parameter":
            return
        if isinstance(node, ast.With):
            forked = forked or any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, ast.Import) and any(alias.name == "random" for alias in node.names):
            found.append(f"line {node.lineno}: import random")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = ast.unparse(node.func.value), node.func.attr
            passed = any(keyword.arg == "generator" for keyword in node.keywords)
            drawn = (owner == "torch" and name in DRAWS) or (name in IN_PLACE and not owner.endswith("init"))
            numpy = owner in {"np.random", "numpy.random"} and name not in OWN_GENERATORS
            seeded = owner in {"torch", "torch.random", "torch.cuda"} and name.startswith(("manual_seed", "seed"))
            if (drawn and not passed) or numpy or (seeded and not forked):
                found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
        for child in ast.iter_child_nodes(node):
            visit(child, forked)

    visit(ast.parse(source), False)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_source(path: Path) -> None:
    found = global_draws(path.read_text(encoding="utf-8"))
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "torch.randn(3)",
        "torch.randint(9, (1,))",
        "x.normal_()",
        "np.random.seed(0)",
        "torch.manual_seed(0)",
        "import random",
    ],
)
def test_a_global_draw_is_seen(source: str) -> None:
    assert global_draws(source)


def test_own_generators_are_fine() -> None:
    assert not global_draws("torch.randn(3, generator=g)\nnn.init.normal_(w)\nnp.random.Generator(np.random.Philox(1))")
    assert not global_draws("with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)")


def states() -> tuple[object, ...]:
    """Where the three global generators stand."""
    numpy = pickle.dumps(np.random.get_state())  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), numpy, random.getstate()


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m_sde"])
def test_making_a_video_leaves_the_generators_alone(tmp_path: Path, sampler: Sampler) -> None:
    """Loading and sampling neither read nor move them: the next user draw is the same, and the video too."""
    folder = write(tmp_path)
    image = np.full((64, 64, 3), 100, np.uint8)
    videos = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global generator is what is watched
        random.seed(seed)
        before = states()
        pipe = load("tiny", folder=folder)
        videos.append(pipe(image, "a red ball", steps=2, num_frames=3, sampler=sampler, posterior="sample").frames)
        assert states() == before
    assert np.array_equal(videos[0], videos[1])
