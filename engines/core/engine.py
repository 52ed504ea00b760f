"""The engine: submit, step (admit, schedule, execute, sample, retire), stats. Backends differ by their op set only."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from collections.abc import Sequence as Many
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from engines.api import (
    EngineConfig,
    EngineStats,
    ErrorInfo,
    HeldKV,
    Outcome,
    Request,
    Role,
    SamplingParams,
    TokenLogprobs,
    UnsupportedModelError,
)
from engines.core.block_manager import BlockManager
from engines.core.copies import CopyScheduler
from engines.core.device import Device, let_go, out_of_memory
from engines.core.flight import Flight
from engines.core.graphs import may_capture
from engines.core.model_runner import ModelRunner
from engines.core.pooling import Pooler
from engines.core.sampler import Detokenize, Sampler
from engines.core.scheduler import Scheduled, Scheduler, share
from engines.core.sequence import Sequence
from engines.models.base import Model
from engines.ops import OpSet
from engines.ops.kv_cache import KVDtype
from engines.parallel.group import GroupError
from engines.parallel.leader import KVLink

log = logging.getLogger(__name__)
Watch = Callable[[Many[int]], None]
NO_SAMPLING = SamplingParams(max_tokens=0)
SPARE_SHARE = 32
"""One in so many blocks of a CPU's cache keeps a text that nobody waits for, before one is used that never was."""
UNREAD_PROMPTS = "prompts were computed again, as the engine that had done so did not give their keys and values"
MAX_TRACEBACKS = 10
"""Different failures that are logged with a traceback; every failed request has its message in its outcome."""


