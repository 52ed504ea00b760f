"""What makes a job this job: everything that can change a result, and nothing else, in readable strings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import xxhash

from engines.api import EngineSettings
from runner.config import JobConfig
from runner.secrets import mask
from runner.source.paths import shown_url

LONGEST = 120
"""Characters; longer values stand as a digest."""


def fingerprint(
    job: JobConfig, settings: EngineSettings, model_digest: str, adapter_digests: Mapping[str, str]
) -> dict[str, str]:
    """Dotted configuration key -> value. Two jobs with equal fingerprints may share an output folder.

    Not in it: what only steers the run (mode, shard, limits on time and errors, journal, host), how results are stored
    (compression, row groups), and the engine's batching, which changes no result as long as numerics is invariant.
    Credentials stand as ***: they change no result either.
    """
    values: dict[str, Any] = {
        "model": model_digest,
        "model.quantization": job.model.quantization,
        "model.adapters": adapter_digests,
        "model.adapter": job.model.adapter,
        "model.adapter_column": job.model.adapter_column,
        "backend": settings.backend,
        "implementation": settings.implementation,
        "dtype": settings.dtype,
        "max_model_len": settings.config.max_model_len,
        "block_size": settings.config.block_size,
        "kv_dtype": settings.config.kv_dtype,
        "numerics": settings.numerics,
        "parallelism.tp": job.parallelism.tp,
        "parallelism.ep": job.parallelism.ep,
        "pooling": settings.pooling,
        "normalize": settings.normalize,
        "eos_token_ids": settings.eos_token_ids,
        "seed": job.seed,
        "samples": job.samples,
        "sampling_columns": job.sampling_columns,
        "output.keep_columns": job.output.keep_columns,
        "output.token_ids": job.output.token_ids,
    }
    if settings.libraries:
        values["libraries"] = settings.libraries
    for group in ("task", "sampling", "dataset"):
        for name, value in _fields(getattr(job, group)).items():
            values[f"{group}.{name}"] = value
    for key in ("dataset.remote", "dataset.follow_links"):  # leave to read, no part of what is read
        del values[key]
    values["dataset.path"] = shown_url(job.dataset.path)
    return {key: spell(value) for key, value in sorted(values.items())}


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def spell(value: Any) -> str:
    """A value as a person reads it; a long one as its beginning and a digest."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    text = mask(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str))
    if len(text) <= LONGEST:
        return text
    return f"{text[:40]}... ({len(text)} characters, xxh3 {xxhash.xxh3_128_hexdigest(text.encode())})"
