// From logits to tokens without sorting a vocabulary. Contract: engines/ops/sampling.py; a block of threads has one
// sequence, so that a draw does not depend on the batch.
#pragma once

#include <cmath>

#include "vectors.cuh"

namespace cuda_ops {

constexpr int kSampleWarps = 16;
constexpr int kSampleThreads = kSampleWarps * 32;
constexpr int kDigitBits = 4;
constexpr int kBuckets = 1 << kDigitBits;

struct SampleParams {
  const float* logits;       // [num_seqs, vocab]
  const float* temperature;  // [num_seqs], as all that follow
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* stream;
  const int64_t* position;
  int64_t* out;
  int64_t row_stride;
  int vocab;
};

// 53 random bits for a 64-bit key and a 64-bit counter, as a number in [0, 1): the first two words of Philox4x32-10
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
__host__ __device__ inline double uniform(uint64_t stream, uint64_t position) {
  uint32_t counter[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * counter[0], second = uint64_t{0xCD9E8D57} * counter[2];
    counter[0] = static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0];
    counter[1] = static_cast<uint32_t>(second);
    counter[2] = static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1];
    counter[3] = static_cast<uint32_t>(first);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return (static_cast<double>(counter[0] >> 5) * 67108864.0 + static_cast<double>(counter[1] >> 6)) /
         9007199254740992.0;
}

// Unsigned numbers in the order of the floats that they stand for; -0 is 0.
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t bits = float_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A row of logits and how its weights are made of them.
struct SampleRow {
  const float* logits;
  int vocab;
  float most;
  double temperature, min_p;
  // exp(logit / temperature), 1 at the maximum, 0 below min_p
  __device__ __forceinline__ double weight(float logit) const {
    const double w = exp((static_cast<double>(logit) - most) / temperature);
    return w < min_p ? 0.0 : w;
  }
};

struct SampleShared {
  double sums[kSampleWarps][kBuckets];
  int counts[kSampleWarps][kBuckets];
  float most[kSampleWarps];
  int at[kSampleWarps];
};

// The maximum and the lowest token that has it.
__device__ __forceinline__ void find_most(const SampleRow& row, SampleShared& shared, float& most, int& at) {
  most = -INFINITY;
  at = row.vocab;
  for (int i = threadIdx.x; i < row.vocab; i += kSampleThreads)
    if (row.logits[i] > most || at == row.vocab) most = row.logits[i], at = i;
  const auto take = [&](float other, int other_at) {
    if (other_at < row.vocab && (other > most || at >= row.vocab || (other == most && other_at < at)))
      most = other, at = other_at;
  };
#pragma unroll
  for (int by = 16; by; by /= 2) {
    const float other = __shfl_xor_sync(~0u, most, by);
    take(other, __shfl_xor_sync(~0u, at, by));
  }
  if (threadIdx.x % 32 == 0) shared.most[threadIdx.x / 32] = most, shared.at[threadIdx.x / 32] = at;
  __syncthreads();
  for (int i = 0; i < kSampleWarps; ++i) take(shared.most[i], shared.at[i]);
}

// The least probable tokens that a filter leaves: those with this key, of which it leaves `ties`, the lowest ids.
struct Cut {
  uint32_t key;
  int ties;
  double sum;  // of the weights of all tokens that are left
};

// The shortest beginning of the tokens, ordered by weight, that has `count` of them or, without one, a sum of `target`
// at least. Digit by digit of the keys: sums in a fixed order, weights only of tokens that are still in question.
__device__ __forceinline__ Cut find_cut(const SampleRow& row, SampleShared& shared, int64_t count, double target) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t prefix = 0;
  int64_t taken = 0;  // tokens above those in question, and the sum of their weights
  double above = 0.0;
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    double sums[kBuckets] = {};
    int counts[kBuckets] = {};
    for (int i = threadIdx.x; i < row.vocab; i += kSampleThreads) {
      const float logit = row.logits[i];
      const uint32_t key = order_key(logit);
      if (shift + kDigitBits < 32 && key >> (shift + kDigitBits) != prefix) continue;
      const int digit = key >> shift & (kBuckets - 1);
      const double w = row.weight(logit);
#pragma unroll
      for (int bucket = 0; bucket < kBuckets; ++bucket)
        if (bucket == digit) sums[bucket] += w, counts[bucket]++;
    }
    __syncthreads();  // the buckets of the digit before have been read
