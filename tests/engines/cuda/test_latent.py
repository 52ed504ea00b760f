"""Multi-head latent attention: the emulated kernel against the reference in float64, at the published sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.cuda.opset import OpSet
from engines.ops import OpSet as Reference
from engines.ops.kv_cache import LatentCache
from tests.attention_cases import Case, Inputs, make
from tests.compare import assert_as_exact, assert_bitwise_equal
from tests.engines.cuda.test_opset import part

RANK, SIZE, SCALE = 512, 576, 0.05


def given(lens: tuple[int, ...], new: tuple[int, ...], heads: int, dtype: torch.dtype) -> tuple[Inputs, LatentCache]:
    case = Case("latent", lens=lens, new=new, num_heads=heads, num_kv_heads=1, head_dim=SIZE, block_size=16)
    made = make(case, dtype)
    return made, LatentCache(made.cache.k[:, 0].contiguous(), RANK)


def exact(made: Inputs, cache: LatentCache) -> Tensor:
    return Reference().latent_attention(made.q.double(), LatentCache(cache.data.double(), RANK), made.batch, SCALE)


@pytest.mark.parametrize(
    ("lens", "new", "heads", "dtype"),
    (
        ((40, 1030, 1), (1, 1, 1), 5, torch.bfloat16),
        ((33, 70), (1, 9), 20, torch.float16),
        ((70,), (1,), 67, torch.bfloat16),
        ((40, 3), (0, 3), 3, torch.bfloat16),
    ),
    ids=("splits", "pieces of prompt", "two tiles of rows", "fewer rows than a tile"),
)
def test_as_exact_as_the_reference(
    ops: OpSet, lens: tuple[int, ...], new: tuple[int, ...], heads: int, dtype: torch.dtype
) -> None:
    made, cache = given(lens, new, heads, dtype)
    found = ops.latent_attention(made.q, cache, made.batch, SCALE)
    plain = Reference().latent_attention(made.q, cache, made.batch, SCALE)
    assert_as_exact(found, exact(made, cache), plain)
    assert not ops._counters(torch.device("cpu")).any()


def test_a_row_has_the_same_bits_in_tiles_of_any_size(ops: OpSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a longer piece of prompt blocks have 64 rows, alone 16; in another order of threads, with late copies."""
    made, cache = given((75, 40), (1, 10), 8, torch.bfloat16)
    together = ops.latent_attention(made.q, cache, made.batch, SCALE)
    monkeypatch.setenv("EMULATOR_ORDER", "warp:1")
    monkeypatch.setenv("EMULATOR_COPIES", "early")
    alone = ops.latent_attention(made.q[:1], cache, part(made, 0, 75, 1), SCALE)  # type: ignore[arg-type]
    assert_bitwise_equal(alone, together[:1])


def test_padding_is_not_stored(ops: OpSet) -> None:
    cache = LatentCache(torch.zeros(2, 4, SIZE, dtype=torch.bfloat16), RANK)
    latent = torch.ones(3, SIZE, dtype=torch.bfloat16)
    ops.write_latent(latent, cache, torch.tensor([-1, 8, 3]))
    assert int((cache.data != 0).any(-1).sum()) == 1


def test_sizes_that_were_not_compiled_are_named(ops: OpSet) -> None:
    made, _ = given((5,), (1,), 2, torch.bfloat16)
    cache = LatentCache(made.cache.k[:, 0].contiguous(), 448)
    with pytest.raises(RuntimeError, match="a latent of 448 and a rotated key of 128; expected 512 and 64"):
        ops.latent_attention(made.q, cache, made.batch, SCALE)
