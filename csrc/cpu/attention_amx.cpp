// bfloat16 attention on the matrix unit (AMX) over a packed cache (packed.h): as attention_kernel.cpp, with products by
// tiles of 16 x 16 whose second factors are read where they lie.
//
// Both products take bfloat16 and sum in float32; weights are rounded to bfloat16 as in FlashAttention, their sum is
// not. A row of a product does not depend on the rows beside it, and hidden keys weigh exactly zero.
// Scores are kept in units of log2, so that e^x is a power of two (arXiv 2307.08691, section 3.1).

#include <immintrin.h>

#include <new>

#include "amx.h"
#include "attention_amx.h"
#include "packed.h"

namespace cpu_ops {
namespace amx {
namespace {

constexpr float kSlack = 8.0f;  // as FlashAttention-4 has it: weights of up to 256 lose nothing in float32 and bfloat16
constexpr int kUnits = kRows / kSide > kLanes * (kLaneRows / kSide) ? kRows / kSide : kLanes * (kLaneRows / kSide);

// Where the cache holds a tile of keys and of values: by 16 keys, by 32 values.
struct Located {
  int count;  // keys of this tile that there are
  const char* k[kGroups];
  const char* v[kGroups / 2];
};

void locate(Located& at, const Work& work, int64_t first) {
  const int64_t left = work.end - first;
  at.count = left <= 0 ? 0 : left < kTile ? static_cast<int>(left) : kTile;
  for (int i = 0; i * kSide < at.count; ++i) {
    const int64_t key = first + i * kSide, block = work.block_table[key / work.block_size], slot = key % work.block_size;
    at.k[i] = work.k + block * work.k_block_stride + slot / kPackedKeys * kPackedTile;
    if (i % 2 == 0)
      at.v[i / 2] = work.v + block * work.v_block_stride + slot / kPackedValues * (work.head_dim / 16) * kPackedTile;
  }
}

// Asks for the tile of keys and values that comes next: blocks lie anywhere, so no hardware foresees them. In parts, among
// the work on this one: few lines can be under way at a time, and who asks for more of them waits.
class Asking {
 public:
  void start(const Located& next, const Work& work) {
    rest();
    at_ = count_ = 0;
    const int64_t key_step = work.block_size / kPackedKeys * kPackedTile;
    for (int g = 0; g * kSide < next.count; g += 2)
      for (int d = 0; d < work.head_dim / 32; ++d) {
        add(next.k[g] + d * key_step);
        if ((g + 1) * kSide < next.count) add(next.k[g + 1] + d * key_step);
      }
    for (int g = 0; g * kPackedValues < next.count; ++g)
      for (int d = 0; d < work.head_dim / 16; ++d) add(next.v[g] + d * kPackedTile);
  }

  void some() {
    if (at_ == count_) return;
    const char* part = parts_[at_++];
    for (int64_t i = 0; i < kPackedTile; i += 64) _mm_prefetch(part + i, _MM_HINT_T1);
  }

  void rest() {
    while (at_ < count_) some();
  }

 private:
  static constexpr int kMost = 64;  // the parts of a tile of heads of 256; larger ones are asked for in part

  void add(const char* part) {
    if (count_ < kMost) parts_[count_++] = part;
  }

  const char* parts_[kMost];
  int at_ = 0, count_ = 0;
};

// What a thread works on, laid out in its scratch.
struct Scratch : Softmax {
  float* out;         // [kRows][D] sums of weighted values
  uint16_t* q;        // [kRows][D]
  uint16_t* weights;  // [kRows][kTile]
  char* tail;         // values of the last 32 keys, zero where there are none
  Asking* asking;