#pragma unroll
    for (int bucket = 0; bucket < kBuckets; ++bucket) {
      const double sum = sum_of_warp(sums[bucket]);
      const int number = sum_of_warp(counts[bucket]);
      if (lane == 0) shared.sums[warp][bucket] = sum, shared.counts[warp][bucket] = number;
    }
    __syncthreads();
    // All threads go the same way through the same numbers.
    int chosen = -1;
    for (int bucket = kBuckets - 1; bucket >= 0; --bucket) {
      double sum = 0.0;
      int number = 0;
      for (int i = 0; i < kSampleWarps; ++i) sum += shared.sums[i][bucket], number += shared.counts[i][bucket];
      if (!number) continue;
      chosen = bucket;
      if (count ? taken + number >= count : above + sum >= target) break;
      bool more = false;  // the last bucket with tokens is taken even if sums were rounded to less than the target
      for (int lower = 0; lower < bucket; ++lower)
        for (int i = 0; i < kSampleWarps; ++i) more |= shared.counts[i][lower] > 0;
      if (!more) break;
      taken += number;
      above += sum;
    }
    prefix = prefix << kDigitBits | static_cast<uint32_t>(chosen);
  }
  // All tokens in question have one logit.
  const uint32_t bits = prefix & 0x80000000u ? prefix & 0x7FFFFFFFu : ~prefix;
  const double w = row.weight(bits_float(bits));
  int number = 0;
  for (int i = 0; i < kSampleWarps; ++i) number += shared.counts[i][prefix & (kBuckets - 1)];
  int64_t ties = count ? count - taken : w > 0.0 ? static_cast<int64_t>(ceil((target - above) / w)) : 1;
  ties = ties < 1 ? 1 : ties > number ? number : ties;
  return {prefix, static_cast<int>(ties), above + w * static_cast<double>(ties)};
}

// The token at which the running sum of the weights that are left, in order of tokens, exceeds a share of their sum.
__device__ __forceinline__ int invert(const SampleRow& row, SampleShared& shared, const Cut& cut, double share_of_all) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int each = (row.vocab + kSampleWarps * 32 - 1) / (kSampleWarps * 32) * 32;  // tokens of a warp
  const int begin = min(warp * each, row.vocab), end = min(begin + each, row.vocab);
  double sum = 0.0, tied_weight = 0.0;
  int tied = 0;
  for (int i = begin + lane; i < end; i += 32) {
    const uint32_t key = order_key(row.logits[i]);
    if (key > cut.key) sum += row.weight(row.logits[i]);
    if (key == cut.key) tied++, tied_weight = row.weight(row.logits[i]);
  }
  sum = sum_of_warp(sum);
  tied = sum_of_warp(tied);
  __syncthreads();  // what was in the buckets has been read
  if (lane == 0) shared.sums[warp][0] = sum, shared.counts[warp][0] = tied;
