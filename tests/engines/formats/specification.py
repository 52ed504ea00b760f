"""What stored tensors mean, element by element in numpy: written from the formats' publications, not from our code."""

from __future__ import annotations

import numpy as np

Tensors = dict[str, np.ndarray]


def field(word: int, number: int, bits: int) -> int:
    """The number-th field of a 32-bit word, from the lowest."""
    return (int(word) & 0xFFFFFFFF) >> (number * bits) & (2**bits - 1)


def awq(t: Tensors, group_size: int) -> np.ndarray:
    """AutoAWQ, gemm: feature f of a word of eight is in the field at its place in AWQ_PACK_ORDER."""
    place = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
    inputs, outputs = t["qweight"].shape[0], t["qweight"].shape[1] * 8
    weight = np.empty((outputs, inputs))
    for o in range(outputs):
        for i in range(inputs):
            q = field(t["qweight"][i, o // 8], place[o % 8], 4)
            z = field(t["qzeros"][i // group_size, o // 8], place[o % 8], 4)
            weight[o, i] = (q - z) * float(t["scales"][i // group_size, o])
    return weight


def gptq(t: Tensors, bits: int, offset: int = 1) -> np.ndarray:
    """AutoGPTQ: rows of words hold consecutive inputs; zeros are stored less `offset`, modulo 2 ** bits."""
    per = 32 // bits
    inputs, outputs = t["qweight"].shape[0] * per, t["qweight"].shape[1]
    weight = np.empty((outputs, inputs))
    for o in range(outputs):
        for i in range(inputs):
            group = int(t["g_idx"][i])
            q = field(t["qweight"][i // per, o], i % per, bits)
            z = (field(t["qzeros"][group, o // per], o % per, bits) + offset) % 2**bits
            weight[o, i] = (q - z) * float(t["scales"][group, o])
    return weight


def pack_quantized(t: Tensors, bits: int, group_size: int) -> np.ndarray:
    """compressed-tensors: signed numbers, stored plus 2 ** (bits - 1); zero points packed along outputs."""
    per = 32 // bits
    outputs, inputs = (int(n) for n in t["weight_shape"])
    weight = np.empty((outputs, inputs))
    middle = 2 ** (bits - 1)
    for o in range(outputs):
        for i in range(inputs):
            group = i // group_size
            q = field(t["weight_packed"][o, i // per], i % per, bits) - middle
            z = 0
            if "weight_zero_point" in t:
                z = field(t["weight_zero_point"][o // per, group], o % per, bits) - middle
            weight[o, i] = (q - z) * float(t["weight_scale"][o, group])
    return weight


def e4m3(byte: int) -> float:
    """OCP FP8, section 5: one sign, four exponent bits with bias 7, three of mantissa; no infinities."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def float8(data: np.ndarray, scales: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """data: the bytes."""
    weight = np.empty(data.shape)
    for o in range(data.shape[0]):
        for i in range(data.shape[1]):
            weight[o, i] = e4m3(int(data[o, i])) * float(scales[o // tile[0], i // tile[1]])
    return weight


def e2m1(code: int) -> float:
    """OCP MX, section 5.3.3: one sign, two exponent bits with bias 1, one of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks: [rows, groups, 16]; scales: [rows, groups]."""
    weight = np.empty((blocks.shape[0], blocks.shape[1] * 32))
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            byte = int(blocks[o, i // 32, i % 32 // 2])
            code = byte >> 4 if i % 2 else byte & 15
            weight[o, i] = e2m1(code) * 2.0 ** (int(scales[o, i // 32]) - 127)
    return weight
