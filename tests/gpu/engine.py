"""An engine with an 8B-shaped Llama of random weights on a device: steps that decode, and a thousand requests, against
the least time that their bytes and operations take and against transformers' own continuous batching.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.api import GPUConfig, Request, SamplingParams
from engines.core.device import Device, Download
from engines.core.engine import LLMEngine
from engines.core.scheduler import Scheduled
from engines.costs import matrix_parameters
from engines.models.decoder import Decoder
from engines.models.spec import DecoderSpec
from engines.ops import OpSet
from tests.gpu import workers
from tests.gpu.timing import LLAMA_8B, SMALL, Ceilings, Timed, decoder

CORE = ("core/*.py", "models/decoder.py", "layers/*.py")
"""What of engines/ decides these figures besides the backend's own files."""


class Watched(Device):
    """Counts the time that the host waits for the device."""

    def __init__(self, place: torch.device) -> None:
        super().__init__(place)
        self.waited_s = 0.0

    def download(self, tensors: Sequence[Tensor]) -> Download:
        return WatchedDownload(super().download(tensors), self)


class WatchedDownload(Download):
    def __init__(self, download: Download, device: Watched) -> None:
        super().__init__([])
        self.download, self.device = download, device

    def wait(self) -> list[Tensor]:
        begin = time.perf_counter()
        found = self.download.wait()
        self.device.waited_s += time.perf_counter() - begin
        return found


@dataclass(frozen=True)
class Decoding:
    """Of one batch size."""

    step: Timed
    host_s: float
    """Time of a step in which the host does something else than waiting for the device."""
    notes: tuple[str, ...]


def opset(backend: str) -> OpSet:
    made: OpSet = importlib.import_module(f"engines.{backend}.opset").OpSet()
    return made


def _shape(device: torch.device) -> DecoderSpec:
    return LLAMA_8B if device.type == "cuda" else SMALL


def make_engine(model: Any, ops: OpSet, device: Device, config: GPUConfig, num_blocks: int) -> LLMEngine:
    engine = LLMEngine(model, ops, config, num_blocks, torch.bfloat16, device)
    engine.capture(4 << 30)
    return engine


def decoder_timer(backend: str, device: str, limits: Ceilings) -> Callable[[int], Decoding]:
    """What times steps of so many sequences."""
    open_for_good = workers.prepared(device)
    ops, place = opset(backend), torch.device(device)
    with torch.inference_mode():
        model = decoder(_shape(place), ops, place, 1024)

    def work(count: int) -> Decoding:
        assert open_for_good
        try:
            return time_decoding(model, ops, place, limits, count)
        except Exception as error:
            raise RuntimeError(workers.unless_lost(device, error)) from error

    return work


def time_decoding(model: Decoder, ops: OpSet, place: torch.device, limits: Ceilings, count: int) -> Decoding:
    """Steps that decode so many sequences, each about 500 tokens long, against the bytes of weights and cache."""
    prompt, steps = (500, 64) if place.type == "cuda" else (5, 3)
    config = GPUConfig(max_model_len=1024, max_num_seqs=count, max_num_batched_tokens=8192, block_size=32)
    device = Watched(place)
    engine = make_engine(model, ops, device, config, count * 32)
    # The first ones decode while the last ones are prompts.
    sampling = SamplingParams(max_tokens=1024 - prompt, ignore_eos=True)
    engine.submit(
        [Request(i, "generate", [(i * 31 + j * 7) % 500 for j in range(prompt)], sampling) for i in range(count)]
    )
    while not _all_decode(engine, count):
        engine.step()
    begin, before, device.waited_s = time.perf_counter(), engine.stats(), 0.0
    for _ in range(steps):
        engine.step()
    seconds = (time.perf_counter() - begin) / steps
    drawn = engine.stats().num_output_tokens - before.num_output_tokens
    assert drawn == steps * count, f"{drawn} tokens in {steps} steps of {count}"
    keys = sum(seq.num_tokens for seq in engine.scheduler.running) - count * steps // 2
    least = _least_s(_shape(place), limits, count, keys, count)
    timed = Timed(f"decode step of 8B, batch {count}", seconds, least / seconds, 0.75)
    notes = engine.stats().notes
    engine.close()
    return Decoding(timed, seconds - device.waited_s / steps, notes)


def _all_decode(engine: LLMEngine, count: int) -> bool:
    """Whether so many sequences have three tokens at least."""
    running = engine.scheduler.running
    return len(running) == count and all(seq.num_output_tokens > 3 for seq in running)


def _least_s(spec: DecoderSpec, limits: Ceilings, num_tokens: int, num_keys: int, num_outputs: int) -> float:
    """Of one step in bfloat16: what it must move, or what it must multiply, whichever takes longer.

    num_keys: Cached tokens that attention reads. Each is counted as met by one query: prompts are counted too low.
    """
    head = spec.vocab_size * spec.hidden_size
    cached = 2 * 2 * spec.num_key_value_heads * spec.head_dim * spec.num_hidden_layers * num_keys
    flops = 2.0 * (matrix_parameters(spec) * num_tokens + head * num_outputs)
    return max((2 * (matrix_parameters(spec) + head) + cached) / limits.bytes_s, flops / limits.flops_s)


