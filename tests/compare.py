"""How results are compared: error against torch's own in the same dtype, or bit by bit. Failures name coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 2**-22
"""Two units of float32's last place at 1: what another order of sums, or no fused multiply-add, may differ by."""


def assert_as_exact(found: Tensor, exact: Tensor, plain: Tensor) -> None:
    """At most twice the error of the plain form in the same dtype, NaN where the exact result has NaN.

    exact: the reference on the same inputs in float64; plain: the reference in the dtype of the inputs. Integers must
    be equal.
    """
    assert found.dtype == plain.dtype, f"dtype: {found.dtype}; expected {plain.dtype}"
    assert found.shape == exact.shape, f"shape: {list(found.shape)}; expected {list(exact.shape)}"
    if not found.dtype.is_floating_point:
        return assert_bitwise_equal(found, exact)
    _same(found.isnan(), exact.isnan(), "NaN")
    _same(found.isinf(), exact.isinf(), "infinity")
    finite = exact.isfinite()
    if not finite.any():
        return None
    error = torch.where(finite, (found.double() - exact).abs(), 0.0)
    own = torch.where(finite & plain.isfinite(), (plain.double() - exact).abs(), 0.0)
    allowed = 2 * own.max().item() + FLOOR * max(1.0, exact[finite].abs().max().item())
    worst = _coordinates(error == error.max())
    assert error.max().item() <= allowed, (
        f"{worst}: {found[worst].item()} is {error.max().item():.3g} off; expected {exact[worst].item()} within "
        f"{allowed:.3g}, twice torch's own error"
    )
    return None


def assert_bitwise_equal(found: Tensor, expected: Tensor) -> None:
    """The same shape, dtype and bits; NaN equals NaN."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    differs = found != expected
    if found.dtype.is_floating_point:
        differs &= ~(found.isnan() & expected.isnan())
    if differs.any():
        first = _coordinates(differs)
        raise AssertionError(
            f"{int(differs.sum())} of {differs.numel()} values differ, first at {first}: {found[first].item()!r}; "
            f"expected {expected[first].item()!r}"
        )


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(found, expected):
        raise AssertionError(f"{what} at {_coordinates(found != expected)}; found {found.sum()}, not {expected.sum()}")


def _coordinates(mask: Tensor) -> tuple[int, ...]:
    return tuple(torch.nonzero(mask)[0].tolist())
