"""From engine settings to a loaded model: which family, which format, which head."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from engines import discover
from engines.adapters import Adapters
from engines.api import EngineSettings, Kind, UnsupportedModelError
from engines.capability import quantization_attributes
from engines.checkpoint import Checkpoint, open_checkpoint
from engines.models.base import Model
from engines.models.decoder import Decoder, Head
from engines.models.encoder import Encoder
from engines.models.spec import DecoderSpec, EncoderSpec, ModelSpec
from engines.ops import OpSet
from engines.ops.linear import LinearWeight
from engines.ops.quantized import QuantizedWeight
from engines.parallel.group import ALONE, Group
from engines.parallel.place import in_the_way
from engines.weights import DTYPES, Weights, build

HEAD_OF_KIND: dict[Kind, Head] = {"generate": "logits", "score": "logits", "classify": "labels", "embed": "none"}
HEADS = (r"lm_head\..*", r"score\..*", r"output\..*", r"classifier\..*", r"(.*\.)?pooler\..*", r"cls\..*")
"""Tensors of heads, ignored where the job needs hidden states only."""


def load_model(settings: EngineSettings, ops: OpSet, group: Group = ALONE) -> Model:
    """The model of settings.model_path, on settings.device in settings.dtype: what this rank of the group holds of it.

    Raises CheckpointError for tensors that do not fit config.json, UnsupportedModelError for a sound checkpoint that
    cannot be run here.
    """
    checkpoint = open_checkpoint(settings.model_path)
    fmt = (
        discover.modules("engines.formats")[settings.quantization]
        if settings.quantization
        else weight_format(checkpoint)
    )
    if settings.implementation == "transformers":
        _check_place(settings, None, checkpoint, group)
        if checkpoint.quantization is not None:
            raise UnsupportedModelError(
                f"{checkpoint.path}: weights are quantized ({_method(checkpoint)}) and {checkpoint.architecture} runs "
                "through transformers; expected plain weights; use the unquantized checkpoint"
            )
        if settings.adapters:
            raise _no_adapters(settings, checkpoint)
        from engines.models.transformers_model import load_transformers_model

        return load_transformers_model(settings, checkpoint, ops)
    family = discover.family(checkpoint.architecture)
    if family is None:
        raise UnsupportedModelError(
            f"{checkpoint.path}: architecture {checkpoint.architecture} has no native family; "
            f"expected one of {', '.join(native_architectures())}; use implementation transformers for causal models"
        )
    spec: ModelSpec = family.spec(checkpoint.config)
    _check_task(settings, spec, checkpoint)
    _check_place(settings, spec, checkpoint, group)
    if settings.adapters and isinstance(spec, EncoderSpec):
        raise _no_adapters(settings, checkpoint)
    length = settings.config.max_model_len or spec.max_position_embeddings
    dtype, device = DTYPES[settings.dtype], torch.device(settings.device)
    anchor = "embed_tokens.weight" if isinstance(spec, DecoderSpec) else "embeddings.word_embeddings.weight"
    adapters = Adapters(settings.adapters) if settings.adapters else None
    weights = Weights(checkpoint, family.CHECKPOINT, dtype, device, anchor, adapters=adapters, group=group)

    def make(source: Weights) -> Model:
        here = _HeaderOps() if source.device.type == "meta" else ops
        if isinstance(spec, EncoderSpec):
            return Encoder(spec, settings.kind == "classify", length, source, fmt, here)
        return Decoder(spec, HEAD_OF_KIND[settings.kind], length, source, fmt, here)

    ignored = getattr(fmt, "IGNORED", ()) + (HEADS if settings.kind == "embed" else ())
    return build(make, weights, ignored)


class _HeaderOps(OpSet):
    """Stands in for an op set on the meta device, where there is no data to pack or to dequantize."""

    def prepare_quantized(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> LinearWeight:
        return LinearWeight(weight, bias, weight.shape[1], weight.shape[0])


def weight_format(checkpoint: Checkpoint) -> ModuleType:
    """The module of engines/formats that reads this checkpoint's weights.

    Raises UnsupportedModelError for a quantization that none of them knows.
    """
    formats = discover.modules("engines.formats")
    for module in formats.values():
        if module.detect(checkpoint.quantization):
            return module
    raise UnsupportedModelError(
        f"{checkpoint.path}: weights are quantized ({_method(checkpoint)}); expected one of {', '.join(formats)}; "
        "use the unquantized checkpoint"
    )


def _check_place(settings: EngineSettings, spec: ModelSpec | None, checkpoint: Checkpoint, group: Group) -> None:
    """Raises UnsupportedModelError, on the first rank, for a model that cannot be spread over that many."""
    said = quantization_attributes(checkpoint.quantization)
    found = in_the_way(spec, settings.tp, settings.ep, said)
    if found and group.place.rank == 0:
        raise UnsupportedModelError("\n".join(found))


def _no_adapters(settings: EngineSettings, checkpoint: Checkpoint) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model.adapters: {', '.join(settings.adapters)} with {checkpoint.architecture}; expected a decoder of a "
        "native family; merge the adapter into the checkpoint"
    )


def _method(checkpoint: Checkpoint) -> str:
    said = checkpoint.quantization or {}
    return str(said.get("quant_method") or said.get("format") or "unnamed")


def native_architectures() -> list[str]:
    return sorted(name for module in discover.families().values() for name in module.ARCHITECTURES)


def _check_task(settings: EngineSettings, spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModelError when the checkpoint has not the head that the task needs."""
    if settings.kind == "embed":
        return
    if settings.kind == "classify":
        sound, expected = spec.num_labels > 0, "a ...ForSequenceClassification checkpoint"
    else:
        sound = isinstance(spec, DecoderSpec) and not spec.num_labels and not checkpoint.architecture.endswith("Model")
        expected = "a ...ForCausalLM checkpoint"
    if not sound:
        raise UnsupportedModelError(
            f"{checkpoint.path}: {checkpoint.architecture} cannot {settings.kind}; expected {expected}; "
            "choose another model or another task"
        )
