"""What every file keeps to: one subject, a first line that says what it is, nothing that hides a fault."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = 400


def tracked(pattern: str) -> list[Path]:
    """Files that git knows or would add; in an unpacked archive without git, all of them."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", pattern],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        )
        return sorted(p for line in listed.stdout.split("\n") if line and (p := ROOT / line).is_file())
    except (OSError, subprocess.CalledProcessError):
        return sorted(ROOT.rglob(pattern))


PYTHON = tracked("*.py")
TEXT = [p for pattern in ("*.py", "*.md", "*.cfg", "*.toml") for p in tracked(pattern)]
RUNTIME = [p for p in PYTHON if p.relative_to(ROOT).parts[0] not in {"tests", "docs"}]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def faults(source: str) -> list[str]:
    """Constructs that hide a fault, as "line n: what"."""
    found: list[str] = []

    def report(node: ast.AST, what: str) -> None:
        found.append(f"line {getattr(node, 'lineno', 0)}: {what}")

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
            if caught & {"Exception", "BaseException", "everything"} and not reraises(node):
                report(node, f"catches {', '.join(sorted(caught))}")
        if isinstance(node, ast.Call):
            words = {k.arg: k.value for k in node.keywords}
            strict = words.get("strict")
            called = ast.unparse(node.func)
            if isinstance(strict, ast.Constant) and strict.value is False and called != "zip":
                report(node, "strict=False")
            safe = words.get("weights_only")
            if called == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
                report(node, "torch.load without weights_only=True")
    return found


def reraises(handler: ast.ExceptHandler) -> bool:
    """Cleaning up and passing the error on hides nothing."""
    return any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(handler))


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_size_and_first_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES, f"{name(path)} has more than {LINES} lines: split it by subject"
    assert path.name not in {"utils.py", "helpers.py", "misc.py", "common.py"}, f"{name(path)}: name the subject"
    doc = ast.get_docstring(ast.parse(text))
    first = text.split("\n")[1 if text.startswith("#!") else 0]
    assert doc and first.lstrip("r").startswith('"""'), f"{name(path)}: the first line says what the file is"


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_nothing_hides_a_fault(path: Path) -> None:
    found = faults(path.read_text(encoding="utf-8"))
    assert not found, name(path)


@pytest.mark.parametrize("path", TEXT, ids=name)
def test_no_machine_paths(path: Path) -> None:
    """A path of one machine runs nowhere else."""
    inside = r"(?<![\w./-])/(?:work|home|root|Users|opt|mnt)/\w"
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if re.search(inside, line)]
    assert not [line for line in lines if "(?<!" not in line], name(path)


@pytest.mark.parametrize("path", RUNTIME, ids=name)
def test_no_assert_and_no_environment(path: Path) -> None:
    """Library code raises named errors, and no environment variable changes results."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [f"line {n.lineno}: assert" for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    reads = {"os.environ.get", "os.getenv"}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    found += [f"line {n.lineno}: {ast.unparse(n)}" for n in calls if ast.unparse(n.func) in reads]
    assert not found, name(path)


@pytest.mark.parametrize("path", [p for p in RUNTIME if name(p).startswith("i2v/models/")], ids=name)
def test_no_device_literal_in_models(path: Path) -> None:
    """Models make tensors on their input's device."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert not [n.lineno for n in nodes if isinstance(n, ast.Constant) and n.value in {"cuda", "mps"}], name(path)


@pytest.mark.parametrize(
    "source",
    [
        "m.load_state_dict(x, strict=False)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept (OSError, BaseException) as e:\n    pass",
    ],
)
def test_a_fault_is_seen(source: str) -> None:
    assert faults(source)


def test_clean_up_is_no_fault() -> None:
    assert not faults("try:\n    f()\nexcept BaseException:\n    g()\n    raise")
    assert not faults("torch.load(f, weights_only=True)\nzip(a, b, strict=False)")


def test_no_tracked_file_over_five_mebibytes() -> None:
    heavy = [name(p) for p in tracked("*") if p.stat().st_size > 5 * 2**20]
    assert not [p for p in heavy if not p.startswith("weights/")], heavy


LIMITS = [("tiny", 16_000_000), ("tiny-lora", 1_000_000), ("tiny-control", 6_000_000),
          ("tiny-level-2", 16_000_000), ("tiny-level-3", 16_000_000)]  # fmt: skip


@pytest.mark.parametrize(("folder", "limit"), LIMITS)
def test_the_shipped_weights_fit(folder: str, limit: int) -> None:
    """The miniature and its additions travel with every clone."""
    total = sum(p.stat().st_size for p in tracked(f"weights/{folder}/*"))
    assert 0 < total <= limit, f"weights/{folder} holds {total:,} bytes"
