"""Threads that wait must not keep the processor from others, unless the user wants that."""

from __future__ import annotations

import pytest

from engines.threads import SPIN_COUNT, limit_spinning


@pytest.mark.parametrize(
    ("given", "expected"),
    (
        ({}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ),
)
def test_what_the_user_has_set_stays(given: dict[str, str], expected: dict[str, str]) -> None:
    limit_spinning(given)
    assert given == expected
