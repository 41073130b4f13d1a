// The matrix units for bf16 of x86-64 (AMX) on a CPU with AVX-512 that has none: over the compiler's header,
// tiles in memory. Sums are in the order of the instruction; denormals, which it flushes, are kept.
#pragma once

#include_next <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

struct Tile {
    alignas(64) uint8_t row[16][64];
};

// Of one thread. No program may use tiles before it has given them shapes, of which only the largest are
// known.
struct Tiles {
    bool configured = false;
    Tile tile[8];

    ~Tiles() {
        if (configured) std::abort();
    }

    void configure(const uint8_t* shapes) {
        if (shapes[0] != 1) std::abort();
        for (int i = 0; i < 8; ++i)
            if (shapes[16 + 2 * i] != 64 || shapes[17 + 2 * i] != 0 || shapes[48 + i] != 16) std::abort();
        configured = true;
    }

    Tile& operator[](int i) {
        if (!configured) std::abort();
        return tile[i];
    }
};

inline thread_local Tiles tiles;

inline void load(int to, const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i)
        std::memcpy(tiles[to].row[i], static_cast<const uint8_t*>(from) + i * stride, 64);
}

inline void store(int from, void* to, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<uint8_t*>(to) + i * stride, tiles[from].row[i], 64);
}

inline __m512 lower(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

inline __m512 upper(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}

inline void multiply(int to, int of_a, int of_b) {
    const Tile &a = tiles[of_a], &b = tiles[of_b];
    for (int i = 0; i < 16; ++i) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (int d = 0; d < 16; ++d) {
            int pair;
            std::memcpy(&pair, a.row[i] + 4 * d, 4);
            const __m512i left = _mm512_set1_epi32(pair), right = _mm512_load_si512(b.row[d]);
            even = _mm512_fmadd_ps(lower(left), lower(right), even);
            odd = _mm512_fmadd_ps(upper(left), upper(right), odd);
        }
        uint8_t* const sum = tiles[to].row[i];
        _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_add_ps(even, odd)));
    }
}

// In bf16, to nearest and ties to even; a NaN stays one.
inline __m256i rounded(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_srli_epi32(bits, 16);
    const __m512i half =
        _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(odd, _mm512_set1_epi32(1)));
    const __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(up, nan, odd, _mm512_set1_epi32(0x40)));
}

inline __m512i rounded(__m512 high, __m512 low) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(rounded(low)), rounded(high), 1);
}

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) emulated_amx::tiles.configure(shapes)
#define _tile_release() emulated_amx::tiles.configured = false
#define _tile_zero(to) std::memset(&emulated_amx::tiles[to], 0, sizeof(emulated_amx::Tile))
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_dpbf16ps emulated_amx::multiply
#define _mm512_cvtne2ps_pbh emulated_amx::rounded
