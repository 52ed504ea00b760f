"""Kernels of products with weights, of one layer or of the experts of a mixture.

A program makes a tile of [BLOCK_N output features, BLOCK_T tokens]. Weights are the left side, so that 16 tokens fill
the tensor cores as well as 128 do, and so that packed weights are widened in the registers that feed the tensor cores.

Legend: E experts, T rows of tokens, N output features, K input features, C columns of a chunk (quantized.Packed).
Cost: weights once for each block of tokens, and 2 T N K operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

E2M1_FACTOR, E4M3_FACTOR = tl.constexpr(16384.0), tl.constexpr(256.0)
"""What a float of 4 or 8 bits is larger than the float16 with its bits: 2 ** (15 - bias)."""


@triton.jit
def widened(
    words: tl.tensor, zero: tl.tensor, PIECE: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr
) -> tl.tensor:
    """Values of one field of each word in float32; floats without their factor. zero: float32, to subtract.

    An integer is not moved to be converted: bits from AT on of the mantissa of 2 ** (23 - AT) count as they are.
    """
    FIRST: tl.constexpr = PIECE * BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    SHIFT: tl.constexpr = 0 if FIRST + BITS <= 23 else 12
    AT: tl.constexpr = FIRST - SHIFT
    if VALUES == "int":
        number = ((words >> SHIFT) & (MASK << AT)) | ((150 - AT) << 23)
        return number.to(tl.float32, bitcast=True) - (zero + (1 << (23 - AT)))
    elif VALUES == "e2m1":
        field = (words >> FIRST) & MASK
        half = ((field & 7) << 9) | ((field & 8) << 12)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        tl.static_assert(VALUES == "e4m3")
        field = (words >> FIRST) & MASK
        half = ((field & 127) << 7) | ((field & 128) << 8)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def paired(words: tl.tensor, PIECE: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Field PIECE of 4 bits of each word, plus `OFFSET`, in DTYPE: two fields of a word become floats at once, by their
    places in the last bits of 128 (bfloat16) or 1024 (float16)."""
    HIGH: tl.constexpr = 0x43004300 if tl.bfloat16 == DTYPE else 0x64006400
    both = ((words >> (PIECE % 4 * 4)) & 0x000F000F) | HIGH
    return (both >> (PIECE // 4 * 16)).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def load_scale(ptr: tl.tensor, at: tl.tensor, there: tl.tensor, VALUES: tl.constexpr) -> tl.tensor:
    """float32, with the factor of `widened`."""
    scale = tl.load(ptr + at, mask=there, other=0)
    if VALUES == "e2m1":
        return (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True) * E2M1_FACTOR
    elif VALUES == "e4m3":
        return scale.to(tl.float32) * E4M3_FACTOR
    else:
        return scale.to(tl.float32)


@triton.jit
def load_zero(ptr: tl.tensor, at: tl.tensor, there: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """float32; without an array, half of the codes' range."""
    if ptr is None:
        return tl.full(at.shape, 1 << (BITS - 1), tl.float32)
    else:
        return tl.load(ptr + at, mask=there, other=0).to(tl.float32)


@triton.jit
def load_slots(slots_ptr: tl.tensor, num_rows: tl.tensor, BLOCK_T: tl.constexpr) -> tl.tensor:
    """[BLOCK_T] int64: rows of the output, -1 where there is none."""
    places = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if slots_ptr is None:
        return tl.where(places < num_rows, places, -1).to(tl.int64)
    else:
        return tl.load(slots_ptr + places).to(tl.int64)


@triton.jit
def store_tile(
    out_ptr: tl.tensor, bias_ptr: tl.tensor, acc: tl.tensor, slots: tl.tensor, rows: tl.tensor, expert: tl.tensor,
    num_rows: tl.tensor, N: tl.tensor, SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """acc: [BLOCK_N, BLOCK_T]; out: [num_rows, N], or sums without a bias in [SPLITS, num_rows, N]."""
    if SPLITS > 1:
        out_ptr += tl.program_id(2).to(tl.int64) * num_rows * N
    elif bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * N + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    at = slots[None, :] * N + rows[:, None]
    mask = (slots >= 0)[None, :] & (rows < N)[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def packed_kernel(
    x_ptr: tl.tensor, words_ptr: tl.tensor, scales_ptr: tl.tensor, zeros_ptr: tl.tensor, bias_ptr: tl.tensor,
    slots_ptr: tl.tensor, experts_ptr: tl.tensor, out_ptr: tl.tensor, num_rows: tl.tensor, x_stride: tl.tensor,
    N: tl.tensor, K: tl.tensor, num_chunks: tl.tensor, num_groups: tl.tensor, step: tl.tensor, VALUES: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, EVEN_K: tl.constexpr, PAIRED: tl.constexpr,
    TOP_K: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: [blocks of tokens, cdiv(N, BLOCK_N), SPLITS]. x: [tokens, K] float; weights as quantized.Packed.

    GROUPS: groups of a chunk; then codes are multiplied as they are, exact in every dtype, and a group's sum is scaled
    in float32; `step` chunks share groups where GROUPS is 1. GROUPS 0: groups of `step` columns begin and end anywhere,
    and weights are rounded to x's dtype. EVEN_K: K is a multiple of C. PAIRED, for
    integers of 4 bits and inputs of 16: codes are multiplied with an offset, and the offset and the zero as a second
    product: twice the work for the tensor cores, which wait where tokens are few, and half of that for what feeds them.
    slots, experts: as linear.Sorted; x's row is the slot divided by TOP_K.
    """
    expert = tl.zeros([], tl.int64)
    if experts_ptr is not None:
        expert = tl.load(experts_ptr + tl.program_id(0)).to(tl.int64)
        if expert < 0:
            return
    slots = load_slots(slots_ptr, num_rows, BLOCK_T)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, WIDTH)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    OFFSET: tl.constexpr = 128.0 if tl.bfloat16 == DTYPE else 1024.0
    PIECES: tl.constexpr = 32 // BITS
    CHUNK: tl.constexpr = PIECES * WIDTH
    x_at = x_ptr + (slots // TOP_K)[:, None] * x_stride + inner[None, :]
    words_at = words_ptr + expert * num_chunks * N * WIDTH + rows[:, None] * WIDTH + inner[None, :]
    of_expert = expert * num_groups * N
    here = (slots >= 0)[:, None]
    share = tl.cdiv(num_chunks, SPLITS)
    first = tl.program_id(2) * share
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for chunk in range(first, tl.minimum(first + share, num_chunks)):
        words = tl.load(words_at + chunk * N * WIDTH, mask=(rows < N)[:, None], other=0)
        if GROUPS:
            for g in tl.static_range(GROUPS):
                group = chunk // step if GROUPS == 1 else chunk * GROUPS + g
                at = of_expert + group * N + rows
                known = (rows < N) & (group < num_groups)
                zero = load_zero(zeros_ptr, at, known, BITS)[:, None] if VALUES == "int" else 0.0
                sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
                if PAIRED:
                    none = (-(zero + OFFSET)).to(DTYPE).broadcast_to(BLOCK_N, WIDTH)
                for p in tl.static_range(g * PIECES // GROUPS, (g + 1) * PIECES // GROUPS):
                    column = chunk * CHUNK + p * WIDTH
                    mask = here if EVEN_K else here & (column + inner < K)[None, :]
                    x = tl.load(x_at + column, mask=mask, other=0.0)
                    if PAIRED:
                        sums = tl.dot(paired(words, p, DTYPE), tl.trans(x), sums)
                        sums = tl.dot(none, tl.trans(x), sums)
                    else:
                        weight = widened(words, zero, p, BITS, VALUES).to(x.dtype)
                        sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
                acc += sums * load_scale(scales_ptr, at, known, VALUES)[:, None]
        else:
            for p in tl.static_range(PIECES):
                column = chunk * CHUNK + p * WIDTH
                mask = here if EVEN_K else here & (column + inner < K)[None, :]
                x = tl.load(x_at + column, mask=mask, other=0.0)
                known = (rows < N)[:, None] & (column + inner < K)[None, :]
                at = of_expert + ((column + inner) // step)[None, :] * N + rows[:, None]
                zero = load_zero(zeros_ptr, at, known, BITS) if VALUES == "int" else 0.0
                weight = widened(words, zero, p, BITS, VALUES) * load_scale(scales_ptr, at, known, VALUES)
                acc = tl.dot(weight.to(x.dtype), tl.trans(x), acc, input_precision="ieee")
    store_tile(out_ptr, bias_ptr, acc, slots, rows, expert, num_rows, N, SPLITS)


@triton.jit(do_not_specialize=["num_rows"])
def even_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, x_scales_ptr: tl.tensor, scales_ptr: tl.tensor, bias_ptr: tl.tensor,
    slots_ptr: tl.tensor, experts_ptr: tl.tensor, out_ptr: tl.tensor, num_rows: tl.tensor, x_stride: tl.tensor,
    N: tl.tensor, K: tl.tensor, num_groups: tl.tensor, step: tl.tensor, VALUES: tl.constexpr, TOP_K: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """Grid, slots and experts as packed_kernel's. x: [tokens, K], weight: [E, N, K], of one type.

    VALUES: float (no scales); int8 (x_scales [tokens], scales [E, N]; sums in int32, scaled at the end or by
    join_kernel); e4m3 (x_scales [tokens, num_groups], scales [E, num_groups, N]; groups of `step` blocks of columns,
    scaled block by block, since the tensor cores of sm 90 keep 14 bits of a sum of float8 products only,
    arXiv 2412.19437 section 3.3.2).
    """
    expert = tl.zeros([], tl.int64)
    if experts_ptr is not None:
        expert = tl.load(experts_ptr + tl.program_id(0)).to(tl.int64)
        if expert < 0:
            return
    slots = load_slots(slots_ptr, num_rows, BLOCK_T)
    tokens = slots // TOP_K
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_at = x_ptr + tokens[:, None] * x_stride + inner[None, :]
    weight_at = weight_ptr + (expert * N + rows)[:, None] * K + inner[None, :]
    num_blocks = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(num_blocks, SPLITS)
    first = tl.program_id(2) * share
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.int32 if VALUES == "int8" else tl.float32)
    for block in range(first, tl.minimum(first + share, num_blocks)):
        inside = (block * BLOCK_K + inner < K)[None, :]
        x = tl.load(x_at + block * BLOCK_K, mask=(slots >= 0)[:, None] & inside, other=0.0)
        weight = tl.load(weight_at + block * BLOCK_K, mask=(rows < N)[:, None] & inside, other=0.0)
        if VALUES == "int8":
            acc = tl.dot(weight, tl.trans(x), acc, out_dtype=tl.int32)
        elif VALUES == "e4m3":
            group = block // step
            scale = tl.load(scales_ptr + (expert * num_groups + group) * N + rows, mask=rows < N, other=0.0)
            x_scale = tl.load(x_scales_ptr + tokens * num_groups + group, mask=slots >= 0, other=0.0)
            acc += tl.dot(weight, tl.trans(x)) * scale[:, None] * x_scale[None, :]
        else:
            acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    if VALUES == "int8" and SPLITS == 1:
        scale = tl.load(scales_ptr + expert * N + rows, mask=rows < N, other=0.0)
        x_scale = tl.load(x_scales_ptr + tokens, mask=slots >= 0, other=0.0)
        sums = acc.to(tl.float32) * x_scale[None, :] * scale[:, None]
        store_tile(out_ptr, bias_ptr, sums, slots, rows, expert, num_rows, N, SPLITS)
    else:
        store_tile(out_ptr, bias_ptr, acc, slots, rows, expert, num_rows, N, SPLITS)


@triton.jit(do_not_specialize=["num_rows"])
def join_kernel(
    parts_ptr: tl.tensor, x_scales_ptr: tl.tensor, scales_ptr: tl.tensor, bias_ptr: tl.tensor, out_ptr: tl.tensor,
    num_rows: tl.tensor, N: tl.tensor, SPLITS: tl.constexpr, B: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: [num_rows, cdiv(N, B)]. Sums of parts [SPLITS, num_rows, N], which are exact where they are integers, then
    scales (if they are given) and the bias. out: [num_rows, N]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * B + tl.arange(0, B)
    inside = columns < N
    at = parts_ptr + row * N + columns
    total = tl.load(at, mask=inside, other=0)
    for _ in tl.static_range(SPLITS - 1):
        at += num_rows.to(tl.int64) * N
        total += tl.load(at, mask=inside, other=0)
    result = total.to(tl.float32)
    if x_scales_ptr is not None:
        scale = tl.load(scales_ptr + columns, mask=inside, other=0.0)
        result = result * tl.load(x_scales_ptr + row) * scale
    if bias_ptr is not None:
        result += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + columns, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def inputs_kernel(
    x_ptr: tl.tensor, ids_ptr: tl.tensor, order_ptr: tl.tensor, static_ptr: tl.tensor, out_ptr: tl.tensor,
    scales_ptr: tl.tensor, x_stride: tl.tensor, K: tl.tensor, num_groups: tl.tensor, LARGEST: tl.constexpr,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: [num_rows, num_groups]. Inputs as a weight takes them: row i is row i / TOP_K of x for expert ids[i] (the
    only one, without ids), in that expert's order (order: [E, K]), and rounded to 8 bits.

    LARGEST: 127 for int8, half to even; 448 for float8; 0: not rounded. A scale for each row and group of WIDTH
    columns, largest magnitude / LARGEST, or static[e]; scales: [num_rows, num_groups] float32. out: [num_rows, K].
    """
    LEAST: tl.constexpr = -128 if LARGEST == 127 else -LARGEST
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    expert = tl.zeros([], tl.int64)
    if ids_ptr is not None:
        expert = tl.maximum(tl.load(ids_ptr + row), 0).to(tl.int64)  # below 0: nobody reads the row
    last = tl.minimum((group + 1) * WIDTH, K)
    x_at = x_ptr + row // TOP_K * x_stride
    scale = 1.0
    if static_ptr is not None:
        scale = tl.load(static_ptr + expert)
    elif LARGEST:
        most = tl.zeros([B], tl.float32)
        for start in range(group * WIDTH, last, B):
            columns = start + tl.arange(0, B)
            most = tl.maximum(most, tl.abs(tl.load(x_at + columns, mask=columns < last, other=0.0).to(tl.float32)))
        scale = tl.maximum(tl.div_rn(tl.max(most, 0), LARGEST * 1.0), 1.1754943508222875e-38)
    if LARGEST:
        tl.store(scales_ptr + row * num_groups + group, scale)
    for start in range(group * WIDTH, last, B):
        columns = start + tl.arange(0, B)
        source = columns
        if order_ptr is not None:
            source = tl.load(order_ptr + expert * K + columns, mask=columns < last, other=0)
        x = tl.load(x_at + source, mask=columns < last, other=0.0)
        if LARGEST:
            wide = tl.div_rn(x.to(tl.float32), tl.zeros([B], tl.float32) + scale)
            wide = tl.minimum(tl.maximum(wide, LEAST * 1.0), LARGEST * 1.0)
            if LARGEST == 127:
                wide = wide + 12582912.0 - 12582912.0  # 1.5 * 2 ** 23: nothing after the point is left
            tl.store(out_ptr + row * K + columns, wide.to(out_ptr.dtype.element_ty), mask=columns < last)
        else:
            tl.store(out_ptr + row * K + columns, x, mask=columns < last)
