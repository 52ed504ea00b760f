"""The support matrix says what the tree says."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import discover
from runner import support_matrix

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support_matrix.md"


def test_the_page_in_the_tree_is_the_one_that_is_made() -> None:
    assert PAGE.read_text() == support_matrix.render(), "run `python -m runner.docs`"


def test_every_family_has_a_row() -> None:
    text = support_matrix.render()
    for name, module in discover.families().items():
        assert f"| {name} | {', '.join(module.ARCHITECTURES)} |" in text


def test_engines_without_an_op_set_support_nothing() -> None:
    rows = [line for line in support_matrix.render().splitlines() if line.startswith("| llama ")]
    cells = dict(zip(support_matrix.ORDER, [cell.strip() for cell in rows[0].split("|")[3:-1]], strict=True))
    assert cells["cpu"].startswith("tested")
    for engine in ("cuda", "triton"):
        if "opset" not in discover.names(f"engines.{engine}"):
            assert cells[engine] == "-"


def test_evidence_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support_matrix.KIND_EVIDENCE, "sources", "tests/no_such_test.py")
    with pytest.raises(FileNotFoundError, match=r"tests/no_such_test\.py: named as evidence"):
        support_matrix.render()
