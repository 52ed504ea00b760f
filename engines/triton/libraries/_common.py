"""What libraries share: versions, and modules that have what is called of them. No torch at import."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engines.api import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

    from engines.batch import Batch
    from engines.ops import OpSet
    from engines.ops.kv_cache import KVCache


def release(version: str) -> tuple[int, int]:
    """(major, minor) of "0.7.2.post1"; (0, 0) of what is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def function(module: str, path: str, parameters: Sequence[str]) -> Any:
    """A function or class of an installed library; path: "Class.method" checks the method and gives the class.

    Raises UnsupportedModelError where the library cannot be imported, or does not take these parameters.
    """
    own = "reinstall it for this torch, or set backend_config.attention=own"
    try:
        first = found = getattr(importlib.import_module(module), path.split(".")[0])
        for name in path.split(".")[1:]:
            found = getattr(found, name)
    except (ImportError, OSError, AttributeError) as error:
        raise UnsupportedModelError(
            f"backend_config.attention: {module}.{path} cannot be had ({error}); expected what is installed to work; "
            f"{own}"
        ) from error
    lacking = [name for name in parameters if name not in inspect.signature(found).parameters]
    if lacking:
        raise UnsupportedModelError(
            f"backend_config.attention: {module}.{path} has no {', '.join(lacking)}; expected the interface that "
            f"docs/gpu.md names; {own}"
        )
    return first


def attach(ops: OpSet, taken: Sequence[str], prompts: object) -> None:
    """Have an op set take ops from an object that computes prompts by a library, under the names of the ops."""
    for op in taken:
        setattr(ops, op, getattr(prompts, op))


def paged_attention(ops: OpSet, library: str, prompts: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op of this name whose prompts a library computes. Steps without prompts stay with the op set, and so do
    decoding sequences in a step with some.

    library: the module that plans name. prompts(q, cache, batch, softmax_scale, window_size, softcap): as the
    reference; rows of decoding sequences may be anything.
    """
    own = ops.paged_attention

    def paged_attention(
        q: Tensor,
        cache: KVCache,
        batch: Batch,
        softmax_scale: float,
        window_size: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As the reference, without sinks."""
        from engines.triton.attention import Scores, write_decoding

        assert sinks is None
        if batch.max_seqlen_q == 1 or not q.shape[0]:
            return own(q, cache, batch, softmax_scale, window_size, softcap)
        out = prompts(q, cache, batch, softmax_scale, window_size, softcap)
        write_decoding(out, q, cache, batch, Scores(softmax_scale, window_size, softcap))
        return out

    paged_attention.__module__ = library
    return paged_attention
