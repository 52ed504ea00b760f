"""Every causal model without a family here, through its class in transformers.

Where the class calls transformers' attention interface, its attention goes to the op set and the paged cache, and a
ragged batch is one forward pass. Where it does not (state-space layers, attention of its own kind), the model keeps its
own cache, one for each sequence, and sequences are computed one after another.

Which of the two is asked of the class and then tried on a few tokens: a model is routed only when that gives the same
hidden states as its own attention.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from engines.api import CheckpointError, EngineSettings, UnsupportedModelError
from engines.batch import Batch
from engines.checkpoint import Checkpoint
from engines.models.spec import ModelSpec
from engines.ops import OpSet
from engines.ops.kv_cache import KVCache
from engines.weights import DTYPES

ATTENTION = "paged_op_set"
"""Our name among transformers' attention functions."""
UNLIMITED = 1 << 20
"""max_model_len of models that have no position table and no length in their config (state-space models)."""
_CACHE_ARGUMENTS = ("past_key_values", "cache_params", "state")


@dataclass
class Step:
    """What the attention function needs of one engine step; travels through the model's keyword arguments."""

    ops: OpSet
    batch: Batch
    caches: list[KVCache]

    def cache(self, layer: int, k: Tensor) -> KVCache:
        return self.caches[layer]


@dataclass
class ProbeStep(Step):
    """A step that makes its caches as the layers ask for them, and remembers what they asked."""

    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(num_kv_heads, head_dim) by layer"""
    windows: set[int] = field(default_factory=set)

    def cache(self, layer: int, k: Tensor) -> KVCache:
        if layer in self.shapes or layer != len(self.caches):
            raise NotRoutable(f"attention of layer {layer} is called twice or out of order")
        self.shapes[layer] = (k.shape[1], k.shape[2])
        self.caches.append(self.ops.allocate_kv_cache(2, 8, k.shape[1], k.shape[2], k.dtype, k.device))
        return self.caches[layer]


class NotRoutable(Exception):
    """A model's attention cannot go through the paged op set; says why."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    engine_step: Step | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface on the paged op set.

    query: [1, num_heads, num_tokens, head_dim], key and value likewise with KV heads: the tokens of a ragged batch in
    one row. Returns [1, num_tokens, num_heads, head_dim]. The mask is not looked at: causality, sequences and window
    follow from the batch.
    """
    layer = getattr(module, "layer_idx", None)
    if engine_step is None or layer is None or query.shape[0] != 1:
        raise NotRoutable(f"{type(module).__name__} does not hand on keyword arguments or has no layer_idx")
    if key.shape != value.shape or key.shape[2] != query.shape[2] or query.shape[3] != key.shape[3]:
        raise NotRoutable(f"{type(module).__name__} has keys {list(key.shape)} and values {list(value.shape)}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    cache = engine_step.cache(layer, k)
    batch, ops = engine_step.batch, engine_step.ops
    assert batch.slot_mapping is not None
    if isinstance(engine_step, ProbeStep):
        engine_step.windows.add(sliding_window or 0)
    ops.write_kv(k.contiguous(), v.contiguous(), cache, batch.slot_mapping)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = ops.paged_attention(q.contiguous(), cache, batch, scale, sliding_window or 0, softcap or 0.0, s_aux)
    return out[None], None


class PassThrough(nn.Module):
    """Stands for the layers inside the model's class, so that calling the class computes its head alone.

    Takes the hidden states as inputs_embeds; attributes are those of the layers it stands for.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "base", (base,))

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        return _Output(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "base")[0], name)


