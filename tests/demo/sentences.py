"""Real English sentences that every machine with Python has: the docstrings of the standard library."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def docstrings() -> Iterator[str]:
    """Of the modules, classes and functions of the standard library's top folder, in the order of file names."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def sentences(num: int) -> list[str]:
    """Different sentences of at least four words, and now and then a whole paragraph."""
    found: dict[str, None] = {}
    for docstring in docstrings():
        for number, paragraph in enumerate(re.split(r"\n\s*\n", docstring)):
            text = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text) if number % 4 else [text]:
                if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 4:
                    found.setdefault(sentence)
                if len(found) == num:
                    return list(found)
    raise AssertionError(f"the standard library has {len(found)} sentences; expected at least {num}")
