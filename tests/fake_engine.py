"""An engine that answers at once, for tests of the runner: what it gives depends on the request alone."""

from __future__ import annotations

import time
import zlib
from array import array
from collections.abc import Callable, Sequence

from engines.api import EngineStats, ErrorInfo, Outcome, Request

VOCABULARY = 94
"""Ids that outputs are made of: the printable ASCII characters of `small_job.write_tokenizer`."""


def output_ids(request: Request) -> list[int]:
    """The output of a request: a function of its prompt and its random stream."""
    assert request.sampling is not None
    value = zlib.crc32(array("q", [*request.token_ids, request.stream & 0xFFFF_FFFF]).tobytes())
    length = min(1 + value % 8, request.sampling.max_tokens or 8)
    return [(value >> shift) % VOCABULARY for shift in range(length)]


class FakeEngine:
    """Satisfies engines.api.RoleEngine. Finishes requests in another order than they came in.

    Args:
        per_step: Requests that a step finishes.
        step_s: What a step takes.
        fail: Gives the error of a request that is to fail.
        crash_at: Number of the step that raises RuntimeError.
    """

    max_model_len = 4096
    stalled = False

    def __init__(
        self,
        per_step: int = 1 << 30,
        step_s: float = 0.0,
        fail: Callable[[Request], ErrorInfo | None] = lambda request: None,
        crash_at: int | None = None,
    ) -> None:
        self.num_requests = 0
        """Submitted so far."""
        self.closed = False
        self.on_step: Callable[[], None] = lambda: None
        self._per_step = per_step
        self._step_s = step_s
        self._fail = fail
        self._crash_at = crash_at
        self._queue: list[Request] = []
        self._num_steps = self._num_prompt_tokens = self._num_output_tokens = 0

    def submit(self, requests: Sequence[Request]) -> None:
        self.num_requests += len(requests)
        self._queue.extend(requests)

    def step(self) -> list[Outcome]:
        if self._num_steps == self._crash_at:
            raise RuntimeError("the device is gone")
        self._num_steps += 1
        self.on_step()
        if self._step_s:
            time.sleep(self._step_s)
        finished = self._queue[-self._per_step :][::-1]
        del self._queue[-self._per_step :]
        return [self._outcome(request) for request in finished]

    def release(self, request_ids: Sequence[int]) -> None:
        raise AssertionError("nothing was handed over")

    def fetched(self) -> list[int]:
        return []

    def _outcome(self, request: Request) -> Outcome:
        error = self._fail(request)
        if error is not None:
            return Outcome(request.request_id, "error", error=error)
        ids = output_ids(request)
        self._num_prompt_tokens += len(request.token_ids)
        self._num_output_tokens += len(ids)
        return Outcome(request.request_id, "length", ids, num_prompt_tokens=len(request.token_ids))

    @property
    def num_unfinished(self) -> int:
        return len(self._queue)

    def stats(self) -> EngineStats:
        waiting = len(self._queue)
        return EngineStats(waiting, 0, 1, 1, self._num_steps, 0, self._num_prompt_tokens, 0, self._num_output_tokens)

    def close(self) -> None:
        self.closed = True
