// One tile of query rows against a run of keys: online softmax (arXiv 1805.02867, 2205.14135) in float32.
//
// Compiled once for each instruction set, with ISA naming it. Every score is a sum over head_dim in order, every output
// a sum over the keys in order, whatever rows are computed beside it: so the bits of a row depend on that row alone.
// Names: R rows, T keys of a tile, D head_dim, W floats of a vector register.

#include "attention_vector.h"
#include "kv_codes_vector.h"

namespace cpu_ops {
namespace ISA {
namespace {

// to: [D][T], the keys as columns; columns from num_keys on are zero. Pairs of 16-bit values move as one 32-bit lane.
template <Type type> void load_keys(float* to, const char* const* rows, int num_keys, int D) {
  constexpr int bytes = kBytes<type>, wide = W * 4 / bytes;
  for (int t = 0; t < kTile; t += W) {
    for (int d = 0; d < D; d += wide) {
      const int count = D - d < wide ? D - d : wide;
      Uint v[W];
      for (int i = 0; i < W; ++i) {
        v[i] = Uint{};
        if (t + i >= num_keys) continue;
        const char* row = rows[t + i] + d * bytes;
        if (count == wide) v[i] = load<Uint>(row);
        else __builtin_memcpy(&v[i], row, count * bytes);
      }
      transpose(v);
      float* column = to + d * kTile + t;
      if constexpr (type == Type::f32) {
        for (int i = 0; i < count; ++i) store(column + i * kTile, v[i]);
      } else {
        // The buffer has a row to spare, which takes the second half of an odd last pair.
        for (int i = 0; 2 * i < count; ++i) {
          store(column + 2 * i * kTile, widen<type>(type == Type::bf16 ? v[i] : v[i] & 0xffff));
          store(column + (2 * i + 1) * kTile,
                type == Type::bf16 ? bits<Float>(v[i] & 0xffff0000u) : widen<type>(v[i] >> 16));
        }
      }
    }
  }
}

// to[r][vectors] = or += sum over n of a[r][n] * b[n][vectors]
template <int R, int V> inline void multiply(float* to, int to_stride, const float* a, int a_stride, const float* b,
                                             int b_stride, int n, const float* factor) {
  Float sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = factor ? load<Float>(to + r * to_stride + v * W) * factor[r] : Float{};
  for (int i = 0; i < n; ++i) {
    Float row[V];
    for (int v = 0; v < V; ++v) row[v] = load<Float>(b + i * b_stride + v * W);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += row[v] * a[r * a_stride + i];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(to + r * to_stride + v * W, sum[r][v]);
}

// As above for any number of rows and vectors. factor: [rows] of what `to` holds; null: it holds nothing.
template <int V> void multiply_rows(float* to, int to_stride, const float* a, int a_stride, const float* b,
                                    int b_stride, int n, const float* factor, int rows) {
  for (int r = 0; r < rows; r += kRowBlock) {
    float* o = to + r * to_stride;
    const float *x = a + r * a_stride, *f = factor ? factor + r : nullptr;
    switch (rows - r) {
      case 1: multiply<1, V>(o, to_stride, x, a_stride, b, b_stride, n, f); break;
      case 2: multiply<2, V>(o, to_stride, x, a_stride, b, b_stride, n, f); break;
      case 3: multiply<3, V>(o, to_stride, x, a_stride, b, b_stride, n, f); break;
      case 4: multiply<4, V>(o, to_stride, x, a_stride, b, b_stride, n, f); break;
      case 5: multiply<kRowBlock < 5 ? kRowBlock : 5, V>(o, to_stride, x, a_stride, b, b_stride, n, f); break;
      default: multiply<kRowBlock, V>(o, to_stride, x, a_stride, b, b_stride, n, f);
    }
  }
}

void multiply(float* to, int to_stride, const float* a, int a_stride, const float* b, int b_stride, int n,
              const float* factor, int rows, int columns) {
  int c = 0;
  for (; c + kVectorBlock * W <= columns; c += kVectorBlock * W)
    multiply_rows<kVectorBlock>(to + c, to_stride, a, a_stride, b + c, b_stride, n, factor, rows);
  for (; c < columns; c += W) multiply_rows<1>(to + c, to_stride, a, a_stride, b + c, b_stride, n, factor, rows);
}

// A tile's keys, as load_keys leaves them, and its values [T][padded], of the cache's own type or of codes.
template <Type type> void load_tile(float* k, float* v, const Rows& rows, const Work& work, int padded) {
  const int D = work.head_dim;
  if (work.codes == Codes::none) {
    load_keys<type>(k, rows.k, rows.count, D);
    for (int t = 0; t < rows.count; ++t) widen_row<type>(v + t * padded, rows.v[t], D);
  } else {
    const char* wide[kTile];
    for (int t = 0; t < rows.count; ++t) {
      widen_codes(v + t * padded, rows.k[t], work.codes, rows.k_scales[t], D);
      wide[t] = reinterpret_cast<const char*>(v + t * padded);
    }
    load_keys<Type::f32>(k, wide, rows.count, D);
    for (int t = 0; t < rows.count; ++t) widen_codes(v + t * padded, rows.v[t], work.codes, rows.v_scales[t], D);
  }
  if (rows.count < kTile) __builtin_memset(v + rows.count * padded, 0, (kTile - rows.count) * padded * sizeof(float));
}

template <Type type> void attend_typed(const Work& work, float* scratch) {
  const int D = work.head_dim, padded = (D + 15) / 16 * 16, rows = work.num_rows;
  const int row_bytes = work.codes == Codes::none ? D * kBytes<type> : work.codes == Codes::int4 ? (D + 1) / 2 : D;
  float* q = scratch;
  float* out = q + kRows * padded;
  float* v = out + kRows * padded;
  float* k = v + kTile * padded;
  float* scores = k + kTile * (padded + 16);
  float* maximum = scores + kRows * kTile;
  float* sum = maximum + kRows;
  float* factor = sum + kRows;
  for (int r = 0; r < rows; ++r) {
    widen_row<type>(q + r * padded, work.q[r], D);
  }
  start(work, out, padded, maximum, sum);
  Rows located[2];
  Rows *now = &located[0], *next = &located[1];
  locate(*next, work, work.begin);
  for (int64_t first = work.begin; first < work.end; first += kTile) {
    Rows* const done = now;
    now = next;
    next = done;
    locate(*next, work, first + kTile);
    for (int t = 0; t < next->count; ++t) {
      prefetch(next->k[t], row_bytes);
      prefetch(next->v[t], row_bytes);
    }
    load_tile<type>(k, v, *now, work, padded);
    multiply(scores, kTile, q, padded, k, kTile, D, nullptr, rows, kTile);
    for (int r = 0; r < rows; ++r)
      factor[r] = weigh(scores + r * kTile, first, work.position[r], work, maximum[r], sum[r]);
    multiply(out, padded, scores, kTile, v, padded, kTile, factor, rows, D);
  }
  finish<type>(work, out, padded, maximum, sum);
}

}  // namespace

void attend(const Work* works, int count, const Work*, int, float* scratch) {
  for (const Work* work = works; work < works + count; ++work) switch (work->type) {
      case Type::f32: attend_typed<Type::f32>(*work, scratch); break;
      case Type::f16: attend_typed<Type::f16>(*work, scratch); break;
      case Type::bf16: attend_typed<Type::bf16>(*work, scratch); break;
    }
}

}  // namespace ISA
}  // namespace cpu_ops
