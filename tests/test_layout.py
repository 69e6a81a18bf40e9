"""The size of files and functions."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_LONGEST_FILE, _LONGEST_BODY = 300, 40


def _sources() -> list[Path]:
    if not (_ROOT / ".git").exists():
        pytest.skip("needs a clone")
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=_ROOT, capture_output=True, text=True, check=True)
    paths = [_ROOT / name for name in listed.stdout.split()]
    return [path for path in paths if "tests" not in path.relative_to(_ROOT).parts and path.exists()]


def test_files_and_functions_are_short() -> None:
    """Files have at most 300 lines, and functions 40, without signature and docstring."""
    long: list[str] = []
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        name = str(path.relative_to(_ROOT))
        if text.count("\n") > _LONGEST_FILE:
            long.append(f"{name}: {text.count(chr(10))} lines")
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        long += [f"{name}, {n.name}: {_body_lines(n)} lines" for n in nodes if _body_lines(n) > _LONGEST_BODY]
    assert long == []


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(function.body) > 1
    start = function.body[1] if documented else first
    return (function.end_lineno or 0) - start.lineno + 1
