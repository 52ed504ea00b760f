// Products with packed weights on the matrix unit (AMX): bfloat16 summed in float32, int8 in int32, in the order of the
// inputs whatever the rows beside them, so that a row's bits do not depend on the batch.
//
// A block of 32 rows by 32 outputs (16 and 16 of the two halves, if gated) is four tiles, which stay in registers over
// all inputs. All rows go by two strips of the weight before the next ones come, and ask for those meanwhile, evenly.
//
// Four tiles come for four products, more than the second-level cache gives: what is used again, of many rows the strips
// and of one block these, stays in the nearest cache, and the others pass it by.

#include <algorithm>

#include "activation_amx.h"
#include "amx.h"
#include "codes_amx.h"
#include "linear.h"

namespace cpu_ops {
namespace amx {
namespace {

constexpr int64_t kBlockRows = 32, kSumBytes = 4096;  // of a block
constexpr int64_t kLead = 2, kPlaces = 4;             // steps that tiles are unpacked ahead of their products, and kept

inline __m512 wide(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }

// How a block reads its rows.
struct Rows {
  const char* at;
  int64_t stride, step, second;  // bytes from row to row, from a step's inputs to the next's, to row 16
  bool two;                      // more than 16 rows
};

// Tiles are named by literals only.
#define MULTIPLY_TILES(c, a, b)                                       \
  do {                                                                \
    if constexpr (number == Number::bf16) _tile_dpbf16ps(c, a, b);    \
    else _tile_dpbssd(c, a, b);                                       \
  } while (false)

#define LOAD_TILE(which, tile, at, stride)                            \
  do {                                                                \
    if constexpr (passing == which) _tile_stream_loadd(tile, at, stride); \
    else _tile_loadd(tile, at, stride);                               \
  } while (false)

// Two strips of a weight. A step's tiles are at its place: its bits of `places`.
struct Strips {
  const char *first, *second;
  int64_t places = ~int64_t{0};
};

// From sums to results, for two strips: as Product says.
struct Epilogue {
  Product product;
  int64_t first;       // output
  __mmask16 masks[2];  // outputs of the two tiles
  __m512 bias[2], scales[2];

  Epilogue(const Product& p, int64_t block) : product(p), first(p.block_outputs() * block) {
    for (int i = 0; i < 2; ++i) {
      const int64_t at = first + i * (p.gated ? p.n / 2 : kSide), left = p.gated ? kSide : p.n - at;
      masks[i] = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
      bias[i] = _mm512_setzero_ps();
      if (p.bias) bias[i] = wide(_mm256_maskz_loadu_epi16(masks[i], p.bias + at * 2));
      if (p.number == Number::s8) scales[i] = _mm512_maskz_loadu_ps(masks[i], p.scales + at);
    }
  }

  template <Number number, bool act, bool gated> void store(const char* sums, int64_t row) const {
    char* out = product.out + (row * product.out_size() + first) * 2;
    __m512 low, high;
    if constexpr (number == Number::bf16) {
      low = _mm512_add_ps(_mm512_load_ps(sums), bias[0]);
      high = _mm512_add_ps(_mm512_load_ps(sums + 1024), bias[1]);
    } else {
      const __m512 scale = _mm512_set1_ps(product.x_scales[row]);
      low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), _mm512_mul_ps(scale, scales[0]), bias[0]);
      high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + 1024)), _mm512_mul_ps(scale, scales[1]), bias[1]);
    }
    if constexpr (gated) {
      const __m512 result = gated_activation(product.activation, rounded(low), rounded(high));
      _mm256_mask_storeu_epi16(out, masks[0], (__m256i)_mm512_cvtneps_pbh(result));
      return;
    }
    if constexpr (act) {
      low = activation(product.activation, rounded(low));
      high = activation(product.activation, rounded(high));
    }
    const __m512i result = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (product.streams) _mm512_stream_si512(reinterpret_cast<__m512i*>(out), result);
    else _mm512_mask_storeu_epi16(out, masks[0] | static_cast<__mmask32>(masks[1]) << 16, result);
  }
};

// A block whose sums are made and whose results are not all stored.
struct Pending {
  const Epilogue* epilogue;
  const char* sums;
  int64_t row, count, done;

  template <Number number, bool act, bool gated> void store(int64_t rows) {
    for (const int64_t end = std::min(count, done + rows); done < end; ++done)
      epilogue->store<number, act, gated>(sums + done / kSide * 2048 + done % kSide * 64, row + done);
  }
};

