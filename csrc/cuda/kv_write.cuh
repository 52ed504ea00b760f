// New keys and values on their way into the paged cache, plain or in 8 and 4 bits, and the rotary embedding, on that way
// or in place: rope, write_kv, write_quantized_kv, rope_write_kv. Contracts: engines/ops/{rotary,kv_cache}.py.
#pragma once

#include "kv_codes.cuh"
#include "vectors.cuh"

namespace cuda_ops {

// ---- rotary embedding ----

// Every product and the sum rounded to T, as the reference has them.
template <class T> __device__ __forceinline__ T rotate(T a, T cos, T b, T sin, float sign) {
  const float first = to_float(from_float<T>(multiply(to_float(a), to_float(cos))));
  const float second = to_float(from_float<T>(multiply(to_float(b), to_float(sin))));
  return from_float<T>(add(first, sign * second));
}

// Turns V values of a head from `at` on, in its first half, and those half a head further on. angles: half cosines, then
// sines.
template <class T, int V> __device__ __forceinline__ void turn(T* head, const T* angles, int half, int at) {
  const Vector<T, V> c = load<T, V>(angles + at), s = load<T, V>(angles + half + at);
  const Vector<T, V> first = load<T, V>(head + at), second = load<T, V>(head + half + at);
  Vector<T, V> one, two;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    one.v[j] = rotate(first.v[j], c.v[j], second.v[j], s.v[j], -1.0f);
    two.v[j] = rotate(second.v[j], c.v[j], first.v[j], s.v[j], 1.0f);
  }
  store<T, V>(head + at, one);
  store<T, V>(head + half + at, two);
}

// What `turn` would leave at `at`, anywhere in a head. half 0: nothing is turned.
template <class T, int V>
__device__ __forceinline__ Vector<T, V> turned(const T* head, const T* angles, int half, int at) {
  Vector<T, V> own = load<T, V>(head + at);
  if (at >= 2 * half) return own;
  const bool upper = at >= half;
  const int angle = upper ? at - half : at;
  const Vector<T, V> c = load<T, V>(angles + angle), s = load<T, V>(angles + half + angle);
  const Vector<T, V> other = load<T, V>(head + (upper ? at - half : at + half));
#pragma unroll
  for (int j = 0; j < V; ++j) own.v[j] = rotate(own.v[j], c.v[j], other.v[j], s.v[j], upper ? 1.0f : -1.0f);
  return own;
}

template <class T> struct Angles {
  const int64_t* positions;  // [num_tokens]; unused where half is 0
  const T* cos_sin;          // [max_position, 2 * half]
  int64_t max_position;
  int half;
};

template <class T> struct RopeParams {
  T* q;  // [num_tokens, num_heads, head_dim]
  T* k;  // [num_tokens, num_kv_heads, head_dim]
  int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride;
  int num_heads, num_kv_heads;
  Angles<T> angles;
};

// Grid: a block a token. Threads: 128, each takes V frequencies of a head at a time. Moves q and k twice.
template <class T, int V> __global__ void __launch_bounds__(128) rope_kernel(RopeParams<T> p) {
  const int64_t token = blockIdx.x, position = p.angles.positions[token];
  if (position < 0 || position >= p.angles.max_position) return;  // the padding of a captured batch
  const int half = p.angles.half, pieces = half / V, count = (p.num_heads + p.num_kv_heads) * pieces;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int head = i / pieces;
    T* x = head < p.num_heads ? p.q + token * p.q_token_stride + head * p.q_head_stride
                              : p.k + token * p.k_token_stride + (head - p.num_heads) * p.k_head_stride;
    turn<T, V>(x, p.angles.cos_sin + position * 2 * half, half, i % pieces * V);
  }
}

// ---- cache ----

// Where keys or values go: rows of head_dim numbers, dense.
template <class T> struct PlainRows {
  T* rows;
};
template <Form FORM> struct CodedRows {
  uint8_t* rows;  // of kv_width(FORM, head_dim) bytes
  float* scales;  // kv_numbers(FORM) a row
};

template <class T, class Rows> struct KvWriteParams {
  T* q;                         // [num_tokens, num_heads, head_dim], turned in place; unused without heads
  const T *k, *v;               // [num_tokens, num_kv_heads, head_dim], the last dimension dense
  Rows k_to, v_to;              // [num_blocks, num_kv_heads, block_size] rows
  const int64_t* slot_mapping;  // [num_tokens]; a slot outside the cache is the padding of a captured batch
  Angles<T> angles;             // half 0: nothing is turned
  int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride, num_slots;
  int num_heads, num_kv_heads, block_size, head_dim;
  int q_blocks;  // of threads, for a token's queries: V frequencies a thread
  int lanes;     // that share a vector: a power of two, at most 32
};

constexpr int kWriteThreads = 128;

