"""Tool calls that are written as Python."""

from __future__ import annotations

import ast


def call_nodes(code: str) -> list[ast.Call]:
    """The calls in Python code that consists of nothing else; `print(...)` around one is ignored."""
    nodes: list[ast.expr] = []
    for statement in ast.parse(code.strip()).body:
        value = statement.value if isinstance(statement, ast.Expr) else None
        if value is None:
            raise ValueError("it is not a call")
        nodes += value.elts if isinstance(value, ast.List) else [value]
    calls = []
    for node in nodes:
        inner = node.args[0] if _is_print(node) else node  # type: ignore[attr-defined]
        if not isinstance(inner, ast.Call):
            raise ValueError("it is not a call")
        calls.append(inner)
    return calls


def _is_print(node: ast.expr) -> bool:
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    return is_call and len(node.args) == 1  # type: ignore[attr-defined]
