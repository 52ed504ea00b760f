// Mixtures of experts around their products: which experts a token goes to, which tokens an expert has, and the sum of a
// token's outputs. Contracts: engines/ops/moe.py. A slot is one of the top_k experts of a token: token * top_k + choice.
#pragma once

#include <cmath>

#include "vectors.cuh"

namespace cuda_ops {

enum class Scoring { softmax, softmax_of_chosen, sigmoid };

template <class T> struct RouteParams {
  const T* logits;    // [num_tokens, num_experts], rows at stride
  const float* bias;  // [num_experts], or null
  float* weights;     // [num_tokens, top_k]
  int64_t* ids;       // [num_tokens, top_k]
  int64_t stride;
  int num_tokens, num_experts, top_k, num_groups, top_groups;
  Scoring scoring;
  bool normalize;
  float scale;
};

constexpr int kRouteWarps = 4;

// Where the largest of `count` values lies, the first of equals; NaN is never largest, and 0 is said where all are. A lane
// reads the values of indices that are its own modulo 32, and all have read when one returns.
__device__ __forceinline__ int best_of(const float* values, int count) {
  const int lane = threadIdx.x % 32;
  float most = -INFINITY;
  int at = count;
  for (int i = lane; i < count; i += 32)
    if (values[i] > most || (at == count && values[i] == most)) most = values[i], at = i;
#pragma unroll
  for (int by = 16; by; by /= 2) {
    const float other = __shfl_xor_sync(~0u, most, by);
    const int its = __shfl_xor_sync(~0u, at, by);
    if (its < count && (at == count || other > most || (other == most && its < at))) most = other, at = its;
  }
  return at < count ? at : 0;
}

// Keeps the choice of the best groups of neighbours; others become `fill`. groups: num_groups floats.
template <class T>
__device__ __forceinline__ void keep_groups(const RouteParams<T>& p, float* choice, float* groups) {
  const int lane = threadIdx.x % 32, size = p.num_experts / p.num_groups;
  const float fill = p.bias ? -INFINITY : 0.0f;
  for (int g = lane; g < p.num_groups; g += 32) {
    float first = -INFINITY, second = -INFINITY;
    for (int i = g * size; i < (g + 1) * size; ++i) {
      second = fmaxf(second, fminf(first, choice[i]));
      first = fmaxf(first, choice[i]);
    }
    groups[g] = p.bias && size > 1 ? add(first, second) : first;
  }
  for (int i = 0; i < p.top_groups; ++i) {
    const int best = best_of(groups, p.num_groups);
    if (lane == 0) groups[best] = NAN;  // chosen
    __syncwarp();
  }
  for (int i = lane; i < p.num_experts; i += 32) choice[i] = groups[i / size] != groups[i / size] ? choice[i] : fill;
}

// Grid: num_tokens / 4 blocks. Threads: 4 warps, one a token. Shared memory: for each warp scores, choice and groups.
template <class T> __global__ void __launch_bounds__(kRouteWarps * 32) route_kernel(RouteParams<T> p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRouteWarps + warp;
  if (token >= p.num_tokens) return;
  float* scores = reinterpret_cast<float*>(shared_memory()) + warp * (2 * p.num_experts + p.num_groups);
  float* choice = scores + p.num_experts;
  const T* logits = p.logits + token * p.stride;
  float most = -INFINITY, sum = 0.0f;
  for (int i = lane; i < p.num_experts; i += 32) most = fmaxf(most, to_float(logits[i]));
  most = max_of_warp(most);
  for (int i = lane; i < p.num_experts; i += 32) {
    const float logit = to_float(logits[i]);
    float score = logit;
    if (p.scoring == Scoring::softmax) score = expf(logit - most), sum = add(sum, score);
    if (p.scoring == Scoring::sigmoid) score = 1.0f / (1.0f + expf(-logit));
    scores[i] = score;
  }
  sum = sum_of_warp(sum);
  for (int i = lane; i < p.num_experts; i += 32) {
    if (p.scoring == Scoring::softmax) scores[i] = scores[i] / sum;
    choice[i] = p.bias ? add(scores[i], p.bias[i]) : scores[i];
  }
  __syncwarp();
  if (p.num_groups > 1) keep_groups(p, choice, choice + p.num_experts);
  float* weights = p.weights + token * p.top_k;
  float total = 0.0f;
  for (int i = 0; i < p.top_k; ++i) {
    const int best = best_of(choice, p.num_experts);
    float weight = scores[best];
    if (p.scoring == Scoring::softmax_of_chosen) weight = expf(weight - most);
    total = add(total, weight);
    if (lane == 0) {
      choice[best] = NAN;  // taken
      weights[i] = weight;
      p.ids[token * p.top_k + i] = best;
    }
    __syncwarp();
  }
  if (p.scoring == Scoring::sigmoid) total = add(total, 1e-20f);
  const bool divides = p.normalize || p.scoring == Scoring::softmax_of_chosen;
  if (lane == 0)
    for (int i = 0; i < p.top_k; ++i) weights[i] = multiply(divides ? weights[i] / total : weights[i], p.scale);
}

// ---- the tokens of each expert ----

struct SortParams {
  const int64_t* ids;  // [num_slots]
  int* slots;          // [num_tiles, tile]: those of one expert one after the other, then -1 to the end of a tile
  int* tile_experts;   // [num_tiles], -1 for tiles that are not used, whose slots are not written
  int num_slots, num_experts, num_tiles, tile;
};

constexpr int kSortThreads = 1024;

// Grid: 1. Threads: 1,024. Shared memory: two int32 an expert. The order of an expert's slots is that in which threads
// come: results do not depend on it. An id that is no expert's has no slot.
__global__ void __launch_bounds__(kSortThreads) sort_slots_kernel(SortParams p) {
  int* counts = reinterpret_cast<int*>(shared_memory());
  int* firsts = counts + p.num_experts;  // tile of each expert
  const int thread = threadIdx.x;
  for (int i = thread; i < p.num_experts; i += kSortThreads) counts[i] = 0;
  __syncthreads();
  for (int slot = thread; slot < p.num_slots; slot += kSortThreads) {
    const int64_t id = p.ids[slot];
    if (id >= 0 && id < p.num_experts) atomic_add(counts + id, 1);
  }
  __syncthreads();
  if (thread < 32) {
    int before = 0;
    for (int first = 0; first < p.num_experts; first += 32) {
      const int expert = first + thread;
      const int own = expert < p.num_experts ? (counts[expert] + p.tile - 1) / p.tile : 0;
      int through = own;
#pragma unroll
      for (int by = 1; by < 32; by *= 2) {
        const int other = __shfl_up_sync(~0u, through, by);
        if (thread >= by) through += other;
      }
      if (expert < p.num_experts) firsts[expert] = before + through - own;
      before += __shfl_sync(~0u, through, 31);
    }
    for (int i = before + thread; i < p.num_tiles; i += 32) p.tile_experts[i] = -1;
  }
  __syncthreads();
  for (int expert = thread; expert < p.num_experts; expert += kSortThreads) {
    const int tiles = (counts[expert] + p.tile - 1) / p.tile;
    for (int i = 0; i < tiles; ++i) p.tile_experts[firsts[expert] + i] = expert;
    int* own = p.slots + static_cast<int64_t>(firsts[expert]) * p.tile;
    for (int i = counts[expert]; i < tiles * p.tile; ++i) own[i] = -1;
    firsts[expert] *= p.tile;  // from here on: where the next slot goes
  }
  __syncthreads();
  for (int slot = thread; slot < p.num_slots; slot += kSortThreads) {
    const int64_t id = p.ids[slot];
    if (id >= 0 && id < p.num_experts) p.slots[atomic_add(firsts + id, 1)] = slot;
  }
}

// ---- the sum of a token's outputs ----

template <class T> struct CombineParams {
  const T* outputs;      // [num_tokens * top_k, size]
  const float* weights;  // [num_tokens, top_k]
  const int64_t* ids;    // [num_tokens, top_k]; outputs of slots below 0 were not written and count as zero
  T* out;                // [num_tokens, size]
  int64_t num_tokens;
  int size, top_k;
};

// Grid: (columns / (256 V), tokens or fewer). Threads: 256, with V columns each. Products and sums in float32, in the order
// of the choices. Moves the outputs and the result once.
template <class T, int V> __global__ void __launch_bounds__(256) combine_kernel(CombineParams<T> p) {
  const int column = (blockIdx.x * 256 + threadIdx.x) * V;
  if (column >= p.size) return;
  for (int64_t token = blockIdx.y; token < p.num_tokens; token += gridDim.y) {
    float sums[V] = {};
    for (int i = 0; i < p.top_k; ++i) {
      const int64_t slot = token * p.top_k + i;
      if (p.ids[slot] < 0) continue;
      const float weight = p.weights[slot];
      const Vector<T, V> own = load<T, V>(p.outputs + slot * p.size + column);
#pragma unroll
      for (int j = 0; j < V; ++j) sums[j] = add(sums[j], multiply(to_float(own.v[j]), weight));
    }
    Vector<T, V> result;
#pragma unroll
    for (int j = 0; j < V; ++j) result.v[j] = from_float<T>(sums[j]);
    store<T, V>(p.out + token * p.size + column, result);
  }
}

}  // namespace cuda_ops