def workload(count: int, most: int, vocab: int) -> list[tuple[list[int], int]]:
    """(prompt, length of the output) of so many requests: lognormal lengths around 128 and 64, as in chats."""
    rng = np.random.default_rng(0)

    def lengths(median: float, sigma: float, low: int, high: int) -> list[int]:
        return np.clip(np.exp(rng.normal(np.log(median), sigma, count)), low, high).astype(int).tolist()

    pairs = zip(lengths(128, 1.0, 8, 1024), lengths(64, 0.9, 4, 256), strict=True)
    return [(rng.integers(4, vocab, min(p, most)).tolist(), min(n, most)) for p, n in pairs]


@dataclass(frozen=True)
class Requests:
    """Wall time of requests without load."""

    num_requests: int
    time_s: float
    least_s: float = 0.0
    """Of the steps that were run, each at the device's limits; 0 for the peer."""
    finished: bool = True
    """False: it was stopped at the deadline, and time_s is how long it had had."""


def requests_timer(backend: str, device: str, limits: Ceilings, deadline: float) -> Callable[[str], Requests]:
    """What times the same requests on its own engine ("own"), or on transformers ("peer"), which is stopped at the
    deadline of time.time."""
    open_for_good = workers.prepared(device)
    place = torch.device(device)
    spec = _shape(place)
    asked = workload(1000, 1024, spec.vocab_size) if device != "cpu" else workload(6, 6, spec.vocab_size)

    def work(which: str) -> Requests:
        assert open_for_good
        try:
            if which == "peer":
                time_s, finished = _peer(spec, place, asked, deadline)
                return Requests(len(asked), time_s, finished=finished)
            return Requests(len(asked), *_own(spec, opset(backend), place, limits, asked))
        except Exception as error:
            raise RuntimeError(workers.unless_lost(device, error)) from error

    return work


def _own(
    spec: DecoderSpec, ops: OpSet, place: torch.device, limits: Ceilings, asked: list[tuple[list[int], int]]
) -> tuple[float, float]:
    config = GPUConfig(max_model_len=1280, max_num_seqs=256, max_num_batched_tokens=8192, block_size=32)
    model = decoder(spec, ops, place, 1280)
    engine = make_engine(model, ops, Device(place), config, 256 * 40 if place.type == "cuda" else 64)
    warm = [Request(i, "generate", [5 + i, 6], SamplingParams(max_tokens=4, ignore_eos=True)) for i in range(4)]
    _finish(engine, warm)
    least: list[float] = []
    launch = engine._launch

    def counted(step: list[Scheduled]) -> Any:
        sizes = sum(s.num_new_tokens for s in step), sum(s.end for s in step), sum(s.completes for s in step)
        least.append(_least_s(spec, limits, *sizes))
        return launch(step)

    engine._launch = counted  # type: ignore[method-assign]
    requests = [
        Request(i, "generate", prompt, SamplingParams(max_tokens=n, ignore_eos=True))
        for i, (prompt, n) in enumerate(asked)
    ]
    begin = time.perf_counter()
    _finish(engine, requests)
    seconds = time.perf_counter() - begin
    engine.close()
    return seconds, sum(least)


def _finish(engine: LLMEngine, requests: list[Request]) -> None:
    engine.submit(requests)
    while engine.num_unfinished:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            sampling = requests[outcome.request_id].sampling
            assert sampling is not None and len(outcome.token_ids) == sampling.max_tokens


def _peer(
    spec: DecoderSpec, place: torch.device, asked: list[tuple[list[int], int]], deadline: float
) -> tuple[float, bool]:
    """(seconds, whether all were finished by the deadline) of transformers' continuous batching."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        dtype=torch.bfloat16,
    )
    if place.type == "cuda":
        gc.collect()  # what was run before in this process
        torch.cuda.empty_cache()
    with place, torch.no_grad():
        model = LlamaForCausalLM._from_config(shape, attn_implementation="sdpa", dtype=torch.bfloat16).eval()
    model = model.to(place)
    # Its default for the end of a text is -1 where there is none: outputs are as long as they may be, as ours are.
    manager = model.init_continuous_batching(generation_config=GenerationConfig(do_sample=False, eos_token_id=None))
    manager.start()
    try:
        manager.add_request([5, 6, 7], request_id="warm", max_new_tokens=4)
        left, wrong = _collect(manager, 1, deadline)
        if left:
            raise RuntimeError(f"transformers: its first request was not finished ({wrong or 'no time'})")
        begin = time.perf_counter()
        for i, (prompt, n) in enumerate(asked):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=n)
        left, wrong = _collect(manager, len(asked), deadline)
        seconds = time.perf_counter() - begin
    finally:
        manager.stop(block=True, timeout=10)
    if wrong:
        raise RuntimeError(f"transformers: {wrong}")
    return seconds, left == 0


def _collect(manager: Any, expected: int, deadline: float) -> tuple[int, str]:
    """(requests that did not finish, the first error)."""
    left, wrong = expected, ""
    while left and time.time() < deadline:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                return left, wrong or "its thread ended"
            continue
        if result.is_finished():
            left -= 1
            wrong = wrong or (result.error or "")
    return left, wrong
