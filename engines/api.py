"""What passes between a runner and an engine: requests in, outcomes out.

Plain dataclasses, importable without torch. Everything here is process-neutral, so that an engine may live in the
caller's process or in another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["generate", "score", "embed", "classify"]
FinishReason = Literal["stop", "length", "error", "handover"]
Role = Literal["hybrid", "prefill", "decode"]
"""What an engine does for requests of kind generate. prefill: it computes the prompt, draws the first token, and hands
over unless the request has ended with it. decode: it goes on with what was handed over. hybrid: all of it."""


def bounded(default: Any, **bounds: Any) -> Any:
    """A field with bounds in its metadata: ge, gt, le, lt, choices, power_of_two. Who reads a configuration checks."""
    return field(default=default, metadata=bounds)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when a sequence ends. Names and meanings are those of vLLM and OpenAI.

    Penalties apply to greedy decoding too (`temperature=0`).
    """

    temperature: float = bounded(0.0, ge=0)
    """0 is greedy: always the most probable token. Below 1 sharpens the distribution, above 1 flattens it."""
    top_k: int = bounded(0, ge=0)
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = bounded(1.0, gt=0, le=1)
    """Keep the most probable tokens that together have this probability; 1 keeps all."""
    min_p: float = bounded(0.0, ge=0, le=1)
    """Keep tokens at least this share as probable as the most probable one; 0 keeps all."""
    repetition_penalty: float = bounded(1.0, gt=0)
    """Multiplicative, over prompt and output (CTRL, arXiv 1909.05858); 1 is off."""
    presence_penalty: float = bounded(0.0, ge=-2, le=2)
    """Taken from the logit of each token that the output already has; 0 is off."""
    frequency_penalty: float = bounded(0.0, ge=-2, le=2)
    """Taken from the logit of a token once for each time that the output has it; 0 is off."""
    max_tokens: int | None = bounded(256, ge=1)
    """Longest output in tokens; null: as many as the context holds."""
    min_tokens: int = bounded(0, ge=0)
    """Neither end-of-sequence nor a stop token ends the output before this many tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output, besides the checkpoint's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on after end-of-sequence, up to max_tokens: for measurements of speed."""
    logprobs: int | None = bounded(None, ge=0)
    """null: none. 0: the chosen token's. k: the k most probable tokens' as well, before penalties and temperature."""


@dataclass(slots=True)
class Request:
    """One prompt for the engine. A row with n samples is n requests."""

    request_id: int
    """Unique among the requests that an engine holds; chosen by the caller."""
    kind: Kind
    token_ids: Sequence[int]
    """The prompt; for `score` the prompt followed by the continuation."""
    sampling: SamplingParams | None = None
    """For `generate` only."""
    stream: int = 0
    """64-bit key of this request's random numbers: a hash of (job seed, row identity, sample number)."""
    score_from: int = 0
    """For `score`: log-probabilities are wanted of token_ids[score_from:]; at least 1."""
    adapter: str | None = None
    """One of EngineSettings.adapters; None: the model as it is."""
    begun: Outcome | None = None
    """What an engine that hands over made of it, for the one that goes on."""


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """Why a request has no result. `code` is a short stable word (see docs), `message` a sentence for a person."""

    code: str
    message: str


@dataclass(slots=True)
class TokenLogprobs:
    """Of one generated position: the chosen token's log-probability and those of the most probable tokens."""

    logprob: float
    top_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class HeldKV:
    """Keys and values of a prompt, kept by the engine that has computed them until `Engine.release`."""

    port: int
    key: int
    """Where its ranks give them: engines/parallel/handover.py."""
    blocks: tuple[int, ...]
    """Of its caches, in the order of the text."""
    context_key: int
    """As Model.context_key, at the time."""


@dataclass(slots=True)
class Outcome:
    """What came back for a request; exactly one for each request submitted."""

    request_id: int
    finish_reason: FinishReason
    """handover: not finished; a Request with this outcome as `begun` is for an engine that goes on with it."""
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens, without the end-of-sequence or stop token that ended them."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the sequence; None for end-of-sequence and for length."""
    logprobs: list[TokenLogprobs] | None = None
    values: Sequence[float] | None = None
    """`embed`: the vector; `classify`: one logit a label; `score`: one log-probability a scored token (float32)."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was reused instead of computed."""
    error: ErrorInfo | None = None
    held: HeldKV | None = None
    """For handover."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of an engine, cheap enough to take at every step."""

    num_waiting: int
    num_running: int
    num_free_blocks: int
    num_blocks: int
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int
    """Prompt tokens computed so far (cached ones not counted)."""
    num_cached_tokens: int
    num_output_tokens: int
    notes: tuple[str, ...] = ()
    """How the engine departs from its settings, as where memory ran out; a sentence each, those of this engine's whole
    life."""


