"""Every command, link and Python line of the README and the docs is one that works in this tree."""

from __future__ import annotations

import ast
import configparser
import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "weights").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
# Programs that are not ours: their lines are not looked into.
OTHERS = {"apt-get", "cd", "git", "mkdir", "ls"}
OWN_FOLDERS = {"configs", "docs", "examples", "weights", "tests", "bench"}


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(text) if language in languages]


def commands(text: str) -> list[str]:
    """Single commands of the shell blocks: continuations joined, comments cut, `&&` and `;` split."""
    found: list[str] = []
    for body in blocks(text, "bash", "sh", "shell"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            part: list[str] = []
            for word in [*words, "&&"]:
                if word in {"&&", ";", "|"}:
                    if part:
                        found.append(shlex.join(part))
                    part = []
                else:
                    part.append(word)
    return found


@functools.cache
def help_of(*program: str) -> str:
    """What `python program --help` prints."""
    done = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(program)} --help: {done.stderr[-500:]}"
    return done.stdout


def extras() -> set[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return set(setup["options.extras_require"])


def check(command: str) -> None:
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):  # VARIABLE=value in front
        words = words[1:]
    program, rest = words[0], words[1:]
    if program in OTHERS:
        return
    if program == "pip":
        wanted = re.findall(r"\.\[([\w,-]+)\]", " ".join(rest))
        assert not wanted or set(wanted[0].split(",")) <= extras(), f"no such extra: {command}"
        return
    if program == "pytest":
        assert all((ROOT / w.split("::")[0]).exists() for w in rest if w.startswith("tests/")), command
        return
    if program == ".ci/run":
        assert (ROOT / program).stat().st_mode & 0o100
        return
    if program == "torchrun":  # its own flags, then a script as for python
        start = next((i for i, word in enumerate(rest) if word.endswith(".py")), len(rest))
        assert re.fullmatch(r"(--nproc-per-node (\d+|N))?", " ".join(rest[:start])), f"unknown flags: {command}"
        program, rest = "python", rest[start:]
    assert program == "python" and rest, f"unknown program in the docs: {command}"
    if rest[0] == "-m":
        shown, rest = help_of("-m", rest[1], *rest[2:3] if is_subcommand(rest) else ()), rest[2:]
    else:
        assert (ROOT / rest[0]).is_file(), f"no file {rest[0]}: {command}"
        shown, rest = help_of(rest[0]), rest[1:]
    for i, word in enumerate(rest):
        if word.startswith("--"):
            name = word.split("=")[0]
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", shown), f"no flag {name}: {command}"
        elif word.split("/")[0] in OWN_FOLDERS and "/" in word and rest[i - 1] not in {"--out", "--output", "-o"}:
            assert (ROOT / word).exists(), f"no file {word}: {command}"


def is_subcommand(rest: list[str]) -> bool:
    return len(rest) > 2 and not rest[2].startswith("-") and rest[2] in help_of("-m", rest[1])


@pytest.mark.parametrize(
    "page, command",
    [pytest.param(p, c, id=f"{p.name}: {c}"[:90]) for p in PAGES for c in commands(p.read_text("utf-8"))],
)
def test_command(page: Path, command: str) -> None:
    check(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    """Relative links and pictures lead to files of the tree."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    missing = [t for t in targets if not t.startswith(("http", "mailto:")) and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_blocks(page: Path) -> None:
    """They compile, and what they import exists."""
    for body in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


def test_every_flag_is_explained() -> None:
    """docs/sampling.md has each flag of `sample.py --help` in a table, and no other."""
    page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `--")]
    explained = {flag for row in rows for flag in re.findall(r"`(--[\w-]+)`", row)}
    shown = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", help_of("sample.py"), re.M)) - {"--help"}
    assert explained == shown


@pytest.mark.parametrize("mark", ["run", "test"])
def test_marks_of_the_two_commands(mark: str) -> None:
    """`.ci/run` takes these two from the README; each is one line."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(rf"<!-- command: {mark} -->\s*```bash\n(.*?)\n```", text, re.S)
    assert len(found) == 1 and "\n" not in found[0] and found[0].startswith("pip install -e"), found


@pytest.mark.parametrize(
    "command",
    [
        "python sample.py --no-such-flag 1",
        "python no_such_script.py",
        "python sample.py --image examples/no_such_picture.png",
        'pip install -e ".[no-such-extra]"',
        "conda install everything",
        "torchrun --nproc-per-node 8 train.py --no-such-flag",
        "torchrun --nprocs 8 train.py",
    ],
)
def test_a_wrong_command_is_seen(command: str) -> None:
    with pytest.raises(AssertionError):
        check(command)