  Scratch(float* at, int D, bool one_of_several, Asking* asking) : asking(asking) {
    const int rows = one_of_several ? kLaneRows : kRows;
    out = at;
    scores = out + rows * D;
    sums = scores + rows * kTile;
    maximum = sums + rows * 16;
    base = maximum + rows;
    factor = base + rows;
    q = reinterpret_cast<uint16_t*>(factor + rows);
    weights = q + rows * D;
    tail = reinterpret_cast<char*>(weights + rows * kTile);
  }
};

// scores[16][T] = q[16] @ keys from row r on, for the 16-key groups that there are.
void score(const Scratch& s, const Located& at, int r, int D, int64_t key_step) {
  float* to = s.scores + r * kTile;
  const uint16_t* q = s.q + r * D;
  if (at.count > 2 * kSide) {
    const char *k0 = at.k[0], *k1 = at.k[1], *k2 = at.k[2], *k3 = at.count > 3 * kSide ? at.k[3] : at.k[2];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < D / 32; ++d) {
      _tile_loadd(4, q + d * 32, D * 2);
      _tile_loadd(5, k0 + d * key_step, 64);
      _tile_dpbf16ps(0, 4, 5);
      s.asking->some();
      _tile_loadd(6, k1 + d * key_step, 64);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(5, k2 + d * key_step, 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(6, k3 + d * key_step, 64);
      _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, to, kTile * 4);
    _tile_stored(1, to + 16, kTile * 4);
    _tile_stored(2, to + 32, kTile * 4);
    _tile_stored(3, to + 48, kTile * 4);
    return;
  }
  const char *k0 = at.k[0], *k1 = at.count > kSide ? at.k[1] : at.k[0];
  _tile_zero(0);
  _tile_zero(1);
  for (int d = 0; d < D / 32; ++d) {
    _tile_loadd(4, q + d * 32, D * 2);
    _tile_loadd(5, k0 + d * key_step, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, k1 + d * key_step, 64);
    _tile_dpbf16ps(1, 4, 6);
    s.asking->some();
  }
  _tile_stored(0, to, kTile * 4);
  _tile_stored(1, to + 16, kTile * 4);
}

// Scores become weights, the factor being of what was summed before; hidden keys weigh zero.
template <int groups>
void exponentiate(const Scratch& s, const uint64_t* seen, __m512 factor_to_log2, int first, int rows, int D) {
  for (int r = first; r < first + rows; ++r) {
    s.asking->some();
    const float* x = s.scores + r * kTile;
    const __m512 base = _mm512_set1_ps(s.base[r]);
    __m512 weight[groups];
    for (int g = 0; g < groups; ++g) {
      weight[g] = exp2(_mm512_fmsub_ps(_mm512_load_ps(x + g * kSide), factor_to_log2, base));
      if (seen) weight[g] = _mm512_maskz_mov_ps(part(seen[r - first], g), weight[g]);
    }
    __m512 added = _mm512_add_ps(weight[0], weight[1]);
    if constexpr (groups == 4) added = _mm512_add_ps(added, _mm512_add_ps(weight[2], weight[3]));
    float* sums = s.sums + r * 16;
    _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_load_ps(sums), _mm512_set1_ps(s.factor[r]), added));
    char* weights = reinterpret_cast<char*>(s.weights + r * kTile);
    for (int g = 0; g < groups; g += 2)
      _mm512_store_si512(weights + g * 32, (__m512i)_mm512_cvtne2ps_pbh(weight[g + 1], weight[g]));
    if (s.factor[r] == 1.0f) continue;
    const __m512 factor = _mm512_set1_ps(s.factor[r]);
    for (int i = 0; i < D; i += 16) {
      float* to = s.out + r * D + i;
      _mm512_store_ps(to, _mm512_mul_ps(_mm512_load_ps(to), factor));
    }
  }
}

// What a tile of `count` keys adds to the 16 rows from r on: scores become weights, and what was summed before is
// brought to the new maxima.
template <int groups>
void weigh(const Scratch& s, const Work& work, int r, int64_t first_key, int count, int64_t lowest, int D) {
  uint64_t masks[kSide];
  const uint64_t* seen = masks_of<groups>(work, r, first_key, count, lowest, masks);
  s.asking->some();
  raise_maxima<groups>(s, work, r, seen, kSlack);
  s.asking->some();
  exponentiate<groups>(s, seen, to_log2(work), r, rows_from(work, r), D);
}

// A copy of the last 32 values with zeros after the first `count`: what lies there may be NaN, and 0 * NaN is.
void copy_tail(char* to, const char* v, int count, int D) {
  for (int i = 0; i < D / 16; ++i, to += kPackedTile, v += kPackedTile) {
    __builtin_memset(to, 0, kPackedTile);
    __builtin_memcpy(to, v, count / 2 * 64);
    if (count % 2) {
      const __m512i pairs = _mm512_loadu_si512(v + count / 2 * 64);
      _mm512_storeu_si512(to + count / 2 * 64, _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff)));
    }
  }
}

