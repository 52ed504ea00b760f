"""A one-layer attention model in a few lines: what the engine's tests run, with an answer known without an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines.api import GPUConfig
from engines.batch import Batch
from engines.core.device import Device, Download
from engines.core.engine import LLMEngine
from engines.models.spec import DecoderSpec, RopeSpec
from engines.ops import OpSet
from engines.ops.kv_cache import KVCache

VOCAB, HEADS, DIM = 53, 2, 8


class TinyModel:
    """Embedding, position, paged attention, head; float64, so that the order of sums never decides a token."""

    paged = True
    adapters: tuple[str, ...] = ()
    num_cache_layers, num_kv_heads, head_dim, latent_rank = 1, HEADS, DIM, 0
    vocab_size, hidden_size = VOCAB, HEADS * DIM

    def __init__(self, max_model_len: int = 96, poison: int | None = None) -> None:
        """poison: a token id that makes `forward` raise when it is among the new tokens."""
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.max_model_len = max_model_len
        self.poison = poison
        self.embedding, self.position = weight(VOCAB, HEADS * DIM), weight(max_model_len + 1, HEADS * DIM)
        self.qkv, self.head = weight(HEADS * DIM, 3 * HEADS * DIM), weight(HEADS * DIM, VOCAB)
        self.spec = DecoderSpec(VOCAB, HEADS * DIM, 1, 1, HEADS, HEADS, DIM, max_model_len, RopeSpec())
        self.ops = OpSet()
        self.released: list[int] = []

    def forward(self, batch: Batch, caches: list[KVCache]) -> Tensor:
        if self.poison is not None and bool((batch.token_ids == self.poison).any()):
            raise RuntimeError("poison")
        x = self.embedding[batch.token_ids] + self.position[batch.positions]
        q, k, v = (part.unflatten(1, (HEADS, DIM)) for part in (x @ self.qkv).chunk(3, dim=1))
        assert batch.slot_mapping is not None
        self.ops.write_kv(k, v, caches[0], batch.slot_mapping)
        x = x + self.ops.paged_attention(q, caches[0], batch, DIM**-0.5).flatten(1)
        return x if batch.output_indices is None else x[batch.output_indices]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head

    def classify(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.head)[:, :3].float()

    def context_key(self, num_prompt_tokens: int, num_tokens: int) -> int:
        return 0

    def close(self) -> None:
        pass

    def release(self, seq_id: int) -> None:
        self.released.append(seq_id)

    def all_hidden(self, token_ids: Sequence[int]) -> Tensor:
        """Hidden states of a text, without cache, batch or engine."""
        ids = torch.tensor(token_ids)
        x = self.embedding[ids] + self.position[torch.arange(len(ids))]
        q, k, v = (part.unflatten(1, (HEADS, DIM)).transpose(0, 1) for part in (x @ self.qkv).chunk(3, dim=1))
        scores = q @ k.transpose(1, 2) * DIM**-0.5
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), float("-inf"))
        return x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.logits(self.all_hidden(ids)[-1:]).argmax()))
        return ids[len(prompt) :]


class Recorded(TorchDispatchMode):
    """The operations of a piece of code and the tensors that they gave, which `replay` fills again."""

    WAIT = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::item", "aten::nonzero")
    """Operations whose result the host has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self.WAIT:
            raise RuntimeError(f"{func} waits for the device")
        given = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, given))
        return given

    def replay(self) -> None:
        for func, args, kwargs, given in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(given), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Late(Device):
    """A processor that stands in for an accelerator: what is drawn cannot be read before it was waited for, and time is
    counted, not spent. A step takes the device `step_s` from its launch on, or from the end of the step before.
    """

    def __init__(self, step_s: float = 1.0) -> None:
        super().__init__(torch.device("cpu"))
        self.overlaps = True
        self.step_s = step_s
        self.now_s = self.busy_until_s = 0.0
        self.num_launched = self.num_idle = 0
        """Steps, and waits with nothing behind what was waited for."""
        self.memory_bytes, self.step_bytes, self.graph_bytes = 1 << 40, 0, 0
        """Free at first; what a step takes; what a captured graph takes."""
        self.can_capture = False
        self.num_captured = self.num_replayed = 0

    def download(self, tensors: Sequence[Tensor]) -> Download:
        self.num_launched += 1
        self.busy_until_s = max(self.busy_until_s, self.now_s) + self.step_s
        return LateDownload(self, list(tensors))

    @property
    def captures(self) -> bool:
        return self.can_capture

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """The operations of the call, without the Python around them: what a graph keeps."""
        self.num_captured += 1
        self.memory_bytes -= self.graph_bytes
        with Recorded() as recorded:
            result = call()

        def replay() -> None:
            self.num_replayed += 1
            recorded.replay()

        return replay, result

    def free_bytes(self) -> int:
        return self.memory_bytes

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        return self.step_bytes


class MaskedOps(OpSet):
    """Attention for one new token a sequence, without asking how long any is: what can be captured."""

    @staticmethod
    def paged_attention(
        q: Tensor,
        cache: KVCache,
        batch: Batch,
        softmax_scale: float,
        window_size: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if batch.max_seqlen_q > 1:
            return OpSet.paged_attention(q, cache, batch, softmax_scale)
        assert batch.block_tables is not None
        k, v = (t[batch.block_tables.long()].transpose(2, 3).flatten(1, 2) for t in (cache.k, cache.v))
        scores = torch.einsum("nhd,nthd->nht", q, k) * softmax_scale
        hidden = torch.arange(k.shape[1]) >= batch.seq_lens[:, None]
        scores = scores.masked_fill(hidden[:, None], float("-inf"))
        weights = scores.softmax(-1)
        return torch.einsum("nht,nthd->nhd", weights, v.masked_fill(hidden[:, :, None, None], 0.0))


class LateDownload(Download):
    def __init__(self, device: Late, tensors: list[Tensor]) -> None:
        super().__init__(tensors)
        self.device, self.number, self.ready_s = device, device.num_launched, device.busy_until_s

    def wait(self) -> list[Tensor]:
        self.device.now_s = max(self.device.now_s, self.ready_s)
        self.device.num_idle += self.device.num_launched == self.number
        return super().wait()


def make_engine(
    model: TinyModel,
    num_blocks: int = 64,
    pooling: str | None = None,
    device: Device | None = None,
    watch: Callable[[Sequence[int]], None] = lambda request_ids: None,
    **config: object,
) -> LLMEngine:
    settings = GPUConfig(**{"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, **config})  # type: ignore[arg-type]
    return LLMEngine(
        model,
        model.ops,
        settings,
        num_blocks,
        torch.float64,
        device or Device(torch.device("cpu")),
        eos_token_ids=(1,),
        detokenize=lambda ids: "".join(chr(ord("a") + i % 26) for i in ids),
        pooling=pooling,
        watch=watch,
    )


def make_late(model: TinyModel, **options: Any) -> LLMEngine:
    """On a device that computes while the host goes on."""
    return make_engine(model, device=Late(), **options)
