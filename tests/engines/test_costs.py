"""Costs against arithmetic by hand and against real modules."""

from __future__ import annotations

import pytest

from engines import costs, discover
from engines.models.spec import DecoderSpec, EncoderSpec, RopeSpec

LLAMA_3_8B = DecoderSpec(128256, 4096, 14336, 32, 32, 8, 128, 8192, RopeSpec(500000.0))
QWEN2_7B = DecoderSpec(152064, 3584, 18944, 28, 28, 4, 128, 32768, RopeSpec(1e6), qkv_bias=True)
BERT_BASE = EncoderSpec(30522, 768, 3072, 12, 12, 512, 2)


def test_llama_3_8b_by_hand() -> None:
    """8,030,261,248 parameters, as its model card says (8.03 B; 16.06 GB in bfloat16)."""
    assert costs.num_parameters(LLAMA_3_8B) == 8_030_261_248
    assert costs.weight_bytes(LLAMA_3_8B, "bfloat16") == 16_060_522_496
    assert costs.kv_bytes_per_token(LLAMA_3_8B, "bfloat16") == 2 * 32 * 8 * 128 * 2 == 131_072


def test_qwen2_7b_and_bert_base_by_hand() -> None:
    assert costs.num_parameters(QWEN2_7B) == 7_615_616_512  # model card: 7.62 B
    # bert-base without its pooler (590,592): 109,482,240 with it.
    assert costs.num_parameters(BERT_BASE) == 109_482_240 - 590_592
    assert costs.kv_bytes_per_token(BERT_BASE, "float32") == 0


PUBLISHED = {
    "mixtral 8x7b": ("mixtral", 46.7e9, {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}, 12.9e9),
    "qwen3 30b a3b": ("qwen3_moe", 30.5e9, {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768}, 3.3e9),
    "gpt-oss 20b": ("gpt_oss", 20.9e9, {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4}, 3.6e9),
    "deepseek v3": ("deepseek_v3", 671e9, {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128}, 37e9),
}  # fmt: skip
"""Total and active parameters, as the model cards have them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_mixtures_by_their_model_cards(name: str) -> None:
    family, total, config, active = PUBLISHED[name]
    spec = discover.families()[family].spec(config)
    assert costs.num_parameters(spec) == pytest.approx(total, rel=5e-3)
    # Cards differ in whether embeddings count as active.
    found = costs.matrix_parameters(spec) + costs.head_parameters(spec)
    assert found == pytest.approx(active, rel=0.1)
    few, many = (costs.step(spec, "bfloat16", n, 0, 0).num_bytes for n in (1, 1000))
    assert few < 2.1 * active
    assert many > 1.99 * (total - 2 * spec.vocab_size * spec.hidden_size)


def test_a_latent_cache_is_one_vector_a_token() -> None:
    spec = discover.families()["deepseek_v3"].spec(PUBLISHED["deepseek v3"][2])
    assert costs.kv_bytes_per_token(spec, "bfloat16") == 61 * 576 * 2


def test_a_token_costs_two_operations_a_weight() -> None:
    cost = costs.step(LLAMA_3_8B, "bfloat16", num_tokens=1, kv_tokens=0, num_outputs=1)
    weights = costs.num_parameters(LLAMA_3_8B) - costs.embedding_parameters(LLAMA_3_8B)
    assert cost.flops == pytest.approx(2 * weights, rel=1e-3)
    assert cost.num_bytes == pytest.approx(2 * weights, rel=1e-3)


def test_decoding_reads_each_sequences_cache() -> None:
    without = costs.step(LLAMA_3_8B, "bfloat16", 8, 0, 8)
    with_cache = costs.step(LLAMA_3_8B, "bfloat16", 8, 8 * 1000, 8)
    assert with_cache.num_bytes - without.num_bytes == 8 * 1000 * 131_072
    assert with_cache.flops - without.flops == 4 * 8 * 1000 * 32 * 128 * 32


def test_windows_hide_tokens() -> None:
    windowed = DecoderSpec(100, 64, 128, 4, 4, 4, 16, 4096, RopeSpec(), windows=(100, 0, 100, 0))
    assert costs.visible_tokens(windowed, 1000) == 550
    assert costs.visible_tokens(windowed, 50) == 50


def test_a_job_grows_with_rows_and_stays_a_floor() -> None:
    one = costs.job(LLAMA_3_8B, "bfloat16", 1000, 500, 200, 128)
    ten = costs.job(LLAMA_3_8B, "bfloat16", 10_000, 500, 200, 128)
    for small, large in zip(one, ten, strict=True):
        assert large.flops == pytest.approx(10 * small.flops, rel=1e-6)
        assert large.num_bytes == pytest.approx(10 * small.num_bytes, rel=1e-6)
    matrices = 2 * (costs.num_parameters(LLAMA_3_8B) - 2 * 128256 * 4096)
    assert one[0].flops > 500_000 * matrices * 0.999
    assert costs.job(LLAMA_3_8B, "bfloat16", 10, 100, 0, 8)[1] == costs.Cost(0, 0)
    assert costs.job(LLAMA_3_8B, "bfloat16", 0, 0, 0, 8)[0].flops == 0


def test_roofline_time_is_the_longer_side() -> None:
    assert costs.Cost(10.0, 100.0).time_s(bytes_s=1.0, flops_s=1.0) == 100
    assert costs.Cost(10.0, 100.0).time_s(bytes_s=0.01, flops_s=1.0) == 1000


@pytest.mark.parametrize("family", discover.families())
def test_parameters_of_every_family_match_transformers(family: str) -> None:
    """num_parameters against the class that transformers has for the family's tiny configuration."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    module = discover.families()[family]
    config = module.tiny_config()
    spec = module.spec(config)
    name = config["architectures"][0]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers has no {name}")
    # The names that config.json has are the arguments of the class; unused positions are allowed.
    read = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, name)(read)
    theirs = sum(parameter.numel() for parameter in model.parameters())
    if not spec.num_labels:  # a pooler is in the class, and in no result but a classification head's
        theirs -= sum(parameter.numel() for n, parameter in model.named_parameters() if "pooler" in n)
    assert costs.num_parameters(spec) == theirs