// What passes the nearest cache by.
enum class Passing { rows, strips };

// sums = rows @ strips. Meanwhile stores the block before, whose vector operations take as long as the tiles' own, and
// asks for `ahead` cache lines of each of the coming strips a step. unpacker: of these strips, which are not there yet.
template <Number number, bool act, bool gated, bool two, Passing passing, bool unpacks>
void multiply_rows(const Rows& rows, Strips strips, int64_t steps, char* sums, Pending& before, Strips coming, int ahead,
                   Unpacker& unpacker) {
  const int64_t stored = (kBlockRows + steps - 1) / steps;
  _tile_zero(0);
  _tile_zero(1);
  if (two) _tile_zero(2);
  if (two) _tile_zero(3);
  const char* x = rows.at;
  if constexpr (unpacks)
    for (int64_t step = 0; step < std::min(kLead, steps); ++step) unpacker.step();
  for (int64_t step = 0; step < steps; ++step) {
    LOAD_TILE(Passing::rows, 4, x, rows.stride);
    const int64_t place = (step & strips.places) * kTileBytes;
    LOAD_TILE(Passing::strips, 6, strips.first + place, 64);
    MULTIPLY_TILES(0, 4, 6);
    LOAD_TILE(Passing::strips, 7, strips.second + place, 64);
    MULTIPLY_TILES(1, 4, 7);
    for (int i = 0; i < ahead; ++i) _mm_prefetch(coming.first + i * 64, _MM_HINT_T1);
    for (int i = 0; i < ahead; ++i) _mm_prefetch(coming.second + i * 64, _MM_HINT_T1);
    if constexpr (unpacks)
      if (step + kLead < steps) unpacker.step();
    if (two) {
      LOAD_TILE(Passing::rows, 5, x + rows.second, rows.stride);
      MULTIPLY_TILES(2, 5, 6);
      MULTIPLY_TILES(3, 5, 7);
    }
    before.store<number, act, gated>(stored);
    x += rows.step;
    coming = {coming.first + ahead * 64, coming.second + ahead * 64};
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 1024, 64);
  if (two) _tile_stored(2, sums + 2048, 64);
  if (two) _tile_stored(3, sums + 3072, 64);
}

// Rows as whole tiles, zero past their count and past k.
void copy_rows(char* to, const Product& product, int64_t row, int64_t num_rows) {
  for (int64_t r = 0; r < (num_rows > kSide ? 2 * kSide : kSide); ++r) {
    const char* from = product.x + (row + r) * product.x_stride;
    for (int64_t step = 0; step < product.steps; ++step) {
      const int64_t left = product.k - step * kStepInputs;
      const __mmask64 mask = r >= num_rows ? 0 : left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      _mm512_store_si512(to + step * 2048 + r / kSide * 1024 + r % kSide * 64,
                         _mm512_maskz_loadu_epi8(mask, from + step * 64));
    }
  }
}

// Rows of a block where they lie, or a copy of those that are no whole tiles.
Rows rows_of(const Product& product, int64_t row, int64_t num_rows, char* room) {
  if (product.k % kStepInputs == 0 && num_rows % kSide == 0)
    return {product.x + row * product.x_stride, product.x_stride, 64, kSide * product.x_stride, num_rows > kSide};
  copy_rows(room, product, row, num_rows);
  return {room, 64, 2048, 1024, num_rows > kSide};
}

// What a group of outputs is made of.
int64_t first_strip(const Product& product, int64_t block) { return product.gated ? block : 2 * block; }
int64_t second_strip(const Product& product, int64_t block) {
  return product.gated ? block + product.n / 2 / kStrip : 2 * block + 1;
}

Strips strips_of(const Product& product, int64_t block) {
  return {product.weight + first_strip(product, block) * product.strip_bytes(),
          product.weight + second_strip(product, block) * product.strip_bytes()};
}

