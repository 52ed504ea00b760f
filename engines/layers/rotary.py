"""Tables of rotary position embeddings, with the scalings of transformers' modeling_rope_utils.

Two scalings look at the length of the text, and a token's angles then depend on more than its position:

dynamic: a prompt longer than the model's own length is computed with frequencies for the prompt's length, and each
token generated beyond it with those for the length at that moment. transformers does the same for one text at a time.
longrope: a text longer than the original length has the long factors for all its tokens; when it grows past that
length, all its keys are computed again (Phi3ForCausalLM.prepare_inputs_for_generation).

What of that a sequence's earlier keys depend on is its context key: see Model.context_key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.batch import Batch
from engines.models.spec import RopeSpec


@dataclass(frozen=True)
class Rotation:
    """What the rope op takes for a batch: rows of a table."""

    positions: Tensor
    """[num_tokens] int64: rows of cos_sin"""
    cos_sin: Tensor
    """[rows, rotary_dim]: cosines, then sines"""


class RotaryEmbedding:
    """Angles for every token of a batch."""

    def __init__(
        self, spec: RopeSpec, head_dim: int, own_length: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """own_length: the model's max_position_embeddings; max_length: positions that will be asked for."""
        self.spec = spec
        self.dim = spec.rotary_dim or head_dim
        self.own_length = own_length
        self.max_length = max_length
        self.dtype = dtype
        self.device = device
        self.factor = attention_factor(spec)
        positions = torch.arange(max_length, dtype=torch.float32)
        tables = [self._table(positions, inverse_frequencies(spec, self.dim))]
        if self.switches:
            tables.append(self._table(positions, inverse_frequencies(spec, self.dim, long=True)))
        self.cos_sin = torch.cat(tables).to(device)

    @property
    def switches(self) -> bool:
        """Whether two sets of factors are in use (longrope) and some text may be long enough for the second."""
        return self.spec.kind == "longrope" and self.max_length > self.spec.original_max_position_embeddings

    @property
    def grows(self) -> bool:
        """Whether frequencies follow the text's length (dynamic) and some text may be long enough for that."""
        return self.spec.kind == "dynamic" and self.max_length > self.own_length

    def context_key(self, num_prompt_tokens: int, num_tokens: int) -> int:
        if self.switches:
            return int(num_tokens > self.spec.original_max_position_embeddings)
        if self.grows:
            return num_prompt_tokens if num_prompt_tokens > self.own_length else 0
        return 0

    def rotation(self, batch: Batch) -> Rotation:
        if not (self.switches or self.grows):
            return Rotation(batch.positions, self.cos_sin)
        keys = torch.zeros_like(batch.positions)
        if batch.context_keys is not None:
            counts = batch.cu_seqlens_q.diff().long()
            keys = batch.context_keys.to(keys).repeat_interleave(counts, output_size=batch.num_tokens)
        if self.switches:
            return Rotation(batch.positions + keys * self.max_length, self.cos_sin)
        lengths = torch.maximum(keys, batch.positions + 1)
        if int(lengths.max()) <= self.own_length:
            return Rotation(batch.positions, self.cos_sin)
        scaled = self._table(
            batch.positions.float(), dynamic_frequencies(self.spec, self.dim, self.own_length, lengths)
        )
        # Not the same to the last bit for lengths within the model's own, and no token may notice its neighbours.
        rows = torch.where((lengths > self.own_length)[:, None], scaled, self.cos_sin[batch.positions])
        return Rotation(torch.arange(batch.num_tokens, device=rows.device), rows)

    def _table(self, positions: Tensor, inv_freq: Tensor) -> Tensor:
        """Angles in float32, rounded once to the dtype, as LlamaRotaryEmbedding does."""
        angles = positions[:, None] * inv_freq
        return (torch.cat((angles.cos(), angles.sin()), dim=-1) * self.factor).to(self.dtype)


def inverse_frequencies(spec: RopeSpec, dim: int, long: bool = False) -> Tensor:
    """[dim / 2] float32. dynamic: those of texts within the model's own length."""
    inv_freq = 1.0 / (spec.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if spec.kind == "linear":
        return inv_freq / spec.factor
    if spec.kind == "yarn":
        return _yarn(spec, dim)
    if spec.kind == "llama3":
        return _llama3(spec, inv_freq)
    if spec.kind == "longrope":
        factors = torch.tensor(spec.long_factor if long else spec.short_factor, dtype=torch.float32)
        return 1.0 / (factors * spec.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    return inv_freq


def dynamic_frequencies(spec: RopeSpec, dim: int, own_length: int, lengths: Tensor) -> Tensor:
    """[num_tokens, dim / 2] for texts of those lengths: NTK scaling, as _compute_dynamic_ntk_parameters."""
    scaled = spec.factor * lengths.clamp(min=own_length) / own_length - (spec.factor - 1)
    base = spec.theta * scaled ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=lengths.device) / dim
    return 1.0 / (base[:, None] ** exponents)


def attention_factor(spec: RopeSpec) -> float:
    """What cosines and sines are multiplied by (yarn: arXiv 2309.00071; longrope: arXiv 2402.13753)."""
    if spec.kind not in ("yarn", "longrope"):
        return 1.0
    if spec.attention_factor is not None:
        return spec.attention_factor
    original = spec.original_max_position_embeddings
    factor = spec.factor
    if spec.kind == "longrope":
        return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    if spec.mscale and spec.mscale_all_dim:
        return mscale(spec.mscale) / mscale(spec.mscale_all_dim)
    return mscale(1.0)


def _yarn(spec: RopeSpec, dim: int) -> Tensor:
    """NTK by parts, arXiv 2309.00071 section 3.2."""

    def dimension(rotations: float) -> float:
        ratio = spec.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = spec.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    extrapolated, interpolated = 1.0 / frequencies, 1.0 / (spec.factor * frequencies)
    return interpolated * (1 - kept) + extrapolated * kept


def _llama3(spec: RopeSpec, inv_freq: Tensor) -> Tensor:
    """Low frequencies divided by the factor, high ones kept, those between blended (Llama 3.1)."""
    original, factor = spec.original_max_position_embeddings, spec.factor
    wavelength = 2 * math.pi / inv_freq
    low, high = original / spec.low_freq_factor, original / spec.high_freq_factor
    scaled = torch.where(wavelength > low, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    return torch.where((wavelength >= high) & (wavelength <= low), blended, scaled)