class LLMEngine:
    """Continuous batching over one model. Satisfies engines.api.Engine."""

    def __init__(
        self,
        model: Model,
        ops: OpSet,
        config: EngineConfig,
        num_blocks: int,
        dtype: torch.dtype,
        device: Device,
        eos_token_ids: Many[int] = (),
        detokenize: Detokenize | None = None,
        pooling: str | None = None,
        normalize: bool = False,
        watch: Watch = lambda request_ids: None,
        num_copies: int = 1,
    ) -> None:
        """
        Args:
            num_blocks: Size of the KV cache of each copy; not used by models without one.
            num_copies: Copies of the model that compute each step together; of several, `model` is a LeaderModel.
            watch: Called with the requests that are computed next, before they are: what whoever supervises this
                process wants to know when it dies of them.
        """
        self.model = model
        self.max_model_len = min(config.max_model_len or model.max_model_len, model.max_model_len)
        # A model with states of its own would compute on with tokens that end a sequence.
        self.overlaps = device.overlaps and model.paged
        kv_dtype = None if config.kv_dtype == "auto" else cast(KVDtype, config.kv_dtype)
        graphs = config.max_num_seqs if may_capture(model, config, device) else 0
        self.runner = ModelRunner(
            model, ops, num_blocks, config.block_size, dtype, device, kv_dtype, graphs, self.max_model_len
        )
        # A system's memory comes page by page when it is first used, a device's was given as a whole.
        spare = num_blocks // SPARE_SHARE if device.place.type == "cpu" else None
        schedulers = [
            Scheduler(
                BlockManager(num_blocks, spare) if self.runner.paged else None,
                config.block_size,
                config.max_num_seqs,
                config.max_num_batched_tokens,
                self.max_model_len,
                config.prefix_caching,
                chunked=model.num_cache_layers > 0 or not model.paged,
                context_key=model.context_key,
                overlaps=self.overlaps,
            )
            for _ in range(num_copies)
        ]
        self.blocks = schedulers[0].blocks
        """Of one copy of the model."""
        self.scheduler: Scheduler | CopyScheduler = schedulers[0] if num_copies == 1 else CopyScheduler(schedulers)
        self.sampler = Sampler(ops, eos_token_ids, detokenize, device)
        self.pooler = Pooler(model, ops, pooling, normalize)
        self.device = device
        self.notes: list[str] = []
        """How this engine departs from its settings, as in EngineStats."""
        self._watch = watch
        self._ids = itertools.count()
        self._flight: Flight | None = None
        """The step that the device is computing."""
        self._ready: list[Outcome] = []
        """Outcomes of requests that were refused at submit."""
        self._num_unfinished = 0
        self._link: KVLink | None = None
        self._held: Callable[[tuple[int, ...], int], HeldKV] | None = None
        """Of an engine that hands over: where blocks of a context key are to be had."""
        self.stalled = False
        self._seen_failures: set[str] = set()
        self._num_steps = self._num_prompt = self._num_cached = self._num_output = 0

    @property
    def num_unfinished(self) -> int:
        return self._num_unfinished

    def submit(self, requests: Many[Request]) -> None:
        accepted = []
        for request in requests:
            self._num_unfinished += 1
            error = self._refusal(request)
            if error:
                self._ready.append(Outcome(request.request_id, "error", error=error))
            else:
                accepted.append(self._sequence(request))
        self.scheduler.add(accepted)

    def _refusal(self, request: Request) -> ErrorInfo | None:
        """Why a request cannot be run at all."""
        count = len(request.token_ids)
        if not count:
            return ErrorInfo("empty_prompt", "the prompt has no tokens; expected at least one")
        room = self.max_model_len - (1 if request.kind == "generate" else 0)
        if count > room:
            return ErrorInfo("too_long", f"the prompt has {count} tokens; the model takes at most {room}")
        if self.blocks is not None:
            held = self.blocks.num_blocks * self.scheduler.block_size
            if count + 1 > held:
                return ErrorInfo(
                    "too_long",
                    f"the prompt has {count} tokens; the KV cache holds {held}; raise backend_config.kv_cache_bytes",
                )
        if request.adapter is not None and request.adapter not in self.model.adapters:
            known = ", ".join(self.model.adapters) or "none"
            return ErrorInfo("unknown_adapter", f"there is no adapter {request.adapter!r}; the job has {known}")
        if min(request.token_ids) < 0 or max(request.token_ids) >= self.model.vocab_size:
            return ErrorInfo("bad_token", f"a token id is outside the vocabulary of {self.model.vocab_size}")
        if request.kind == "score" and not 1 <= request.score_from < count:
            return ErrorInfo("empty_prompt", "nothing to score: the continuation or what precedes it has no tokens")
        return None

    def take_role(self, role: Role, link: KVLink) -> None:
        """Do a part of the work only; before the first step.

        Raises UnsupportedModelError for a model whose states cannot be handed over.
        """
        if role == "hybrid":
            return
        if not self.runner.paged:
            raise UnsupportedModelError(
                "parallelism.prefill: above 0 with a model that keeps no blocks of keys and values; expected 0, as "
                "there is nothing that engines could hand over; remove it"
            )
        self._link = link
        if role == "prefill":
            self._held = partial(HeldKV, *link.serve())
        else:
            self.scheduler.read = link.read

    def release(self, request_ids: Many[int]) -> None:
        self.scheduler.release(request_ids)
        self.stalled = False

    def fetched(self) -> list[int]:
        found, self.scheduler.fetched = self.scheduler.fetched, []
        return found

    def _sequence(self, request: Request) -> Sequence:
        token_ids = list(request.token_ids)
        sampling = request.sampling if request.kind == "generate" and request.sampling else NO_SAMPLING
        most = self.max_model_len if sampling.max_tokens is None else len(token_ids) + sampling.max_tokens
        seq = Sequence(
            seq_id=next(self._ids),
            request=request,
            sampling=sampling,
            max_num_tokens=min(most, self.max_model_len),
            reusable_tokens=self.pooler.reusable_tokens(request.kind, len(token_ids), request.score_from),
            token_ids=token_ids,
            adapter_id=self.model.adapters.index(request.adapter) if request.adapter is not None else -1,
            num_prompt_tokens=len(token_ids),
            hands_over=self._held is not None and request.kind == "generate",
        )
        if request.begun is not None:
            seq.token_ids += request.begun.token_ids
            seq.logprobs += request.begun.logprobs or []
            seq.held, seq.num_cached_tokens, seq.admissions = request.begun.held, request.begun.num_cached_tokens, 1
        return seq

    @torch.inference_mode()
    def step(self) -> list[Outcome]:
        """With a device that overlaps, the outcomes are of the step before: a step is launched, then the one before it
        is read, so that the device always has something to do. A sequence that ends is computed once more in vain."""
        outcomes, self._ready = self._ready, []
        self.stalled = False
        if self._flight is not None and self.scheduler.needs_tokens():
            outcomes += self._land()
        step = self.scheduler.schedule()
        if step:
            outcomes += self._run(step)
        elif self._flight is not None:
            outcomes += self._land()
        elif self.scheduler.held:
            self.stalled = bool(self.scheduler.waiting)  # there may be room once that is released
        elif self.scheduler.waiting:
            outcomes.append(self._give_up(self.scheduler.give_up()))
        self._num_unfinished -= len(outcomes)
        return outcomes

    def _give_up(self, seq: Sequence) -> Outcome:
        """Nothing runs and the first in the queue still finds no room: it never will."""
        message = (
            f"{seq.num_tokens} tokens do not fit into the KV cache of {self.scheduler.block_size} * "
            f"{self.blocks.num_blocks if self.blocks else 0} tokens; raise backend_config.kv_cache_bytes"
        )
        return self._outcome(seq, "error", error=ErrorInfo("kv_cache_full", message))

    def _run(self, step: list[Scheduled]) -> list[Outcome]:
        """Launch a step and read the one before, or this one where nothing overlaps; if it raises, halve it until the
        sequence that raises is alone.

        Raises what the step did where the device or another rank is lost: nothing more can be computed in this process.
        """
        failure: Exception | None = None
        try:
            flight = self._launch(step)
        except Exception as error:
            failure = let_go(error)
        if failure is not None:
            # Out of the handler, so that the failures of the halves are not chained to this one.
            if isinstance(failure, GroupError) or self.device.lost():
                raise failure
            outcomes = self._land()
            return outcomes + self._after_failure([s for s in step if s.seq.slot >= 0], failure)
        outcomes = self._land()
        self._depart(flight)
        if not self.overlaps:
            outcomes += self._land()
        return outcomes

    def _after_failure(self, step: list[Scheduled], error: Exception) -> list[Outcome]:
        """Nothing is in flight."""
        for s in step:
            s.seq.counts = None
        if not self.model.paged:
            # The models' own states may have advanced: compute again from the first token.
            for s in step:
                self.model.release(s.seq.seq_id)
        if out_of_memory(error) and self.scheduler.shrink():
            self.notes.append(
                f"memory ran out in a step: going on with max_num_batched_tokens="
                f"{self.scheduler.max_num_batched_tokens}, max_num_seqs={self.scheduler.max_num_seqs}"
            )
            self.device.empty_cache()
            return []
        if len(step) <= 1:
            return [self._fail(s.seq, error) for s in step]
        if not self.model.paged:
            for s in step:
                s.seq.num_computed_tokens = 0
            step = [share(s.seq, s.end) for s in step]
        middle = len(step) // 2
        return self._run(step[:middle]) + self._run(step[middle:])

    def _launch(self, step: list[Scheduled]) -> Flight:
        """Give a step to the device. Changes no sequence but for its counts: until here a step can be done again."""
        before = self._flight.step if self._flight is not None else []
        self._watch([s.seq.request.request_id for s in (*before, *step)])
        unread = self._flight.draw.tokens if self._flight is not None and self._flight.draw is not None else None
        flight = Flight(step, [i for i, s in enumerate(step) if s.seq.request.kind == "generate" and s.completes])
        logits = self.runner.decode(step, self.scheduler.block_tables, unread)
        if logits is None:
            logits = self._compute(flight, unread)
        if logits is not None:
            flight.draw = self.sampler.draw(logits, [step[i].seq for i in flight.drawing])
        flight.download = self.device.download(flight.tensors())
        return flight

    def _compute(self, flight: Flight, unread: Tensor | None) -> Tensor | None:
        """Logits of the sequences that a token is drawn for, if there are any; results other than text go to the
        flight."""
        step = flight.step
        wanted = [self.pooler.wanted(s) for s in step]
        indices: list[int] = []
        offset = 0
        for s, positions in zip(step, wanted, strict=True):
            base = offset - s.start
            indices += range(base + positions.start, base + positions.stop)
            offset += s.num_new_tokens
        outputs = None if len(indices) == offset else indices
        hidden = self.runner.execute(step, outputs, self.scheduler.block_tables, unread)
        starts = list(itertools.accumulate((len(p) for p in wanted), initial=0))
        for i, s in enumerate(step):
            if s.seq.request.kind != "generate":
                self._pool(flight, s, wanted[i], hidden[starts[i] : starts[i + 1]])
        if not flight.drawing:
            return None
        if len(flight.drawing) < len(indices):
            hidden = hidden[self.device.upload([np.array([starts[i] for i in flight.drawing])])[0]]
        return self.model.logits(hidden)

    def _pool(self, flight: Flight, s: Scheduled, positions: range, hidden: Tensor) -> None:
        """Results other than text."""
        if s.seq.request.kind == "score":
            if positions:
                following = s.seq.token_ids[positions.start + 1 : positions.stop + 1]
                targets = self.device.upload([np.array(following, dtype=np.int64)])[0]
                flight.add_values(s, self.pooler.log_probabilities(s.seq, positions, hidden, targets))
            return
        pooled = self.pooler.pooled(s.seq, hidden)
        flight.pooled[s.seq.seq_id] = pooled
        if s.completes:
            assert pooled is not None
            flight.add_values(s, [self.pooler.result(s.seq, pooled)])

    def _depart(self, flight: Flight) -> None:
        """The step is under way: count its tokens."""
        rows = {i: row for row, i in enumerate(flight.drawing)}
        for i, s in enumerate(flight.step):
            if s.seq.slot < 0:
                continue  # ended by a token that was read since the launch
            if s.seq.num_output_tokens == 0:
                self._num_prompt += s.num_new_tokens
            self.scheduler.depart(s, rows.get(i, -1))
            s.seq.pooled = flight.pooled.get(s.seq.seq_id, s.seq.pooled)
        self._flight = flight

    def _land(self) -> list[Outcome]:
        """Wait for the step in flight, if there is one, and read what came of it: outcomes of what has ended."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        self._num_steps += 1
        tokens, values = flight.read()
        outcomes = []
        for i, s in enumerate(flight.step):
            if s.seq.slot < 0:
                continue
            outcome = self._settle(s, *tokens.get(i, (None, None)), values.get(s.seq.seq_id, []))
            if outcome is not None:
                outcomes.append(outcome)
        return outcomes

    def _settle(
        self, step: Scheduled, token: int | None, logprobs: TokenLogprobs | None, values: list[float]
    ) -> Outcome | None:
        """Add what was computed for a sequence; its outcome if it has ended.

        token: The drawn one; None where its logits were not numbers.
        """
        seq = step.seq
        self.scheduler.land(step)
        seq.values += values
        if not step.completes:
            return None
        if seq.request.kind != "generate":
            if not all(map(math.isfinite, seq.values)):
                return self._retire(seq, "error", error=_not_numbers())
            return self._retire(seq, "stop", values=seq.values)
        if token is None:
            return self._retire(seq, "error", error=_not_numbers())
        try:
            end = self.sampler.append(seq, token, logprobs)
        except Exception as error:
            return self._fail(seq, error)
        if end is None:
            return self._hand_over(seq, self._held) if seq.hands_over and self._held is not None else None
        return self._retire(seq, end[0], stop_reason=end[1])

    def _hand_over(self, seq: Sequence, held: Callable[[tuple[int, ...], int], HeldKV]) -> Outcome:
        self.model.release(seq.seq_id)
        return Outcome(
            seq.request.request_id,
            "handover",
            token_ids=seq.token_ids[seq.num_prompt_tokens :],
            logprobs=seq.logprobs,
            num_prompt_tokens=seq.num_prompt_tokens,
            num_cached_tokens=seq.num_cached_tokens,
            held=held(tuple(self.scheduler.hand_over(seq)), seq.context_key),
        )

    def _fail(self, seq: Sequence, error: Exception) -> Outcome:
        """The outcome of a request that raises by itself."""
        text = f"{type(error).__name__}: {error}"
        if text not in self._seen_failures and len(self._seen_failures) < MAX_TRACEBACKS:
            self._seen_failures.add(text)
            log.error("request %d failed", seq.request.request_id, exc_info=error)
        return self._retire(seq, "error", error=ErrorInfo("engine_error", text))

    def _retire(self, seq: Sequence, reason: str, **fields: object) -> Outcome:
        self.scheduler.remove(seq)
        self.model.release(seq.seq_id)
        return self._outcome(seq, reason, **fields)

    def _outcome(self, seq: Sequence, reason: str, **fields: object) -> Outcome:
        self._num_output += seq.num_output_tokens
        self._num_cached += seq.num_cached_tokens
        failed = reason == "error"
        return Outcome(
            seq.request.request_id,
            reason,  # type: ignore[arg-type]
            token_ids=[] if failed else seq.token_ids[seq.num_prompt_tokens :],
            logprobs=seq.logprobs if seq.sampling.logprobs is not None and not failed else None,
            num_prompt_tokens=seq.num_prompt_tokens,
            num_cached_tokens=seq.num_cached_tokens,
            **fields,  # type: ignore[arg-type]
        )

    @torch.inference_mode()
    def capture(self, budget_bytes: int) -> None:
        """Capture decode steps as graphs, in so much memory; notes say what came of it. Before the first step."""
        if self.runner.graphs is None:
            return
        note = self.runner.graphs.capture(budget_bytes)
        if note is not None:
            self.notes.append(note)
        self.scheduler.patient = bool(self.runner.graphs.sizes)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=len(self.scheduler.waiting),
            num_running=len(self.scheduler.running),
            num_free_blocks=self.scheduler.num_free_blocks,
            num_blocks=self.scheduler.num_blocks,
            num_steps=self._num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt,
            num_cached_tokens=self._num_cached,
            num_output_tokens=self._num_output + sum(map(_read_tokens, self.scheduler.running)),
            notes=(*self.notes, UNREAD_PROMPTS) if self.scheduler.num_unread else tuple(self.notes),
        )

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
        self._flight = self.runner.graphs = None
        self.runner.caches.clear()
        self.model.close()
        del self.model, self.runner.model

    def check_integrity(self) -> None:
        """Raises AssertionError unless all books agree."""
        self.scheduler.check_integrity()


def _not_numbers() -> ErrorInfo:
    return ErrorInfo("nan_logits", "the model's output is not a number; try dtype float32, or check the weights")


def _read_tokens(seq: Sequence) -> int:
    return seq.num_output_tokens - (seq.unread_row >= 0)