class _Output(BaseModelOutputWithPast):
    """With None for whatever else a model's class hands on beside its logits (caches, router logits ...)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@dataclass
class SequenceState:
    """Of one sequence in a model that keeps its own cache."""

    cache: Any = None
    length: int = 0
    """Tokens received."""
    pending: list[int] = field(default_factory=list)
    """The last of them, not computed yet: nothing after them was asked for so far."""


class TransformersModel:
    """A causal model of transformers. Satisfies engines.models.base.Model."""

    adapters: tuple[str, ...] = ()

    def __init__(self, model: Any, settings: EngineSettings, ops: OpSet) -> None:
        config = model.config.get_text_config()
        self.spec: ModelSpec | None = None
        self.ops = ops
        self.hidden_size = config.hidden_size
        own = getattr(config, "max_position_embeddings", None) or UNLIMITED
        self.max_model_len = settings.config.max_model_len or own
        self.model = model
        self.base = split_head(model)
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        parameters = inspect.signature(self.base.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.cache_argument = next((name for name in _CACHE_ARGUMENTS if name in parameters), "")
        self.states: dict[int, SequenceState] = {}
        self.num_cache_layers = self.num_kv_heads = self.head_dim = self.latent_rank = 0
        self.paged = False
        self.reason = self._route(config)
        """Why the model keeps its own cache; empty when its attention is routed."""
        if not self.paged:
            self._check_own_cache(settings.model_path)

    def forward(self, batch: Batch, caches: list[KVCache]) -> Tensor:
        if self.paged:
            hidden = self._routed(Step(self.ops, batch, caches))
            return hidden if batch.output_indices is None else hidden[batch.output_indices]
        starts = batch.cu_seqlens_q.tolist()
        wanted = torch.ones(batch.num_tokens, dtype=torch.bool)
        if batch.output_indices is not None:
            wanted[:] = False
            wanted[batch.output_indices.cpu()] = True
        hidden = torch.zeros(
            (batch.num_tokens, self.hidden_size), dtype=self.model.dtype, device=batch.token_ids.device
        )
        for i, seq_id in enumerate(batch.seq_ids):
            begin, end = starts[i], starts[i + 1]
            if begin == end:
                continue
            state = self._state(seq_id, int(batch.positions[begin]))
            state.pending += batch.token_ids[begin:end].tolist()
            state.length += end - begin
            if bool(wanted[begin:end].any()):
                hidden[begin:end] = self._advance(state, batch.token_ids.device)[-(end - begin) :]
        return hidden if batch.output_indices is None else hidden[batch.output_indices]

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs_embeds=hidden[None]).logits[0]
        return logits

    def classify(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError("classification heads of transformers' classes are not run here")

    def context_key(self, num_prompt_tokens: int, num_tokens: int) -> int:
        return 0

    def release(self, seq_id: int) -> None:
        self.states.pop(seq_id, None)

    def close(self) -> None:
        self.states.clear()

    def _routed(self, step: Step) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": step.batch.token_ids[None], "use_cache": False, "engine_step": step}
        if self.takes_positions:
            arguments["position_ids"] = step.batch.positions[None]
        return self.base(**arguments).last_hidden_state[0]

    def _state(self, seq_id: int, position: int) -> SequenceState:
        if position == 0:
            self.states[seq_id] = SequenceState()
        state = self.states.get(seq_id)
        if state is None or state.length != position:
            held = "nothing" if state is None else f"{state.length} tokens"
            raise RuntimeError(f"sequence {seq_id}: continues at token {position} but {held} of it is held here")
        return state

    def _advance(self, state: SequenceState, device: torch.device) -> Tensor:
        """Compute the pending tokens: [number of them, hidden_size].

        A recurrent state is advanced token by token: classes that have one take several tokens at the start only.
        """
        tokens, state.pending = torch.tensor(state.pending, device=device), []
        first = state.length - len(tokens)
        stateful = getattr(type(self.model), "_is_stateful", False)
        pieces = tokens.split(1) if stateful and state.cache is not None else (tokens,)
        hidden = []
        for piece in pieces:
            arguments: dict[str, Any] = {
                "input_ids": piece[None],
                "use_cache": True,
                self.cache_argument: state.cache,
            }
            if self.takes_positions:
                arguments["position_ids"] = torch.arange(first, first + len(piece), device=device)[None]
            output = self.base(**arguments)
            state.cache = getattr(output, self.cache_argument)
            hidden.append(output.last_hidden_state[0])
            first += len(piece)
        return torch.cat(hidden)

    def _route(self, config: Any) -> str:
        """Send attention to the op set where that is right, and set paged and the cache's shape; else say why not."""
        supported = getattr(type(self.model), "_supports_attention_backend", False)
        if not supported or getattr(type(self.model), "_is_stateful", False):
            return f"{type(self.model).__name__} does not use transformers' attention interface throughout"
        if getattr(config, "attention_chunk_size", None):
            return "attention is chunked"
        if rope_kinds(config) & {"dynamic", "longrope"}:
            return "its rotary embedding looks at the longest text of a batch"
        own = self._probe_own()
        AttentionInterface.register(ATTENTION, attention)
        try:
            self.model.set_attn_implementation(ATTENTION)
            step = ProbeStep(self.ops, _probe_batch(own.device), [])
            routed = self._routed(step)
            self._check_probe(config, step, own, routed)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a class makes of it, and kernels of a head that they do not take
            self.model.set_attn_implementation("eager")
            return str(error)
        self.paged = True
        self.num_cache_layers = len(step.shapes)
        self.num_kv_heads, self.head_dim = step.shapes[0]
        return ""

    def _check_own_cache(self, path: str) -> None:
        """Raises UnsupportedModelError for a model that keeps what it remembers inside its modules, or nowhere, and for
        one that does not compute at all."""
        tokens = _probe_batch(self.model.device).token_ids[None, :5]
        try:
            output = self.base(input_ids=tokens, use_cache=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a class makes of a config.json that nobody has checked
            raise UnsupportedModelError(
                f"{path}: {type(self.model).__name__} fails on its first tokens: {type(error).__name__}: {error}; "
                "expected a config.json that its class in transformers can compute with; is it that of the weights?"
            ) from error
        if not self.cache_argument or getattr(output, self.cache_argument, None) is None:
            raise UnsupportedModelError(
                f"{path}: {type(self.model).__name__} returns no cache that could be kept for each sequence, and "
                f"{self.reason}; expected one of {', '.join(_CACHE_ARGUMENTS)}; this model cannot run here"
            )

    def _check_probe(self, config: Any, step: ProbeStep, own: Tensor, routed: Tensor) -> None:
        if len(set(step.shapes.values())) != 1:
            raise NotRoutable(f"layers have caches of different shapes: {sorted(set(step.shapes.values()))}")
        if getattr(config, "sliding_window", None) and step.windows == {0}:
            raise NotRoutable("config.json has a sliding_window that attention is not called with")
        limit = 1e-3 if routed.dtype == torch.float32 else 5e-2
        error = float((routed.float() - own.float()).norm() / own.float().norm().clamp(min=1e-20))
        if not error < limit:
            raise NotRoutable(f"routed attention differs from its own by {error:.2g} of the norm")

    def _probe_own(self) -> Tensor:
        """Hidden states of the probe's sequences by the model's own attention, each sequence alone."""
        batch = _probe_batch(self.model.device)
        starts = batch.cu_seqlens_q.tolist()
        pieces = [batch.token_ids[a:b] for a, b in itertools.pairwise(starts)]
        return torch.cat([self.base(input_ids=p[None], use_cache=False).last_hidden_state[0] for p in pieces])


def load_transformers_model(settings: EngineSettings, checkpoint: Checkpoint, ops: OpSet) -> TransformersModel:
    """The checkpoint in the causal class that transformers has for it. The checkpoint's own code runs only if trusted.

    Raises UnsupportedModelError when there is no such class, CheckpointError when its parameters are not those of the
    checkpoint.
    """
    if settings.kind == "classify":
        raise UnsupportedModelError(
            f"{checkpoint.path}: {checkpoint.architecture} cannot classify here; expected one of the native families; "
            "choose another model"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=DTYPES[settings.dtype],
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever a config.json that nobody has checked makes of transformers' classes
        raise UnsupportedModelError(
            f"{checkpoint.path}: transformers cannot load {checkpoint.architecture} as a causal model: "
            f"{type(error).__name__}: {error}"
        ) from error
    model, info = loaded
    problems = [f"{what.removesuffix('_keys')}: {key}" for what in _PROBLEMS for key in sorted(map(str, info[what]))]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: its tensors are not those of a {type(model).__name__}:\n  "
            + "\n  ".join(problems[:20])
            + "\nexpected every parameter once and nothing else; is config.json from the same revision as the weights?"
        )
    model = model.to(settings.device).eval()
    with torch.inference_mode():
        return TransformersModel(model, settings, ops)


_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def split_head(model: Any) -> nn.Module:
    """The layers of a causal model, taken out of it: what is left, given hidden states, computes the logits.

    Classes differ in which of their modules they call for hidden states, so what is found is tried on a few tokens.
    Raises UnsupportedModelError when nothing fits.
    """
    tokens = _probe_batch(model.device).token_ids[None, :5]
    expected = model(input_ids=tokens, use_cache=False).logits
    names = {id(module): name for name, module in model.named_modules()}
    with_table = model.get_submodule(names[id(model.get_input_embeddings())].rpartition(".")[0])
    for base in (model.base_model, model.get_decoder(), with_table):
        if base is model:
            continue
        name = names[id(base)]
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        hidden = base(input_ids=tokens, use_cache=False).last_hidden_state
        setattr(parent, child, PassThrough(base))
        try:
            if torch.allclose(model(inputs_embeds=hidden).logits, expected, rtol=1e-2, atol=1e-3):
                return base
        except (AttributeError, TypeError, ValueError, RuntimeError, NotRoutable):
            pass  # the class calls another of its modules
        setattr(parent, child, base)
    raise UnsupportedModelError(
        f"{type(model).__name__}: none of its modules computes the hidden states that its head is applied to; "
        "expected base_model, get_decoder() or the owner of the token table to; this model cannot run here"
    )


def rope_kinds(config: Any) -> set[str]:
    """The scalings of the rotary embeddings that a config asks for."""
    said = getattr(config, "rope_parameters", None) or {}
    entries = [said, *(value for value in said.values() if isinstance(value, dict))]
    return {entry["rope_type"] for entry in entries if "rope_type" in entry}


def _probe_batch(device: torch.device) -> Batch:
    """Two sequences of 5 and 3 tokens, a block each."""
    lengths = torch.tensor([5, 3], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(5, device=device), torch.arange(3, device=device)])
    return Batch(
        token_ids=torch.tensor([3, 7, 5, 11, 2, 13, 4, 9], device=device),
        positions=positions,
        cu_seqlens_q=torch.tensor([0, 5, 8], dtype=torch.int32, device=device),
        seq_lens=lengths,
        max_seqlen_q=5,
        max_seqlen_k=5,
        slot_mapping=positions + torch.tensor([0] * 5 + [8] * 3, device=device),
        block_tables=torch.tensor([[0], [1]], dtype=torch.int32, device=device),
    )