template <Number number, bool act, bool gated, Passing passing, bool codes>
void multiply_blocks(const Product& product, int64_t first_row, int64_t last_row, int64_t first, int64_t last, char* scratch) {
  char *const unpacked = scratch + 2 * kSumBytes, *const room = unpacked + (codes ? 2 * product.steps * kTileBytes : 0);
  const int64_t last_begin = first_row + (last_row - first_row - 1) / kBlockRows * kBlockRows;
  const Rows rest = rows_of(product, last_begin, last_row - last_begin, room);
  const bool copies_all = product.k % kStepInputs != 0 && first_row != last_begin;
  // Together the blocks of rows ask for as many lines as they use. Many of them are slowed more than memory gains.
  const int64_t blocks = (last_row - first_row + kBlockRows - 1) / kBlockRows;
  const int ahead = blocks >= 16 ? 0 : static_cast<int>(product.tile_bytes() / 64 / blocks);
  // What one block of rows takes once stays in the nearest cache.
  char* const places[2] = {unpacked, unpacked + product.steps * kTileBytes};
  const Strips kept{places[0], places[1], blocks == 1 ? kPlaces - 1 : ~int64_t{0}};
  Epilogue epilogues[2] = {Epilogue(product, first), Epilogue(product, first)};
  Pending before{};
  int64_t turn = 0;
  for (int64_t block = first; block < last; ++block) {
    const Strips strips = codes ? kept : strips_of(product, block);
    Unpacker unpacker(product, first_strip(product, block), second_strip(product, block), places, kept.places);
    Strips coming = strips_of(product, block + 1);
    const Epilogue& epilogue = epilogues[block % 2] = Epilogue(product, block);
    for (int64_t row = first_row; row <= last_begin; row += kBlockRows) {
      const int64_t count = row == last_begin ? last_row - row : kBlockRows;
      const Rows rows = row == last_begin && !copies_all ? rest : rows_of(product, row, count, room);
      char* const sums = scratch + turn++ % 2 * kSumBytes;
      const bool unpacks = codes && row == first_row;
      const auto run = rows.two ? (unpacks ? multiply_rows<number, act, gated, true, passing, codes>
                                           : multiply_rows<number, act, gated, true, passing, false>)
                                : (unpacks ? multiply_rows<number, act, gated, false, passing, codes>
                                           : multiply_rows<number, act, gated, false, passing, false>);
      run(rows, strips, product.steps, sums, before, coming, ahead, unpacker);
      before = {&epilogue, sums, row, count, 0};
      coming = {coming.first + product.steps * ahead * 64, coming.second + product.steps * ahead * 64};
    }
  }
  before.store<number, act, gated>(kBlockRows);
}

template <Number number, Passing passing, bool codes>
void multiply_number(const Product& product, int64_t first_row, int64_t last_row, int64_t first, int64_t last, char* scratch) {
  const auto run = product.gated       ? multiply_blocks<number, true, true, passing, codes>
                   : product.activated ? multiply_blocks<number, true, false, passing, codes>
                                       : multiply_blocks<number, false, false, passing, codes>;
  run(product, first_row, last_row, first, last, scratch);
}

template <Passing passing>
void multiply_passing(const Product& product, int64_t first_row, int64_t last_row, int64_t first, int64_t last, char* scratch) {
  const auto run = product.codes.bits              ? multiply_number<Number::bf16, passing, true>
                   : product.number == Number::bf16 ? multiply_number<Number::bf16, passing, false>
                                                    : multiply_number<Number::s8, passing, false>;
  run(product, first_row, last_row, first, last, scratch);
}

}  // namespace

void multiply(const Product& product, int64_t first_row, int64_t last_row, int64_t first, int64_t last, char* scratch) {
  const Tiles tiles{TileConfig()};
  // Unpacked strips are in the nearest cache already.
  const bool once = last_row - first_row <= kBlockRows;
  const auto run = once ? multiply_passing<Passing::strips> : multiply_passing<Passing::rows>;
  run(product, first_row, last_row, first, last, scratch);
  if (product.streams) _mm_sfence();
}

void pack(char* to, const char* weight, int64_t n, int64_t k, int64_t first, int64_t last) {
  const int64_t steps = (k + kStepInputs - 1) / kStepInputs;
  alignas(64) uint32_t rows[kSide][kSide];
  const __m512i columns = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(kSide));
  for (int64_t strip = first; strip < last; ++strip)
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t left = k - step * kStepInputs;
      const __mmask64 mask = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t output = strip * kStrip + i;
        _mm512_store_si512(rows[i], _mm512_maskz_loadu_epi8(output < n ? mask : 0, weight + output * k + step * kStepInputs));
      }
      uint32_t* tile = reinterpret_cast<uint32_t*>(to + (strip * steps + step) * kTileBytes);
      for (int i = 0; i < kSide; ++i)
        _mm512_storeu_si512(tile + i * kSide, _mm512_i32gather_epi32(columns, &rows[0][i], 4));
    }
}

}  // namespace amx
}  // namespace cpu_ops