// Lanes of a vector each store V values in turn.
template <class T, int V>
__device__ __forceinline__ void write_row(const PlainRows<T>& to, int64_t row, bool own, const T* x, const T* angles,
                                          int half, int lane, int lanes, int head_dim) {
  if (!own) return;
  for (int i = lane * V; i < head_dim; i += lanes * V)
    store<T, V>(to.rows + row * head_dim + i, turned<T, V>(x, angles, half, i));
}

// The same as codes: of two values where V is 1, so that a lane has whole bytes. Reads x again for the codes, out of the
// first-level cache.
template <class T, int V, Form FORM>
__device__ __forceinline__ void write_row(const CodedRows<FORM>& to, int64_t row, bool own, const T* x, const T* angles,
                                          int half, int lane, int lanes, int head_dim) {
  constexpr int kPiece = V > 1 ? V : 2, kOfByte = FORM == Form::int4 ? 2 : 1, kBytes = kPiece / kOfByte;
  const auto piece = [&](float (&to)[kPiece], int i) {  // past the end the last ones again
#pragma unroll
    for (int j = 0; j < kPiece; j += V) {
      const Vector<T, V> own = turned<T, V>(x, angles, half, min(i + j, head_dim - V));
#pragma unroll
      for (int l = 0; l < V; ++l) to[j + l] = to_float(own.v[l]);
    }
  };
  float low = -INFINITY, high = -INFINITY, values[kPiece];  // low: of the numbers' negatives
  for (int i = lane * kPiece; i < head_dim; i += lanes * kPiece) {
    piece(values, i);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) low = larger(low, -values[j]), high = larger(high, values[j]);
  }
  const KvScale scale = kv_scale(FORM, -largest_of_lanes(low, lanes), largest_of_lanes(high, lanes));
  if (!own) return;
  uint8_t* codes = to.rows + row * kv_width(FORM, head_dim);
  for (int i = lane * kPiece; i < head_dim; i += lanes * kPiece) {
    piece(values, i);
    Vector<uint8_t, kBytes> bytes{};
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      const uint8_t code = i + j < head_dim ? kv_code(FORM, values[j], scale) : 0;
      bytes.v[j / kOfByte] |= static_cast<uint8_t>(code << j % kOfByte * 4);
    }
    if constexpr (V > 1) {
      store<uint8_t, kBytes>(codes + i / kOfByte, bytes);
    } else {
      for (int j = 0; j < kBytes; ++j)
        if (i + j * kOfByte < head_dim) codes[i / kOfByte + j] = bytes.v[j];
    }
  }
  constexpr int kNumbers = kv_numbers(FORM);
  if (lane == 0) to.scales[row * kNumbers] = scale.scale;
  if (kNumbers > 1 && lane == 0) to.scales[row * kNumbers + 1] = scale.offset;
}

// Grid: (tokens, blocks for its queries and then for its keys and values). Threads: 128. Moves q twice, k and v once, and
// what is stored; the second reading of keys that are turned comes out of the first-level cache.
template <class T, int V, class Rows>
__global__ void __launch_bounds__(kWriteThreads) kv_write_kernel(KvWriteParams<T, Rows> p) {
  const int64_t token = blockIdx.x;
  const int half = p.angles.half;
  const T* angles = nullptr;
  if (half) {
    const int64_t position = p.angles.positions[token];
    if (position < 0 || position >= p.angles.max_position) return;  // the padding of a captured batch
    angles = p.angles.cos_sin + position * 2 * half;
  }
  const int block_of_token = static_cast<int>(blockIdx.y);
  if (block_of_token < p.q_blocks) {
    const int i = block_of_token * kWriteThreads + threadIdx.x, pieces = half / V;
    if (i < p.num_heads * pieces)
      turn<T, V>(p.q + token * p.q_token_stride + i / pieces * p.q_head_stride, angles, half, i % pieces * V);
    return;
  }
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0 || slot >= p.num_slots) return;
  const int count = 2 * p.num_kv_heads;  // keys, then values
  const int mine = ((block_of_token - p.q_blocks) * kWriteThreads + static_cast<int>(threadIdx.x)) / p.lanes;
  const int vector = min(mine, count - 1);  // lanes without one take part in the exchange of others
  const bool key = vector < p.num_kv_heads;
  const int head = key ? vector : vector - p.num_kv_heads;
  const int64_t row = (slot / p.block_size * p.num_kv_heads + head) * p.block_size + slot % p.block_size;
  const T* x = key ? p.k + token * p.k_token_stride + head * p.k_head_stride
                   : p.v + token * p.v_token_stride + head * p.v_head_stride;
  write_row<T, V>(key ? p.k_to : p.v_to, row, mine < count, x, angles, key ? half : 0,
                  static_cast<int>(threadIdx.x) % p.lanes, p.lanes, p.head_dim);
}

}  // namespace cuda_ops
