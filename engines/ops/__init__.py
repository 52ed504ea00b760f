"""The ops an engine is made of: one method an op, each bound here to its reference in plain torch.

A backend subclasses OpSet and overrides what it does faster. Where an op comes from can be asked: `origin`.
Shapes, dtypes and rounding are in the docstrings of the references, which are the contract.
"""

from __future__ import annotations

from engines.ops import activation, attention, block, embedding, kv_cache, linear, lora, moe, norm, rotary, sampling


class OpSet:
    """Every op on plain torch; right on every device, and what the overrides are tested against.

    Ops that are made of others (experts of products and activations) take those of the same op set.
    """

    invariant: bool = True
    """Whether a token's bits may not depend on what else is in the batch, where that takes time."""

    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    layer_norm = staticmethod(norm.layer_norm)
    rope = staticmethod(rotary.rope)
    allocate_kv_cache = staticmethod(kv_cache.allocate_kv_cache)
    write_kv = staticmethod(kv_cache.write_kv)
    paged_attention = staticmethod(attention.paged_attention)
    allocate_quantized_kv_cache = staticmethod(kv_cache.allocate_quantized_kv_cache)
    write_quantized_kv = staticmethod(kv_cache.write_quantized_kv)
    rope_write_kv = kv_cache.rope_write_kv
    quantized_attention = attention.quantized_attention
    allocate_latent_cache = staticmethod(kv_cache.allocate_latent_cache)
    write_latent = staticmethod(kv_cache.write_latent)
    rope_write_latent = kv_cache.rope_write_latent
    latent_attention = staticmethod(attention.latent_attention)
    encoder_attention = staticmethod(attention.encoder_attention)
    act = staticmethod(activation.act)
    act_and_mul = staticmethod(activation.act_and_mul)
    softcap = staticmethod(activation.softcap)
    prepare_linear = staticmethod(linear.prepare_linear)
    prepare_quantized = linear.prepare_quantized
    add_rms_norm_for = linear.add_rms_norm_for
    act_and_mul_for = linear.act_and_mul_for
    mlp = linear.mlp
    prepare_block = block.prepare_block
    head_linear = staticmethod(linear.head_linear)
    linear = staticmethod(linear.linear)
    lora = staticmethod(lora.lora)
    prepare_experts = moe.prepare_experts
    route = staticmethod(moe.route)
    fused_experts = moe.fused_experts
    embedding = staticmethod(embedding.embedding)
    apply_penalties = staticmethod(sampling.apply_penalties)
    argmax = staticmethod(sampling.argmax)
    sample = staticmethod(sampling.sample)
    log_softmax_gather = staticmethod(sampling.log_softmax_gather)
    top_logprobs = staticmethod(sampling.top_logprobs)


OP_NAMES = tuple(name for name in vars(OpSet) if not name.startswith("_") and callable(getattr(OpSet, name)))


def origin(ops: OpSet, op: str) -> str:
    """The module that an op set takes an op from, as the plan names it: "reference" or the module's dotted name."""
    module = getattr(ops, op).__module__
    return "reference" if module.startswith("engines.ops.") else module
