"""Docstrings open with a verb or a noun: a reader sees at once what a function does or what a name holds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("python/gemq", "triton_kernels", "benchmarks")
QUESTION = re.compile(r"(what|whether|where|who|whose|whom|how|why|which|when)\b", re.IGNORECASE)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def questions(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield ``(line, name, first line of the docstring)`` for each docstring that opens with a question word."""
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text and QUESTION.match(text):
            yield node.body[0].lineno, getattr(node, "name", "module"), text.splitlines()[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_opens_with_a_question_word(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python files"
    found = [
        f"{path}:{line}: {text}"
        for path, file in ((file.relative_to(ROOT).as_posix(), file) for file in files)
        for line, _, text in questions(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_the_check_finds_modules_classes_methods_and_functions():
    source = '''"""What a module is."""
class A:
    """How it works."""
    def f(self):
        r"""whether it holds."""
async def g():
    """Which one."""
def h():
    """Whichever is first, and Whereas: not question words."""
def i():
    return "Why"
'''
    assert sorted(line for line, *_ in questions(source)) == [1, 3, 5, 7]
