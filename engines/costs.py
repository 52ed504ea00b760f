"""Bytes and operations of a model's parts, from its sizes alone: shared by the plan, the benchmarks and their floors.

A multiply-add counts as two operations. Sizes are of one copy of the model on one device; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engines.models.spec import DecoderSpec, EncoderSpec, ModelSpec

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Cost:
    """What something must at least move and compute."""

    num_bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.num_bytes * times, self.flops * times)

    def time_s(self, bytes_s: float, flops_s: float) -> float:
        """Roofline: the longer of moving and computing."""
        return max(self.num_bytes / bytes_s, self.flops / flops_s)


def num_parameters(spec: ModelSpec) -> int:
    """Numbers in the checkpoint; tied embeddings count once."""
    layers = sum(layer_parameters(spec, layer) for layer in range(spec.num_hidden_layers))
    return embedding_parameters(spec) + layers + head_parameters(spec)


def embedding_parameters(spec: ModelSpec) -> int:
    if isinstance(spec, DecoderSpec):
        return spec.vocab_size * spec.hidden_size
    rows = spec.vocab_size + spec.max_position_embeddings + spec.position_offset + spec.type_vocab_size
    return (rows + 2) * spec.hidden_size


def layer_parameters(spec: ModelSpec, layer: int) -> int:
    if isinstance(spec, EncoderSpec):
        return _encoder_matrices(spec) + _encoder_vectors(spec)
    experts = spec.experts(layer)
    held = experts.num_experts if experts else 1
    return _attention_matrices(spec) + _mlp_matrices(spec, layer, held) + _vectors(spec, layer)


def matrix_parameters(spec: ModelSpec, experts: float | None = None) -> float:
    """Weights of all layers' matrices, with so many of the experts of each mixture (None: those of one token)."""
    if isinstance(spec, EncoderSpec):
        return spec.num_hidden_layers * _encoder_matrices(spec)
    used = experts if experts is not None else spec.moe.num_experts_per_tok if spec.moe else 1
    layers = range(spec.num_hidden_layers)
    return spec.num_hidden_layers * _attention_matrices(spec) + sum(_mlp_matrices(spec, i, used) for i in layers)


def held_matrix_parameters(spec: ModelSpec) -> int:
    """The same with all experts: what quantization makes smaller."""
    return int(matrix_parameters(spec, spec.moe.num_experts if isinstance(spec, DecoderSpec) and spec.moe else None))


def _encoder_matrices(spec: EncoderSpec) -> int:
    return 4 * spec.hidden_size * spec.hidden_size + 2 * spec.hidden_size * spec.intermediate_size


def _attention_matrices(spec: DecoderSpec) -> int:
    hidden, heads, mla = spec.hidden_size, spec.num_attention_heads, spec.mla
    if mla is None:
        q, kv = heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        return hidden * (q + 2 * kv) + q * hidden
    queries = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    q = mla.q_lora_rank * (hidden + queries) if mla.q_lora_rank else hidden * queries
    kv_b = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return q + hidden * spec.head_dim + kv_b + heads * mla.v_head_dim * hidden


def _mlp_matrices(spec: DecoderSpec, layer: int, num_experts: float) -> Any:
    """Whole for whole num_experts."""
    moe, hidden = spec.experts(layer), spec.hidden_size
    if moe is None:
        return 3 * hidden * spec.intermediate_size
    shared = 3 * moe.shared_intermediate_size + (1 if moe.shared_gate else 0)
    return hidden * (3 * num_experts * moe.moe_intermediate_size + shared + moe.num_experts)


