"""What a leader tells its followers: batches and commands arrive as they were, and every kind of request runs."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.api import Request
from engines.batch import Batch, PrefixGroup
from engines.core.engine import LLMEngine
from engines.load import load_engine
from engines.parallel.group import FIRST, GroupError
from engines.parallel.leader import batch_of, numbers_of, payload_of, payload_sizes
from engines.parallel.place import Place
from tests.parallel import cases


def batch(**changes: Any) -> Batch:
    whole = Batch(
        token_ids=torch.tensor([5, 6, 7, 8]),
        positions=torch.tensor([0, 1, 2, 9]),
        cu_seqlens_q=torch.tensor([0, 3, 4], dtype=torch.int32),
        seq_lens=torch.tensor([3, 10], dtype=torch.int32),
        max_seqlen_q=3,
        max_seqlen_k=10,
        slot_mapping=torch.tensor([16, 17, 18, 1 << 40]),
        block_tables=torch.tensor([[2, -1], [0, 1]], dtype=torch.int32),
        output_indices=torch.tensor([2, 3]),
        prefix_groups=(PrefixGroup(torch.tensor([0, 1], dtype=torch.int32), 7),),
        adapter_ids=torch.tensor([-1, -1, -1, 3]),
        context_keys=torch.tensor([0, 4096]),
    )
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output_indices": None},
        {"output_indices": torch.tensor([], dtype=torch.int64)},
        {"prefix_groups": (), "adapter_ids": None, "context_keys": None},
        {"prefix_groups": tuple(PrefixGroup(torch.tensor([i, 1], dtype=torch.int32), i) for i in range(40))},
    ],
)
def test_a_batch_arrives_as_it_was(changes: dict[str, Any]) -> None:
    sent = batch(**changes)
    numbers, payload = numbers_of(sent), payload_of(sent)
    assert sum(payload_sizes(numbers)) == len(payload)
    found = batch_of(numbers, payload)
    for field in dataclasses.fields(Batch):
        one, other = getattr(found, field.name), getattr(sent, field.name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), field.name
        elif field.name == "prefix_groups":
            assert [(g.seqs.tolist(), g.num_blocks) for g in one] == [(g.seqs.tolist(), g.num_blocks) for g in other]
        else:
            assert one == other, field.name


@pytest.mark.parametrize("count", [0, 1, FIRST - 1, FIRST, 3 * FIRST])
def test_a_command_of_any_length(count: int) -> None:
    threads = cases.Threads(2)
    leader, follower = (cases.ThreadGroup(Place(rank, 2), threads) for rank in range(2))
    heard: list[list[int]] = []
    thread = threading.Thread(target=lambda: heard.append(follower.obey()))
    thread.start()
    leader.command(range(count))
    thread.join(60)
    assert heard == [list(range(count))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make("gqa", tmp_path_factory.mktemp("gqa"))


@pytest.mark.parametrize(("kind", "pooling"), [("score", None), ("embed", "mean"), ("embed", "last")])
def test_results_other_than_text(kind: Any, pooling: str | None, folder: Path) -> None:
    def values(tp: int) -> list[torch.Tensor]:
        with cases.threaded(cases.settings(folder, tp, kind=kind, pooling=pooling)) as engine:
            engine.submit(
                [Request(i, kind, list(p), score_from=1) for i, p in enumerate(cases.PROMPTS[:4]) if len(p) > 1]
            )
            return _values(engine)

    for found, expected in zip(values(2), values(1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def _values(engine: LLMEngine) -> list[torch.Tensor]:
    outcomes = {}
    while engine.num_unfinished:
        outcomes |= {outcome.request_id: torch.tensor(outcome.values) for outcome in engine.step()}
    return [outcomes[i] for i in sorted(outcomes)]


def test_what_fails_on_one_rank_is_not_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are in the middle of the step: no halves, no error of single requests."""
    with cases.threaded(cases.settings(folder)) as engine:
        engine.submit(cases.requests())
        monkeypatch.setattr(engine.runner.model, "forward", _lose)
        with pytest.raises(GroupError, match="gone"):
            engine.step()


def _lose(*arguments: object) -> torch.Tensor:
    raise GroupError("a rank has gone")


def test_a_group_of_one_is_no_group(folder: Path) -> None:
    engine = load_engine(cases.settings(folder))
    assert type(engine.model).__name__ == "Decoder"
    engine.close()