// out[16][D] += weights[16] @ values from row r on. v: of 32 keys each, `groups` of them.
void accumulate(const Scratch& s, const char* const* v, int groups, int r, int D) {
  const uint16_t* weights = s.weights + r * kTile;
  int d = 0;
  for (; d + 64 <= D; d += 64) {
    float* to = s.out + r * D + d;
    _tile_loadd(0, to, D * 4);
    _tile_loadd(1, to + 16, D * 4);
    _tile_loadd(2, to + 32, D * 4);
    _tile_loadd(3, to + 48, D * 4);
    for (int g = 0; g < groups; ++g) {
      const char* b = v[g] + d / 16 * kPackedTile;
      _tile_loadd(4, weights + g * 32, kTile * 2);
      _tile_loadd(5, b, 64);
      _tile_dpbf16ps(0, 4, 5);
      s.asking->some();
      _tile_loadd(6, b + kPackedTile, 64);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(5, b + 2 * kPackedTile, 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(6, b + 3 * kPackedTile, 64);
      _tile_dpbf16ps(3, 4, 6);
      s.asking->some();
    }
    _tile_stored(0, to, D * 4);
    _tile_stored(1, to + 16, D * 4);
    _tile_stored(2, to + 32, D * 4);
    _tile_stored(3, to + 48, D * 4);
  }
  if (d == D) return;  // 32 more
  float* to = s.out + r * D + d;
  _tile_loadd(0, to, D * 4);
  _tile_loadd(1, to + 16, D * 4);
  for (int g = 0; g < groups; ++g) {
    const char* b = v[g] + d / 16 * kPackedTile;
    _tile_loadd(4, weights + g * 32, kTile * 2);
    _tile_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + kPackedTile, 64);
    _tile_dpbf16ps(1, 4, 6);
  }
  _tile_stored(0, to, D * 4);
  _tile_stored(1, to + 16, D * 4);
}

inline void copy(char* to, const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
}

inline void clear(char* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm512_store_si512(to + i, _mm512_setzero_si512());
}

// A row's state: 16 lanes of its denominator, its maximum, padding, then its sums. tile_rows: that a product takes.
void start(const Scratch& s, const Work& work, int tile_rows, int D) {
  const int rows = work.num_rows <= tile_rows ? tile_rows : (work.num_rows + kSide - 1) / kSide * kSide;
  for (int r = 0; r < rows; ++r) {
    const float* state = r < work.num_rows && !work.store_state ? work.state[r] : nullptr;
    s.maximum[r] = state ? state[16] : kNone;
    _mm512_store_ps(s.sums + r * 16, state ? _mm512_loadu_ps(state) : _mm512_setzero_ps());
    char *const out = reinterpret_cast<char*>(s.out + r * D), *const q = reinterpret_cast<char*>(s.q + r * D);
    if (state) copy(out, reinterpret_cast<const char*>(state + kStateHeader), D * 4);
    else clear(out, D * 4);
    if (r < work.num_rows) copy(q, static_cast<const char*>(work.q[r]), D * 2);
    else clear(q, D * 2);
  }
}

