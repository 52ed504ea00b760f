// Inputs of products rounded to 8 bits: as they are, or while they are made by a norm or a gated activation, whose
// 16-bit result is then written nowhere. Contracts: Quantized and quantize_input in engines/ops/linear.py.
#pragma once

#include "elementwise.cuh"

namespace cuda_ops {

constexpr int kQuantizeThreads = 256;
constexpr int kTileColumns = 128;           // of Rounding::e4m3_tiles, and of what codes are padded to
constexpr float kLeastScale = 1.17549435e-38f;  // the least normal float

// int8, e4m3: a scale for each row, its largest magnitude / 127 or / 448. e4m3_tiles: for each 128 columns of a row.
enum class Rounding { int8, e4m3, e4m3_tiles };

template <class Source> struct QuantizeParams {
  Source source;              // of rows of in_features, a multiple of 8
  const float* static_scale;  // one for all, or null
  unsigned char* codes;       // [rows, padded_in], zeros past in_features
  float* scales;              // [rows]; tiles: [in_features / 128, scales_stride], a row's at its index
  int in_features, padded_in, scales_stride;
  bool staged;                // whether there is shared memory for a row
};

// What is rounded. begin() is called by all threads of a row; its result gives eight values of piece i, the same thread's
// pieces each time. `stage`: room for a row, null for none.
template <class T_> struct GivenRows {
  using T = T_;
  const T* x;  // rows at stride; addresses of rows: of 16 bytes
  int64_t stride;
  __device__ __forceinline__ auto begin(int64_t row, Vector<T, 8>*, float*, int) const {
    const T* own = x + row * stride;
    return [own](int i) { return load<T, 8>(own + i * 8); };
  }
};

template <class T_> struct GatedRows {
  using T = T_;
  GateParams<T> p;
  __device__ __forceinline__ auto begin(int64_t row, Vector<T, 8>*, float*, int) const {
    const T* gate = p.gate_up + row * p.row_stride;
    const int size = p.size;
    const Activation name = p.name;
    return [=](int i) { return gated(load<T, 8>(gate + i * 8), load<T, 8>(gate + size + i * 8), name); };
  }
};

template <class T_> struct NormedRows {
  using T = T_;
  NormParams<T> p;  // of add_rms_norm: rows are dense
  __device__ __forceinline__ auto begin(int64_t row, Vector<T, 8>* stage, float* slots, int pieces) const {
    const int64_t at = row * p.size;
    Vector<T, 8>* total = reinterpret_cast<Vector<T, 8>*>(p.total + at);
    float squares = 0.0f;
    for (int i = threadIdx.x; i < pieces; i += blockDim.x) {
      const Vector<T, 8> sum = add_vectors(load<T, 8>(p.x + at + i * 8), load<T, 8>(p.residual + at + i * 8), squares);
      total[i] = sum;
      if (stage) stage[i] = sum;
    }
    const float scale = norm_scale(squares, slots, blockDim.x / 32, p.size, p.eps), offset = p.weight_offset;
    const Vector<T, 8>* from = stage ? stage : total;
    const T* weight = p.weight;
    return [=](int i) { return normed(from[i], load<T, 8>(weight + i * 8), scale, offset); };
  }
};

// Half to even, within -128 and 127, as engines/ops/linear.py: quantize_input.
__device__ __forceinline__ uint32_t int8_of(float x) {
  return static_cast<unsigned char>(static_cast<int>(fminf(fmaxf(rintf(x), -128.0f), 127.0f)));
}

template <class T, Rounding TO> __device__ __forceinline__ uint2 codes_of(const Vector<T, 8>& x, float scale) {
  uint32_t words[2] = {};
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const float first = to_float(x.v[j]) / scale, second = to_float(x.v[j + 1]) / scale;
    const uint32_t both = TO == Rounding::int8 ? int8_of(first) | int8_of(second) << 8 : pack_e4m3(first, second);
    words[j / 4] |= both << j % 4 * 8;
  }
  return uint2{words[0], words[1]};
}

template <class T> __device__ __forceinline__ float largest_magnitude(const Vector<T, 8>& x, float most) {
#pragma unroll
  for (int j = 0; j < 8; ++j) most = larger(fabsf(to_float(x.v[j])), most);
  return most;
}

// Grid: rows. Threads: of a row, whole warps. Shared memory: 16 floats, and a row where it is staged. Moves what the source
// reads, and codes.
template <class Source, Rounding TO>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_kernel(QuantizeParams<Source> p) {
  using T = typename Source::T;
  float* slots = reinterpret_cast<float*>(shared_memory());  // 8 of the source, 8 of this
  Vector<T, 8>* stage = p.staged ? reinterpret_cast<Vector<T, 8>*>(slots + 16) : nullptr;
  const int64_t row = blockIdx.x;
  const int pieces = p.in_features / 8, thread = threadIdx.x, threads = blockDim.x;
  const auto values = p.source.begin(row, stage, slots, pieces);
  uint2* codes = reinterpret_cast<uint2*>(p.codes + row * p.padded_in);
  if constexpr (TO == Rounding::e4m3_tiles) {
    constexpr int kLanes = kTileColumns / 8;  // that share a tile
    for (int first = thread / 32 * 32; first < pieces; first += threads) {
      const int i = first + thread % 32;
      Vector<T, 8> own{};
      if (i < pieces) own = values(i);
      const float most = largest_of_lanes(largest_magnitude(own, 0.0f), kLanes);
      const float scale = p.static_scale ? *p.static_scale : larger(kLeastScale, most / 448.0f);
      if (i >= pieces) continue;
      codes[i] = codes_of<T, TO>(own, scale);
      if (i % kLanes == 0) p.scales[static_cast<int64_t>(i / kLanes) * p.scales_stride + row] = scale;
    }
    return;
  }
  const bool searches = p.static_scale == nullptr;
  float scale;
  if (searches) {
    float most = 0.0f;
    for (int i = thread; i < pieces; i += threads) {
      const Vector<T, 8> own = values(i);
      if (stage) stage[i] = own;
      most = largest_magnitude(own, most);
    }
    most = largest_of_lanes(most, 32);
    if (thread % 32 == 0) slots[8 + thread / 32] = most;
    __syncthreads();
    for (int i = 0; i < threads / 32; ++i) most = larger(slots[8 + i], most);
    scale = larger(kLeastScale, most / (TO == Rounding::int8 ? 127.0f : 448.0f));
  } else {
    scale = *p.static_scale;
  }
  if (thread == 0) p.scales[row] = scale;
  for (int i = thread; i < p.padded_in / 8; i += threads) {
    Vector<T, 8> own{};
    if (i < pieces) own = searches && stage ? stage[i] : values(i);
    codes[i] = codes_of<T, TO>(own, scale);
  }
}

}  // namespace cuda_ops