def _vectors(spec: DecoderSpec, layer: int) -> int:
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    moe, mla = spec.experts(layer), spec.mla
    mlp_bias = 2 * spec.intermediate_size + spec.hidden_size if spec.mlp_bias and moe is None else 0
    if moe is not None:
        of_expert = 2 * moe.moe_intermediate_size + spec.hidden_size
        mlp_bias += moe.num_experts * ((of_expert if moe.stacked else 0) + (1 if moe.router_bias else 0))
    if mla is None:
        qkv_bias = q + 2 * kv if spec.qkv_bias else 0
    else:
        qkv_bias = mla.q_lora_rank + mla.kv_lora_rank  # norms
        qkv_bias += mla.q_lora_rank + spec.head_dim if spec.qkv_bias else 0
    return (
        spec.hidden_size * (4 if spec.sandwich_norm else 2)
        + (2 * spec.head_dim if spec.qk_norm else 0)
        + qkv_bias
        + (spec.hidden_size if spec.o_bias else 0)
        + (spec.num_attention_heads if spec.attn_sinks else 0)
        + mlp_bias
    )


def _encoder_vectors(spec: EncoderSpec) -> int:
    return 4 * spec.hidden_size + spec.intermediate_size + spec.hidden_size + 4 * spec.hidden_size


def head_parameters(spec: ModelSpec) -> int:
    """What comes after the layers: last norm, and the head where it is not the embedding's own table."""
    hidden = spec.hidden_size
    if isinstance(spec, EncoderSpec):
        if not spec.num_labels:
            return 0
        return hidden * hidden + hidden + spec.num_labels * (hidden + 1)
    if spec.num_labels:
        return hidden + hidden * spec.num_labels
    return hidden + (0 if spec.tie_word_embeddings else spec.vocab_size * hidden)


def weight_bytes(spec: ModelSpec, dtype: str) -> int:
    return num_parameters(spec) * DTYPE_BYTES[dtype]


def kv_bytes_per_token(spec: ModelSpec, dtype: str, kv_dtype: str = "auto") -> int:
    """Keys and values of one token in all layers; 0 for encoders, which keep none."""
    if isinstance(spec, EncoderSpec):
        return 0
    vectors = 1 if spec.mla else 2 * spec.num_key_value_heads
    return spec.num_hidden_layers * vectors * kv_vector_bytes(spec.head_dim, dtype, kv_dtype)


