// The scan of info_nce (specification in info_nce.h) with products in bf16 on the matrix units of x86-64,
// AMX.
//
// The units multiply a tile A of 16 rows by a tile B whose rows are pairs of depth, side by side. Scores have
// rows of the queue for A and queries for B, so that queries lie along vectors as they do in products.h and
// the softmax is the same. Weighted sums have features for A, for which a tile of the queue is turned, and
// the exponentials for B:
//   scores[j][w]   = sum_c row[j][c] * query[c][w]
//   weighted[c][w] = sum_j row[j][c] * p[j][w]
// Operands are rounded to nearest, sums are fp32. Empty where the compiler is not told of the units.
#if defined(__AMX_BF16__)
#include <immintrin.h>

#include "info_nce_scan.h"

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

constexpr int64_t kRows = 192;      // of the queue, per softmax step
constexpr int64_t kDepthStep = 32;  // that one instruction multiplies
constexpr int64_t kTileRows = 16;   // and the columns of fp32
constexpr int64_t kBlock = 32;      // rows and columns that one loop makes, 2 x 2 tiles
static_assert(kLanes == kTileRows && kPanel == kBlock && kRows % kBlock == 0);

MOCO_FAST_INLINE int64_t padded(int64_t size) { return (size + kDepthStep - 1) / kDepthStep * kDepthStep; }

// All eight tiles, of 16 rows of 64 bytes; back to none at the end, as a thread has to leave them.
struct Tiles {
    Tiles() {
        // Palette 1; from byte 16 the bytes in a row, of 16 bits each; from byte 48 the rows.
        alignas(64) static const uint8_t kShapes[64] = {
            1,  0, 0,  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 64, 0, 64, 0,  64, 0,  64, 0,  64, 0,
            64, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  0, 0,  0, 16, 16, 16, 16, 16, 16, 16, 16};
        _tile_loadconfig(kShapes);
    }
    ~Tiles() { _tile_release(); }
};

// out (32, panel) = a b for a (32, depth) and b (depth / 2, panel, 2).
MOCO_FAST_INLINE void product(const bf16_t* a, int64_t stride, const bf16_t* b, int64_t depth, float* out) {
    __asm__ volatile("" ::: "memory");  // GCC does not know that tiles are loaded from what was stored before
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth; d += kDepthStep) {
        _tile_loadd(4, a + d, stride * sizeof(bf16_t));
        _tile_loadd(5, a + d + kTileRows * stride, stride * sizeof(bf16_t));
        _tile_loadd(6, b + d * kPanel, 2 * kPanel * sizeof(bf16_t));
        _tile_loadd(7, b + d * kPanel + 2 * kLanes, 2 * kPanel * sizeof(bf16_t));
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, kPanel * sizeof(float));
    _tile_stored(1, out + kLanes, kPanel * sizeof(float));
    _tile_stored(2, out + kTileRows * kPanel, kPanel * sizeof(float));
    _tile_stored(3, out + kTileRows * kPanel + kLanes, kPanel * sizeof(float));
}

// Both in bf16: first[0], second[0], first[1], second[1], ...
MOCO_FAST_INLINE __m512i pairs(__m512 first, __m512 second) {
    alignas(64) static const uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                    21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), __m512i(_mm512_cvtne2ps_pbh(second, first)));
}

// (count, panel) -> (depth / 2, panel, 2), zero beyond the last row.
MOCO_FAST_INLINE void pack_pairs(const float* rows, int64_t count, int64_t depth, bf16_t* packed) {
    for (int64_t d = 0; d < depth; d += 2)
        for (int v = 0; v < 2; ++v) {
            const float* const at = rows + d * kPanel + v * kLanes;
            const __m512 first = d < count ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
            const __m512 second = d + 1 < count ? _mm512_loadu_ps(at + kPanel) : _mm512_setzero_ps();
            _mm512_store_si512(packed + d * kPanel + v * 2 * kLanes, pairs(first, second));
        }
}