void finish(const Scratch& s, const Work& work, int D) {
  for (int r = 0; r < work.num_rows; ++r) {
    const float* out = s.out + r * D;
    const __m512 sums = _mm512_load_ps(s.sums + r * 16);
    if (work.store_state) {
      _mm512_storeu_ps(work.state[r], sums);
      work.state[r][16] = s.maximum[r];
      __builtin_memcpy(work.state[r] + kStateHeader, out, D * sizeof(float));
      continue;
    }
    const float sum = _mm512_reduce_add_ps(sums);
    float scale = 1.0f / sum;
    if (work.has_sinks) {
      const float sink = work.sink[r] * kLog2e, most = sink > s.maximum[r] ? sink : s.maximum[r];
      const float own = exp2(s.maximum[r] - most);
      scale = own / (sum * own + exp2(sink - most));
    }
    char* to = static_cast<char*>(work.out[r]);
    for (int d = 0; d < D; d += 32) {
      const __m512 low = _mm512_mul_ps(_mm512_load_ps(out + d), _mm512_set1_ps(scale));
      const __m512 high = _mm512_mul_ps(_mm512_load_ps(out + d + 16), _mm512_set1_ps(scale));
      _mm512_storeu_si512(to + d * 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

// One item on its way through the keys.
struct Lane {
  const Work* work;
  const Work* ahead;  // the item whose turn comes after it, or null
  Scratch scratch;
  int64_t first;
  int64_t lowest;  // position among its rows
  int groups;      // of 32 keys in this tile
  Located now, next;
  Asking asking;
};

// A lane's next tile of keys: where it is, and its values without what lies past the last one.
void advance(Lane& lane, int D) {
  lane.now = lane.next;
  if (lane.first + kTile < lane.work->end) locate(lane.next, *lane.work, lane.first + kTile);
  else if (lane.ahead) locate(lane.next, *lane.ahead, lane.ahead->begin);
  else lane.next.count = 0;
  lane.asking.start(lane.next, *lane.work);
  lane.groups = (lane.now.count + kPackedValues - 1) / kPackedValues;
  if (lane.now.count % kPackedValues == 0) return;
  const char*& last = lane.now.v[lane.groups - 1];
  copy_tail(lane.scratch.tail, last, lane.now.count % kPackedValues, D);
  last = lane.scratch.tail;
}

// 16 rows of a lane.
struct Unit {
  Lane* lane;
  int row;
};

// Units' scores are a step ahead of their weights: the matrix unit works on one's while the vector units work on
// another's, as far as the processor looks ahead.
void attend_tile(const Unit* units, int count, int D, int64_t key_step) {
  score(units->lane->scratch, units->lane->now, units->row, D, key_step);
  for (const Unit* unit = units; unit < units + count; ++unit) {
    const Unit* next = unit + 1;
    if (next < units + count) score(next->lane->scratch, next->lane->now, next->row, D, key_step);
    const Lane& lane = *unit->lane;
    const auto weigh_groups = lane.groups > 1 ? weigh<4> : weigh<2>;
    weigh_groups(lane.scratch, *lane.work, unit->row, lane.first, lane.now.count, lane.lowest, D);
    accumulate(lane.scratch, lane.now.v, lane.groups, unit->row, D);
  }
}

void attend_lanes(const Work* works, int count, const Work* ahead, int num_ahead, int tile_rows, float* scratch) {
  const int D = works->head_dim;
  const int64_t key_step = works->block_size / kPackedKeys * kPackedTile;
  const int64_t lane_floats = scratch_floats(D) / kLanes / 16 * 16;
  alignas(Lane) char room[kLanes * sizeof(Lane)];
  Lane* lanes = reinterpret_cast<Lane*>(room);
  for (int i = 0; i < count; ++i) {
    const Scratch own(scratch + i * lane_floats, D, count > 1, &lanes[i].asking);
    const Work* then = i < num_ahead ? ahead + i : nullptr;
    new (lanes + i) Lane{works + i, then, own, works[i].begin, lowest_position(works[i]), 0, {}, {}, {}};
    start(own, works[i], tile_rows, D);
    locate(lanes[i].next, works[i], works[i].begin);
  }
  for (;;) {
    Unit units[kUnits];
    int num_units = 0;
    for (Lane* lane = lanes; lane < lanes + count; ++lane) {
      if (lane->first >= lane->work->end) continue;
      advance(*lane, D);
      for (int r = 0; r < lane->work->num_rows; r += kSide) units[num_units++] = {lane, r};
    }
    if (num_units == 0) break;
    attend_tile(units, num_units, D, key_step);
    for (int i = 0; i < count; ++i) lanes[i].first += kTile;
  }
  for (int i = 0; i < count; ++i) {
    lanes[i].asking.rest();
    finish(lanes[i].scratch, *lanes[i].work, D);
  }
}

}  // namespace

void attend(const Work* works, int count, const Work* ahead, int num_ahead, float* scratch) {
  int rows = 0;
  for (int i = 0; i < count; ++i) rows = works[i].num_rows > rows ? works[i].num_rows : rows;
  const int tile_rows = rows < kSide ? rows : kSide;
  const Tiles tiles{TileConfig(tile_rows)};
  attend_lanes(works, count, ahead, num_ahead, tile_rows, scratch);
}

}  // namespace amx
}  // namespace cpu_ops