@dataclass(frozen=True)
class EngineConfig:
    """Settings that mean the same in every engine. A backend's own settings extend this class in its offers.py."""

    dtype: str = bounded("auto", choices=("auto", "float32", "float16", "bfloat16"))
    """Compute dtype; auto: the checkpoint's, where the device can."""
    max_model_len: int | None = bounded(None, ge=1)
    """Longest prompt + output in tokens; null: the model's own length."""
    max_num_seqs: int = bounded(128, ge=1)
    """Sequences decoded together."""
    max_num_batched_tokens: int = bounded(2048, ge=1)
    """New tokens computed in one step, prefill and decode together; long prompts are split to fit (chunked prefill)."""
    block_size: int = bounded(32, power_of_two=True)
    """Tokens in a block of the KV cache; a power of two."""
    kv_dtype: str = bounded("auto", choices=("auto", "int8", "int4", "fp8"))
    """How the cache holds keys and values; auto: in the compute dtype. int8 and fp8 hold twice as much as bfloat16 in
    the same memory, int4 almost four times as much; results change, with int4 visibly."""
    kv_cache_bytes: int | None = bounded(None, ge=1)
    """Size of the KV cache; null: `kv_memory_fraction` of what is free once the weights are loaded."""
    kv_memory_fraction: float | None = bounded(None, gt=0, le=1)
    """Share of the free memory that the KV cache may take when kv_cache_bytes is null, once the largest step has
    room. null: 0.9 on accelerators, 0.5 on processors, where other programs want memory too."""
    prefix_caching: bool = True
    """Keep the KV of finished prefixes and reuse it for prompts that begin alike."""

    def kv_fraction(self, on_cpu: bool) -> float:
        """kv_memory_fraction, or what null stands for."""
        return self.kv_memory_fraction or (0.5 if on_cpu else 0.9)


@dataclass(frozen=True)
class GPUConfig(EngineConfig):
    """What engines for accelerators have besides."""

    decode_graphs: bool = True
    """Capture decode steps at load and replay them: a step is then one launch. Costs seconds at load, and memory."""


@dataclass(frozen=True)
class EngineSettings:
    """All that is needed to build an engine; what a plan resolves to."""

    backend: str
    model_path: str
    """A local folder with config.json and safetensors files."""
    dtype: str
    """Resolved: float32, float16 or bfloat16."""
    config: EngineConfig
    kind: Kind = "generate"
    device: str = "cpu"
    pooling: str | None = None
    """For `embed`: cls, mean, max or last."""
    normalize: bool = False
    """For `embed`: scale vectors to length 1."""
    eos_token_ids: tuple[int, ...] = ()
    implementation: Literal["native", "transformers"] = "native"
    """Which code runs the layers: this project's decoder, or the fallback through transformers."""
    numerics: Literal["invariant", "fast"] = "invariant"
    """invariant: a request's result does not depend on what else is in the batch."""
    quantization: Literal["int8", "w8a16"] | None = None
    """Plain weights are quantized at load, by engines/formats/<this>.py; None: weights as the checkpoint has them."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapters by name: local folder of each."""
    tp: int = 1
    """Ranks that hold a copy of the model together."""
    ep: int = 1
    """Ranks that a layer's experts are spread over."""
    role: Role = "hybrid"
    launch: Literal["spawn", "srun", "torchrun"] = "spawn"
    """Who starts the other ranks: the first one, or something that has started all of them."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Op -> the library that computes it for prompts, in place of the engine's kernel."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the engine's process has besides its parent's, as for which accelerators it sees."""
    trust_remote_code: bool = False
    """Let transformers run the Python code that the checkpoint brings; for implementation transformers only."""


class CheckpointError(ValueError):
    """A model folder cannot be used: the message names the file or tensor, what was found and what is expected."""


class UnsupportedModelError(ValueError):
    """A sound checkpoint that this code cannot run: the message says what is missing."""


class Engine(Protocol):
    """Continuous batching over one model.

    An outcome always comes back for a submitted request, in success or in error; one bad request never takes the
    others with it.
    """

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output together."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. Never raises for a bad one: its outcome carries the error."""

    def step(self) -> list[Outcome]:
        """Run one iteration and return what finished. Returns [] at once when nothing is queued."""

    @property
    def num_unfinished(self) -> int:
        """Requests submitted whose outcome has not come back."""

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Free the model and the cache. The engine cannot be used afterwards."""


class RoleEngine(Engine, Protocol):
    """One that may do a part of the work only, as EngineSettings.role says."""

    def release(self, request_ids: Sequence[int]) -> None:
        """Nobody wants the keys and values of these requests any more, which were handed over. Ids that hold nothing
        are passed over."""

    def fetched(self) -> list[int]:
        """Requests handed over to this engine whose `begun.held` it needs no more; each is told once."""

    @property
    def stalled(self) -> bool:
        """Whether nothing can be computed until something is released."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One thing a model needs of an op set: an op, and the values of its arguments that an op set may not offer.

    Example: Requirement("paged_attention", {"head_dim": 80, "dtype": "bfloat16", "window": True}).
    """

    op: str
    attributes: dict[str, int | str | bool] = field(default_factory=dict)
    in_decode_step: bool = True
    """False for what runs once a job or once a prompt: a slow op there does not disqualify an engine."""