// Rows and columns of 16 x 16 elements of 32 bits, exchanged.
MOCO_FAST_INLINE void turn(__m512i (&x)[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; ++k) {
            x[i + 2 * k] = _mm512_unpacklo_epi64(y[i + k], y[i + 2 + k]);
            x[i + 2 * k + 1] = _mm512_unpackhi_epi64(y[i + k], y[i + 2 + k]);
        }
    // Row i + k holds column k of each quarter of rows i to i + 3.
    for (int k = 0; k < 4; ++k) {
        const __m512i low02 = _mm512_shuffle_i32x4(x[k], x[4 + k], 0x88);
        const __m512i low13 = _mm512_shuffle_i32x4(x[k], x[4 + k], 0xdd);
        const __m512i high02 = _mm512_shuffle_i32x4(x[8 + k], x[12 + k], 0x88);
        const __m512i high13 = _mm512_shuffle_i32x4(x[8 + k], x[12 + k], 0xdd);
        y[k] = _mm512_shuffle_i32x4(low02, high02, 0x88);
        y[8 + k] = _mm512_shuffle_i32x4(low02, high02, 0xdd);
        y[4 + k] = _mm512_shuffle_i32x4(low13, high13, 0x88);
        y[12 + k] = _mm512_shuffle_i32x4(low13, high13, 0xdd);
    }
    for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Rows (count, C) in bf16, as they lie, (kRows, depth), and, unless that is null, turned, (depth, kRows);
// zero beyond the last row of a block and beyond C.
void pack_rows(const float* rows, int64_t count, int64_t features, int64_t depth, bf16_t* lying,
               bf16_t* turned) {
    for (int64_t j = 0; j < count; j += kBlock)
        for (int64_t c = 0; c < depth; c += 16) {
            const int64_t left = features - c;
            const __mmask16 inside = left >= 16 ? 0xffff : left > 0 ? __mmask16((1 << left) - 1) : 0;
            __m512i found[16];
            for (int i = 0; i < 16; ++i) {
                const int64_t row = j + 2 * i;
                const float* const at = rows + row * features + c;
                const __m512 first = _mm512_maskz_loadu_ps(row < count ? inside : 0, at);
                const __m512 second = _mm512_maskz_loadu_ps(row + 1 < count ? inside : 0, at + features);
                const __m512i both = __m512i(_mm512_cvtne2ps_pbh(second, first));
                bf16_t* const to = lying + row * depth + c;
                _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(both));
                _mm256_store_si256(reinterpret_cast<__m256i*>(to + depth),
                                   _mm512_extracti64x4_epi64(both, 1));
                found[i] = pairs(first, second);
            }
            if (!turned) continue;
            turn(found);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(turned + (c + i) * kRows + j, found[i]);
        }
}

struct Layout {
    int64_t depth, rows, queries, turned, scores, weights, sums, widened, size;  // places, in floats

    Layout(int64_t features, int64_t panels, DType dtype) : depth(padded(features)) {
        rows = 0;
        turned = rows + kRows * depth / 2;
        queries = turned + kRows * depth / 2;
        scores = queries + panels * depth * kPanel / 2;
        weights = scores + kRows * kPanel;
        sums = weights + kRows * kPanel / 2;
        widened = sums + kBlock * kPanel;
        size = widened + (dtype == DType::f32 ? 0 : kRows * depth);
    }
};

int64_t scratch(int64_t features, int64_t panels, DType rows_dtype) {
    return Layout(features, panels, rows_dtype).size;
}

void scan(const InfoNceScan& a) {
    const Layout at(a.features, a.panels, a.rows_dtype);
    const auto bf16 = [&a](int64_t place) { return reinterpret_cast<bf16_t*>(a.scratch + place); };
    bf16_t *const lying = bf16(at.rows), *const turned = a.weighted ? bf16(at.turned) : nullptr;
    bf16_t *const queries = bf16(at.queries), *const weights = bf16(at.weights);
    float *const scores = a.scratch + at.scores, *const sums = a.scratch + at.sums;
    const Tiles tiles;
    for (int64_t p = 0; p < a.panels; ++p)
        pack_pairs(a.queries + p * a.features * kPanel, a.features, at.depth,
                   queries + p * at.depth * kPanel);
    for (int64_t first = 0; first < a.count; first += kRows) {
        const int64_t count = a.count - first < kRows ? a.count - first : kRows, depth = padded(count);
        const float* rows = tile_rows(a.rows, a.rows_dtype, first, count, a.features, a.scratch + at.widened);
        pack_rows(rows, count, a.features, at.depth, lying, turned);
        for (int64_t p = 0; p < a.panels; ++p) {
            const int64_t query = p * kPanel;
            prefetch_part(a, first + kRows, kRows, p);
            for (int64_t j = 0; j < count; j += kBlock)
                product(lying + j * at.depth, at.depth, queries + query * at.depth, at.depth,
                        scores + j * kPanel);
            Vec scale[2];
            softmax_panel(scores, count, a.positive + query, a.scale_to_log2, from_query(a.state, query),
                          scale);
            if (!a.weighted) continue;
            pack_pairs(scores, count, depth, weights);
            for (int64_t c = 0; c < a.features; c += kBlock) {
                product(turned + c * kRows, kRows, weights, depth, sums);
                float* to = a.weighted + (p * a.features + c) * kPanel;
                for (int64_t i = 0; i < kBlock && c + i < a.features; ++i, to += kPanel)
                    for (int v = 0; v < 2; ++v)
                        store(to + v * kLanes,
                              load(to + v * kLanes) * scale[v] + load(sums + i * kPanel + v * kLanes));
            }
        }
    }
}

}  // namespace

const InfoNceScanner kInfoNceBf16 = {kRows, scratch, scan};

}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast

#endif
