"""Each numbered equation of the paper stands in exactly one place, and the README links that place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EQUATIONS = range(1, 8)
TEXT = re.compile(r"Implements Eq\. \((\d+)\)\.")


def places() -> dict[int, list[tuple[str, int]]]:
    """Equation -> [(file, line)] of every `Implements Eq. (n).` in the run-time code."""
    found: dict[int, list[tuple[str, int]]] = {}
    files = [p for name in ("i2v", "weights_convert", "eval") for p in sorted((ROOT / name).rglob("*.py"))]
    for path in [*files, ROOT / "train.py", ROOT / "sample.py"]:
        if path.exists():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                for match in TEXT.finditer(line):
                    found.setdefault(int(match[1]), []).append((path.relative_to(ROOT).as_posix(), number))
    return found


def symbol_at(file: str, line: int) -> str:
    """Dotted name of the innermost function or class around a line."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    names: list[str] = []
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.lineno <= line <= (child.end_lineno or 0):
                names.append(child.name)
                nodes = [child]
                break
            if hasattr(child, "body"):
                nodes.append(child)
    return ".".join(names)


@pytest.mark.parametrize("number", EQUATIONS)
def test_one_place(number: int) -> None:
    assert len(places().get(number, [])) == 1, f"Eq. ({number}) stands at {places().get(number, 'no place')}"


def test_no_other_number() -> None:
    assert set(places()) <= set(EQUATIONS)


@pytest.mark.parametrize("number", EQUATIONS)
def test_readme_links_it(number: int) -> None:
    """The row of Eq. (n) links the file and names the symbol."""
    (file, line), *_ = places()[number]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [row for row in readme if row.startswith(f"| Eq. ({number})")]
    assert len(rows) == 1, f"README has {len(rows)} rows for Eq. ({number})"
    symbol = symbol_at(file, line)
    assert f"]({file})" in rows[0], f"the row of Eq. ({number}) should link {file}"
    assert symbol and f"`{symbol}`" in rows[0], f"the row of Eq. ({number}) should name `{symbol}`"
