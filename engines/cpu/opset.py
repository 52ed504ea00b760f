"""The ops of the CPU engine: the reference, but for what is faster here."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

from torch import Tensor

from engines import extension, ops
from engines.cpu import attention, block, linear, memory


class OpSet(ops.OpSet):
    """oneDNN for products; the compiled library's ops where it was built, else attention on plain torch."""

    prepare_linear = linear.prepare_linear
    prepare_quantized = linear.prepare_quantized
    prepare_block = block.prepare_block
    mlp = block.mlp
    linear = staticmethod(linear.linear)
    paged_attention = staticmethod(attention.paged_attention)
    allocate_kv_cache = staticmethod(memory.allocate_kv_cache)
    allocate_quantized_kv_cache = staticmethod(memory.allocate_quantized_kv_cache)
    quantized_attention: Callable[..., Tensor]
    rope_write_kv: Callable[..., None]

    def __init__(self) -> None:
        memory.keep_freed_memory()
        memory.keep_few_products()
        if extension.reason() is None:
            extension.load()
            from engines.cpu import compiled

            self.paged_attention = compiled.paged_attention
            self.allocate_kv_cache = compiled.allocate_kv_cache
            self.rms_norm, self.add_rms_norm = compiled.rms_norm, compiled.add_rms_norm
            self.rope, self.write_kv = compiled.rope, compiled.write_kv
            self.rope_write_kv = MethodType(compiled.rope_write_kv, self)
            self.quantized_attention = compiled.quantized_attention
            self.write_quantized_kv = compiled.write_quantized_kv
            self.layer_norm, self.encoder_attention = compiled.layer_norm, compiled.encoder_attention
            self.act, self.act_and_mul, self.argmax = compiled.act, compiled.act_and_mul, compiled.argmax
            self.log_softmax_gather = compiled.log_softmax_gather
