"""What a plan says of memory: weights, cache, quantized ones, and each device's share where there are several."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engines.api import EngineConfig
from engines.checkpoint import TensorInfo
from engines.cpu.offers import Config as CpuConfig
from runner.config import ModelConfig, ParallelismConfig
from runner.errors import ConfigError, EngineError
from runner.plan import resolve
from tests.runner.planning import CPU, H200, checkpoint, job, missed, offer_nothing, planning


def test_memory_of_llama_3_8b(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_nothing(monkeypatch, "cuda", "triton")
    config = EngineConfig(kv_memory_fraction=0.5)
    plan = resolve(planning(H200, backend_config=config), checkpoint(), H200, "generate")
    on_gpu = plan.memory[1]
    assert on_gpu.device == "NVIDIA H200" and on_gpu.fits
    assert on_gpu.weight_bytes == 16_060_522_496 and on_gpu.kv_bytes_per_token == 131_072
    free = (141 << 30) - 16_060_522_496 - on_gpu.activation_bytes
    assert on_gpu.kv_tokens == free // 2 // 131_072
    assert on_gpu.num_seqs(1000) == on_gpu.kv_tokens // 1000
    assert plan.memory[0].fits is None, "the processor of a described GPU machine is not described"
    assert "KV cache 262,144 bytes a token; not known to fit" in plan.text()
    assert "not described, so whether the model fits is not known" in "\n".join(plan.notes)


def test_the_cache_is_no_larger_than_can_be_in_use() -> None:
    config = EngineConfig(max_num_seqs=4, max_model_len=100, block_size=32)
    for dp in (1, 2):
        memory = resolve(
            job(backend_config=config, parallelism=ParallelismConfig(dp=dp)), checkpoint(), CPU, "generate"
        ).memory[0]
        assert (memory.kv_tokens, memory.num_seqs(128)) == (dp * 4 * 128, dp * 4)


def test_weights_count_in_the_compute_dtype_and_tied_heads_once() -> None:
    tensors = {
        "model.embed_tokens.weight": TensorInfo("f", "BF16", (10, 4), 0, 80),
        "lm_head.weight": TensorInfo("f", "BF16", (10, 4), 80, 80),
    }
    for tied, dtype, expected in ((False, "float32", 320), (True, "float32", 160), (True, "bfloat16", 80)):
        opened = replace(checkpoint(tie_word_embeddings=tied), tensors=tensors)
        plan = resolve(job(model=ModelConfig("x", dtype=dtype)), opened, CPU, "generate")
        assert plan.memory[0].weight_bytes == expected


def test_a_model_larger_than_memory_is_refused_with_the_numbers() -> None:
    small = replace(CPU, memory_bytes=8 << 30, free_bytes=8 << 30, cpu_memory_bytes=8 << 30)
    with pytest.raises(EngineError, match=r"cpu: memory: weights 16\.1 GB \+ activations .* > 8\.6 GB of a CPU"):
        resolve(job(), checkpoint(), small, "generate")


def test_little_free_memory_is_said() -> None:
    busy = replace(CPU, free_bytes=1 << 30, cpu_memory_bytes=1 << 30)
    assert "close other programs" in "\n".join(resolve(job(), checkpoint(), busy, "generate").notes)


def test_a_cache_smaller_than_one_request_is_said() -> None:
    config = EngineConfig(kv_cache_bytes=1000 * 131_072)
    notes = "\n".join(resolve(job(backend_config=config), checkpoint(), CPU, "generate").notes)
    assert "KV cache: holds 1,000 tokens, fewer than max_model_len=8,192" in notes


# Quantized weights and caches


def test_weights_that_are_dequantized_at_load_are_counted_so() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    plan = resolve(job(), checkpoint(quantization_config=awq), CPU, "generate")
    text = "awq: weights are dequantized to bfloat16 at load and take the memory of that"
    assert text in next(verdict for verdict in plan.verdicts if verdict.engine == "cpu").notes
    plain = resolve(job(), checkpoint(), CPU, "generate")
    assert plan.memory[0].weight_bytes == plain.memory[0].weight_bytes


def test_weights_that_stay_integers_on_a_matrix_unit_are_counted_so() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}
    amx, w8a16 = replace(CPU, cpu_tiles=True), replace(job().model, quantization="w8a16")
    for wanted, of, kept in (
        (job(), checkpoint(quantization_config=awq), True),
        (job(), checkpoint(quantization_config={**awq, "group_size": 48}), False),
        (job(), checkpoint(quantization_config=gptq), False),
        (job(backend_config=EngineConfig(dtype="float32")), checkpoint(quantization_config=awq), False),
        (job(model=w8a16), checkpoint(), True),
    ):
        cpu = next(verdict for verdict in resolve(wanted, of, amx, "generate").verdicts if verdict.engine == "cpu")
        assert any("weights are dequantized" in note for note in cpu.notes) != kept
    eight, plain = (resolve(job(model=m), checkpoint(), amx, "generate") for m in (w8a16, job().model))
    assert eight.memory[0].weight_bytes < 0.6 * plain.memory[0].weight_bytes


def test_quantization_at_load_is_planned_for() -> None:
    """Engines without it say what they lack, and a quantized checkpoint is not quantized again."""
    wanted = job(model=replace(job().model, quantization="int8"))
    plan, plain = resolve(wanted, checkpoint(), CPU, "generate"), resolve(job(), checkpoint(), CPU, "generate")
    assert plan.settings.quantization == "int8" and plain.settings.quantization is None
    assert plan.settings.backend == "cpu"
    assert plan.memory[0].weight_bytes < plain.memory[0].weight_bytes
    t4 = replace(H200, name="t4", compute_capability=(7, 5))
    elsewhere = resolve(planning(t4, model=wanted.model), checkpoint(), t4, "generate")
    assert "sm 7.5 < 8.0 for w8a8" in missed(elsewhere, "triton")
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    with pytest.raises(ConfigError, match=r"model\.quantization: int8, and .* quantized already \(awq\)"):
        resolve(wanted, checkpoint(quantization_config=awq), CPU, "generate")


def test_a_quantized_cache_holds_more_and_is_part_of_the_requirements() -> None:
    plain = resolve(job(), checkpoint(), CPU, "generate")
    small = resolve(
        planning(CPU, backend="cpu", backend_config=CpuConfig(kv_dtype="int8")), checkpoint(), CPU, "generate"
    )
    size = plain.memory[0].kv_bytes_per_token // 2
    assert size < small.memory[0].kv_bytes_per_token < size * 1.2
    assert small.settings.config.kv_dtype == "int8"
    slow = planning(replace(CPU, extensions=frozenset()), backend="cpu", backend_config=CpuConfig(kv_dtype="int8"))
    bare = resolve(slow, checkpoint(), replace(CPU, extensions=frozenset()), "generate")
    for plan, noted in ((small, False), (bare, True)):
        notes = [note for verdict in plan.verdicts for note in verdict.notes]
        assert any("quantized_attention" in note for note in notes) is noted
    through = planning(CPU, backend="cpu", backend_config=CpuConfig(kv_dtype="int8"))
    with pytest.raises(EngineError, match="transformers_model kv_dtype=int8: cpu does not offer it"):
        resolve(through, checkpoint(architectures=["GPT2LMHeadModel"], n_positions=1024), CPU, "generate", True)


# Several devices


def test_parallelism_that_the_model_cannot_have() -> None:
    with pytest.raises(EngineError, match=r"cpu: parallelism.tp: 3; num_attention_heads is 32, and 32 / 3 leaves 2"):
        resolve(job(parallelism=ParallelismConfig(tp=3)), checkpoint(), CPU, "generate")
    with pytest.raises(EngineError, match=r"cpu: parallelism.tp: 64; num_attention_heads is 32, and 32 / 64 leaves 32"):
        resolve(job(parallelism=ParallelismConfig(tp=64)), checkpoint(), CPU, "generate")


def test_a_plan_says_what_each_device_holds() -> None:
    whole = resolve(planning(H200), checkpoint(), H200, "generate")
    wide = planning(H200, parallelism=ParallelismConfig(tp=4, dp=2))
    plan = resolve(wide, checkpoint(), replace(H200, num_devices=8), "generate")
    assert (plan.settings.tp, plan.settings.ep) == (4, 1)
    line = next(line for line in plan.text().splitlines() if line.startswith("parallel "))
    assert line == (
        "parallel  tp 4, dp 2, ep 1: 8 devices in 2 engines; a device holds 8 of 32 heads, 2 of 8 KV heads, 3,584 of "
        "14,336 intermediate features, 32,064 of 128,256 tokens of the vocabulary, and all norms"
    )
    of_whole, of_rank = whole.memory[-1], plan.memory[-1]
    assert of_rank.kv_bytes_per_token * 4 == of_whole.kv_bytes_per_token
    assert 0.25 < of_rank.weight_bytes / of_whole.weight_bytes < 0.2501
    few = "parallelism: tp * dp = 4 * 2 = 8 devices; h200 has 1"
    assert few in missed(resolve(wide, checkpoint(), H200, "generate"), "triton")


def test_weights_of_8_bits_with_inputs_in_the_compute_dtype_are_planned_for() -> None:
    """backend=auto goes past an engine that would dequantize them for nothing, and counts memory as it is held."""
    model = replace(job().model, quantization="w8a16")
    plan = resolve(planning(H200, model=model), checkpoint(), H200, "generate")
    assert plan.settings.backend == "triton" and plan.settings.quantization == "w8a16"
    assert any(text.startswith("linear quantization=w8a16: cuda offers awq,") for text in missed(plan, "cuda"))
    int8 = planning(H200, model=replace(model, quantization="int8"))
    eight = resolve(int8, checkpoint(), H200, "generate")
    assert plan.memory[0].weight_bytes == eight.memory[0].weight_bytes
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    with pytest.raises(ConfigError, match=r"model\.quantization: w8a16, and .* quantized already \(awq\)"):
        resolve(job(model=model), checkpoint(quantization_config=awq), CPU, "generate")
    here, plain = (resolve(job(model=m), checkpoint(), CPU, "generate") for m in (model, job().model))
    text = "w8a16: weights are dequantized to bfloat16 at load and take the memory of that"
    assert text in next(verdict for verdict in here.verdicts if verdict.engine == "cpu").notes
    assert here.memory[0].weight_bytes == plain.memory[0].weight_bytes
    halved = planning(replace(H200, num_devices=2), model=model, parallelism=ParallelismConfig(tp=2))
    assert resolve(halved, checkpoint(), replace(H200, num_devices=2), "generate").settings.tp == 2


def test_copies_of_the_model_on_one_processor_take_memory_each() -> None:
    one, two = (resolve(job(parallelism=ParallelismConfig(dp=dp)), checkpoint(), CPU, "generate") for dp in (1, 2))
    assert two.memory[0].weight_bytes == 2 * one.memory[0].weight_bytes
    config = EngineConfig(kv_cache_bytes=10_000 * 131_072)  # of 10,000 tokens, and of 5,000 each
    notes = [
        resolve(job(parallelism=ParallelismConfig(dp=dp), backend_config=config), checkpoint(), CPU, "generate").notes
        for dp in (1, 2)
    ]
    assert "KV cache" not in " ".join(notes[0])
    assert "KV cache of each copy of the model: holds 5,000 tokens, fewer than max_model_len" in "\n".join(notes[1])
    elsewhere = resolve(planning(H200, parallelism=ParallelismConfig(dp=2)), checkpoint(), H200, "generate")
    assert "tp * dp = 1 * 2 = 2 devices; h200 has 1" in " ".join(missed(elsewhere, "triton"))
