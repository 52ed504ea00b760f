// The library's own account of what was compiled: a text that lies in its data, so that plans read it without loading
// anything (engines/cuda/table.py). Each line: an op, an attribute, the values that it takes; `any` for all.

#include <primitives.cuh>

#include "attention.h"
#include "latent_attention.cuh"

#ifndef CUDA_OPS_SM
#define CUDA_OPS_SM ""
#endif
#define CUDA_OPS_NAME(D) " " #D
#define CUDA_OPS_RANK(RANK, ROPE) " " #RANK
#define CUDA_OPS_ROPE(RANK, ROPE) " " #ROPE
#define CUDA_OPS_FLOATS " float32 bfloat16 float16\n"
#define CUDA_OPS_HALVES " bfloat16 float16\n"

extern "C" __attribute__((visibility("default"), used)) const char cuda_ops_table[] =
    "cuda_ops table 1\n"
    "sm " CUDA_OPS_SM "\n"
    "rms_norm dtype" CUDA_OPS_FLOATS
    "rms_norm weight_offset any\n"
    "add_rms_norm dtype" CUDA_OPS_FLOATS
    "add_rms_norm weight_offset any\n"
    "rope dtype" CUDA_OPS_FLOATS
    "rope head_dim any\n"
    "rope rotary_dim any\n"
    "rope kind any\n"
    "write_kv dtype" CUDA_OPS_FLOATS
    "write_kv head_dim any\n"
    "rope_write_kv dtype" CUDA_OPS_FLOATS
    "rope_write_kv head_dim any\n"
    "rope_write_kv rotary_dim any\n"
    "rope_write_kv kv_dtype int8 int4 fp8\n"
    "add_rms_norm_for dtype" CUDA_OPS_HALVES
    "add_rms_norm_for weight_offset any\n"
    "add_rms_norm_for weights w8a8 fp8\n"
    "act_and_mul_for dtype" CUDA_OPS_HALVES
    "act_and_mul_for activation silu gelu gelu_tanh relu swiglu_oai\n"
    "act_and_mul_for weights w8a8 fp8\n"
    "act_and_mul dtype" CUDA_OPS_FLOATS
    "act_and_mul activation silu gelu gelu_tanh relu swiglu_oai\n"
    "linear weights w4a16 w8a8 fp8 mxfp4\n"
    "route scoring softmax softmax_of_chosen sigmoid\n"
    "fused_experts dtype" CUDA_OPS_HALVES
    "fused_experts activation silu gelu gelu_tanh relu swiglu_oai\n"
    "fused_experts weights w4a16 w8a8 fp8 mxfp4\n"
    "softcap dtype" CUDA_OPS_FLOATS
    "sample dtype float32\n"
    "apply_penalties dtype float32\n"
    "paged_attention dtype" CUDA_OPS_HALVES
    "paged_attention head_dim" CUDA_OPS_HEAD_DIMS(CUDA_OPS_NAME) "\n"
    "paged_attention group any\n"
    "paged_attention window any\n"
    "paged_attention softcap any\n"
    "paged_attention sinks any\n"
    "write_latent dtype" CUDA_OPS_FLOATS
    "write_latent kv_lora_rank any\n"
    "write_latent rope_dim any\n"
    "latent_attention dtype" CUDA_OPS_HALVES
    "latent_attention kv_lora_rank" CUDA_OPS_LATENTS(CUDA_OPS_RANK) "\n"
    "latent_attention rope_dim" CUDA_OPS_LATENTS(CUDA_OPS_ROPE) "\n"
    "write_quantized_kv dtype" CUDA_OPS_FLOATS
    "write_quantized_kv head_dim any\n"
    "write_quantized_kv kv_dtype int8 int4 fp8\n"
    "quantized_attention dtype" CUDA_OPS_HALVES
    "quantized_attention head_dim" CUDA_OPS_HEAD_DIMS(CUDA_OPS_NAME) "\n"
    "quantized_attention kv_dtype int8 int4 fp8\n"
    "quantized_attention group any\n"
    "quantized_attention window any\n"
    "quantized_attention softcap any\n"
    "quantized_attention sinks any\n"
    "end\n";
