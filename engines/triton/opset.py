"""The ops of the Triton engine: a kernel for each, but for those that are a call of torch's own: products, look-ups,
and the most probable tokens.
"""

from __future__ import annotations

from engines import ops
from engines.triton import activation, attention, kv_cache, linear, lora, moe, norm, rotary, sampling


class OpSet(ops.OpSet):
    """On any device that Triton compiles for, and on the processor under TRITON_INTERPRET=1."""

    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    layer_norm = staticmethod(norm.layer_norm)
    rope = staticmethod(rotary.rope)
    lora = staticmethod(lora.lora)
    write_kv = staticmethod(kv_cache.write_kv)
    write_quantized_kv = staticmethod(kv_cache.write_quantized_kv)
    rope_write_kv = kv_cache.rope_write_kv
    write_latent = staticmethod(kv_cache.write_latent)
    rope_write_latent = kv_cache.rope_write_latent
    paged_attention = staticmethod(attention.paged_attention)
    quantized_attention = staticmethod(attention.quantized_attention)
    latent_attention = staticmethod(attention.latent_attention)
    encoder_attention = staticmethod(attention.encoder_attention)
    act = staticmethod(activation.act)
    act_and_mul = staticmethod(activation.act_and_mul)
    softcap = staticmethod(activation.softcap)
    prepare_quantized = linear.prepare_quantized
    linear = staticmethod(linear.linear)
    prepare_experts = moe.prepare_experts
    route = staticmethod(moe.route)
    fused_experts = moe.fused_experts
    sample = staticmethod(sampling.sample)
    apply_penalties = staticmethod(sampling.apply_penalties)
    log_softmax_gather = staticmethod(sampling.log_softmax_gather)