def kv_vector_bytes(head_dim: int, dtype: str, kv_dtype: str) -> int:
    """One head's key or value of one token, with the scale (and offset) that it has in 8 or 4 bits."""
    if kv_dtype == "auto":
        return head_dim * DTYPE_BYTES[dtype]
    return {"int8": head_dim + 8, "int4": -(-head_dim // 2) + 8, "fp8": head_dim + 4}[kv_dtype]


def activation_bytes(spec: ModelSpec, dtype: str, num_tokens: int, num_outputs: int) -> int:
    """Most that a step of num_tokens new tokens holds besides weights and cache.

    The widest moment of a layer (residual, normed input, and either q, k, v and the attention's output or gate, up
    and their product), or the float32 logits of num_outputs positions, twice: sampling makes a copy.
    """
    size = DTYPE_BYTES[dtype]
    hidden, inner = spec.hidden_size, spec.intermediate_size
    if isinstance(spec, EncoderSpec):
        widest = max(4 * hidden, 2 * inner)
        return num_tokens * (2 * hidden + widest) * size
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    if spec.moe:  # copies of a token for its experts, in and out
        experts = spec.moe.num_experts_per_tok * (3 * spec.moe.moe_intermediate_size + 2 * hidden)
        inner = max(inner, -(-experts // 3), spec.moe.shared_intermediate_size)
    widest = max(2 * q + 2 * kv, 3 * inner)
    logits = 0 if spec.num_labels else 2 * 4 * num_outputs * spec.vocab_size
    return num_tokens * (2 * hidden + widest) * size + logits


def linear(num_tokens: float, in_features: int, out_features: int, dtype: str) -> Cost:
    size = DTYPE_BYTES[dtype]
    moved = in_features * out_features + num_tokens * (in_features + out_features)
    return Cost(moved * size, 2.0 * num_tokens * in_features * out_features)


def attention(spec: ModelSpec, num_tokens: float, mean_kv_len: float, dtype: str) -> Cost:
    """Of one layer: num_tokens new tokens that attend to mean_kv_len tokens each (after window and causal mask).

    Bytes are those of decoding, where every sequence reads its own keys and values.
    """
    heads = spec.num_attention_heads
    kv_heads = heads if isinstance(spec, EncoderSpec) else spec.num_key_value_heads
    vectors, values = 2 * kv_heads, spec.head_dim
    if isinstance(spec, DecoderSpec) and spec.mla:
        vectors, values = 1, spec.mla.kv_lora_rank
    moved = num_tokens * (mean_kv_len * vectors + 2 * heads) * spec.head_dim * DTYPE_BYTES[dtype]
    return Cost(moved, 2.0 * num_tokens * mean_kv_len * heads * (spec.head_dim + values))


def rms_norm(num_tokens: float, hidden_size: int, dtype: str) -> Cost:
    return Cost((2 * num_tokens + 1) * hidden_size * DTYPE_BYTES[dtype], 4.0 * num_tokens * hidden_size)


def step(spec: ModelSpec, dtype: str, num_tokens: float, kv_tokens: float, num_outputs: float) -> Cost:
    """One pass through the model.

    num_tokens: new tokens. kv_tokens: of all sequences together, the cached tokens that are read (once a sequence).
    Attention's operations are for tokens that attend to kv_tokens / num_tokens each. num_outputs: positions whose
    logits are wanted.
    """
    size = DTYPE_BYTES[dtype]
    layers = spec.num_hidden_layers
    cost = Cost(
        matrix_parameters(spec, _experts_in_use(spec, num_tokens)) * size, 2.0 * matrix_parameters(spec) * num_tokens
    )
    if num_tokens:
        cost = cost + attention(spec, num_tokens, kv_tokens / num_tokens, dtype) * layers
        cost = cost + rms_norm(num_tokens, spec.hidden_size, dtype) * (2 * layers)
    if isinstance(spec, DecoderSpec) and num_outputs:
        cost = cost + linear(num_outputs, spec.hidden_size, spec.num_labels or spec.vocab_size, dtype)
    return cost


def _experts_in_use(spec: ModelSpec, num_tokens: float) -> float | None:
    """Experts of a mixture that some token of a step goes to, were the choice even."""
    if isinstance(spec, EncoderSpec) or spec.moe is None:
        return None
    share = spec.moe.num_experts_per_tok / spec.moe.num_experts
    return spec.moe.num_experts * (1.0 - (1.0 - share) ** num_tokens)


def visible_tokens(spec: ModelSpec, length: float) -> float:
    """Cached tokens that a token at the end of a sequence attends to, the mean over layers (windows hide the rest)."""
    if isinstance(spec, EncoderSpec):
        return length
    windows = (spec.window(layer) for layer in range(spec.num_hidden_layers))
    return sum(min(length, window) if window else length for window in windows) / max(spec.num_hidden_layers, 1)


def job(
    spec: ModelSpec,
    dtype: str,
    num_requests: float,
    prompt_tokens: float,
    output_tokens: float,
    num_seqs: float,
    step_tokens: float = 2048,
) -> tuple[Cost, Cost]:
    """(prefill, decode) of num_requests requests of these mean lengths, num_seqs of them decoding together.

    Prefill moves the weights once for every step of step_tokens; the sum is a floor, not a prediction.
    """
    tokens = num_requests * prompt_tokens
    # A prompt's tokens see half of it on average, all of it in an encoder.
    seen = visible_tokens(spec, prompt_tokens) * (1.0 if isinstance(spec, EncoderSpec) else 0.5)
    in_step = min(step_tokens, tokens)
    steps = tokens / in_step if in_step else 0.0
    outputs = num_requests / steps if steps else 0.0
    prefill = step(spec, dtype, in_step, 0.0, outputs) * steps
    prefill = prefill + Cost(0.0, attention(spec, tokens, seen, dtype).flops * spec.num_hidden_layers)
    decoded = num_requests * max(output_tokens - 1, 0)  # prefill gives the first token
    together = min(num_seqs, num_requests)
    if not decoded or not together:
        return prefill, Cost(0.0, 0.0)
    kv = together * visible_tokens(spec, prompt_tokens + output_tokens / 2)
    return prefill, step(spec, dtype, together, kv, together) * (decoded / together)