#pragma unroll
  for (int by = 16; by; by /= 2) tied_weight = fmax(tied_weight, __shfl_xor_sync(~0u, tied_weight, by));
  if (lane == 0) shared.sums[warp][1] = tied_weight;
  __syncthreads();
  double total = 0.0, share = 0.0, before = 0.0;
  int owner = 0, ties_before = 0;
  for (int pass = 0; pass < 2; ++pass) {
    double running = 0.0;
    int ties = 0;
    for (int i = 0; i < kSampleWarps; ++i) {
      const int own = min(shared.counts[i][0], max(cut.ties - ties, 0));
      const double part = shared.sums[i][0] + shared.sums[i][1] * own;
      if (pass == 1 && part > 0.0) {
        owner = i;
        before = running;
        ties_before = ties;
        if (running + part > share) break;
      }
      running += part;
      ties += shared.counts[i][0];
    }
    if (pass == 0) {
      total = running;
      share = fmin(share_of_all * total, nextafter(total, 0.0));
    }
  }
  if (warp != owner) return -1;
  int last = -1;
  for (int first = begin; first < end; first += 32) {
    const int i = first + lane;
    const float logit = i < end ? row.logits[i] : -INFINITY;
    const uint32_t key = i < end ? order_key(logit) : 0;
    const bool tie = i < end && key == cut.key;
    const unsigned tied_lanes = __ballot_sync(~0u, tie);
    const int rank = ties_before + __popc(tied_lanes & ((1u << lane) - 1));
    const bool left = i < end && (key > cut.key || (tie && rank < cut.ties));
    const double w = left ? row.weight(logit) : 0.0;
    double through = w;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const double other = __shfl_up_sync(~0u, through, by);
      if (lane >= by) through += other;
    }
    const unsigned past = __ballot_sync(~0u, w > 0.0 && before + through > share);
    if (past) return first + __ffs(past) - 1;
    const unsigned weighty = __ballot_sync(~0u, w > 0.0);
    if (weighty) last = first + 31 - __clz(weighty);
    before += __shfl_sync(~0u, through, 31);
    ties_before += __popc(tied_lanes);
  }
  return last;  // where sums in another order were rounded to less than the share
}

// Grid: a block a sequence. Threads: 512. Shared memory: SampleShared. Reads the row, out of the second-level cache after
// the first time, once for greedy rows, 4 times without filters, 8 times more for each filter.
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(SampleParams p) {
  SampleShared& shared = *reinterpret_cast<SampleShared*>(shared_memory());
  const int64_t seq = blockIdx.x;
  SampleRow row{p.logits + seq * p.row_stride, p.vocab, 0.0f, p.temperature[seq], p.min_p[seq]};
  int best = 0;
  find_most(row, shared, row.most, best);
  if (p.temperature[seq] <= 0.0f) {
    if (threadIdx.x == 0) p.out[seq] = best;
    return;
  }
  Cut cut{0, 0, 0.0};  // nothing is left out: the lowest key is above 0
  const int64_t top_k = p.top_k[seq];
  const double top_p = p.top_p[seq];
  if (top_k > 0 && top_k < p.vocab) cut = find_cut(row, shared, top_k, 0.0);
  if (top_p < 1.0) {
    double total = cut.sum;
    if (top_k <= 0 || top_k >= p.vocab) total = find_cut(row, shared, p.vocab, 0.0).sum;
    cut = find_cut(row, shared, 0, top_p * total);
  }
  const int token = invert(row, shared, cut, uniform(static_cast<uint64_t>(p.stream[seq]),
                                                     static_cast<uint64_t>(p.position[seq])));
  if (token >= 0 && threadIdx.x % 32 == 0) p.out[seq] = token;
}

// ---- penalties ----

struct PenaltyParams {
  const float* logits;                         // [num_seqs, vocab]
  const int32_t *prompt_counts, *output_counts;  // [num_seqs, vocab]
  const float *repetition, *presence, *frequency;  // [num_seqs]
  float* out;                                  // [num_seqs, vocab], dense
  int64_t logits_stride, prompt_stride, output_stride;
  int vocab;
};

// Grid: (pieces of a row, sequences). Threads: 256. Moves 16 bytes a logit.
__global__ void __launch_bounds__(256) penalty_kernel(PenaltyParams p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t seq = blockIdx.y;
  if (i >= p.vocab) return;
  const int output = p.output_counts[seq * p.output_stride + i];
  float x = p.logits[seq * p.logits_stride + i];
  if (output > 0 || p.prompt_counts[seq * p.prompt_stride + i] > 0)
    x = x > 0.0f ? x / p.repetition[seq] : multiply(x, p.repetition[seq]);
  x = add(x, -multiply(p.frequency[seq], static_cast<float>(output)));
  p.out[seq * p.vocab + i] = add(x, output > 0 ? -p.presence[seq] : 0.0f);
}

}  // namespace cuda_ops
