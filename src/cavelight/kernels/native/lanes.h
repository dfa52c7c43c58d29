// Sixteen floats at a time, in the compiler's own vector types: AVX-512, AVX2 or NEON come out of the same lines.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace cavelight {

#define EACH _Pragma("GCC unroll 16")

constexpr int LANES = 16;
typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef int8_t b16 __attribute__((vector_size(16)));

// Memory that begins where a cache's line does: a vector across two lines takes as long to read as two.
template <class T>
struct Aligned {
    typedef T value_type;
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U> &) {}
    T *allocate(size_t n) { return static_cast<T *>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T *p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const Aligned &) const { return true; }
    bool operator!=(const Aligned &) const { return false; }
};
typedef std::vector<float, Aligned<float>> Floats;

template <class V>
inline V load(const void *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float *p, v16 v) { std::memcpy(p, &v, sizeof v); }
inline v16 all(float x) { return x - v16{}; }  // which is x, so that compilers leave it out; x + 0 is not -0 for -0
inline v16 as_float(i16 v) { return (v16)v; }

// bfloat16 is the upper half of a float32.
#ifdef __AVX512F__  // which some compilers fill in halves only
inline v16 widen(h16 v) { return as_float((i16)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16)); }
inline v16 widen(b16 v) { return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v)); }
#else
inline v16 widen(h16 v) { return as_float(__builtin_convertvector(v, i16) << 16); }
inline v16 widen(b16 v) { return __builtin_convertvector(__builtin_convertvector(v, i16), v16); }
#endif
inline float widen(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline uint16_t narrow(float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float sum(v16 v) {  // halves on halves
    v += __builtin_shuffle(v, i16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, i16{4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3});
    v += __builtin_shuffle(v, i16{2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1});
    return v[0] + v[1];
}

// The sums of sixteen vectors, each added up as `sum` does: half of a and half of b side by side, and on the others.
#define BOTH(a, b, ...) (__builtin_shuffle(a, b, i16 __VA_ARGS__))
__attribute__((always_inline)) inline v16 sums(const v16 *v) {
    v16 a[8], b[4], c[2];
    EACH for (int i = 0; i < 8; i++)
        a[i] = BOTH(v[2 * i], v[2 * i + 1], {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
               BOTH(v[2 * i], v[2 * i + 1], {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    EACH for (int i = 0; i < 4; i++)
        b[i] = BOTH(a[2 * i], a[2 * i + 1], {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) +
               BOTH(a[2 * i], a[2 * i + 1], {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
    EACH for (int i = 0; i < 2; i++)
        c[i] = BOTH(b[2 * i], b[2 * i + 1], {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}) +
               BOTH(b[2 * i], b[2 * i + 1], {2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31});
    return BOTH(c[0], c[1], {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) +
           BOTH(c[0], c[1], {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
}

inline v16 larger(v16 a, v16 b) { return a > b ? a : b; }

// e^x within 2 units in the last place; 0 for x far below zero, minus infinity included.
inline v16 exp(v16 x) {
    const v16 magic = all(12582912.0f);  // adding it rounds to a whole number
    v16 least = all(-87.0f), low = x < least ? least : x;
    v16 n = low * 1.44269504f + magic - magic;
    v16 r = low - n * 0.693359375f + n * 2.12194440e-4f;
    v16 y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    i16 power = (__builtin_convertvector(n, i16) + 127) << 23;
    y *= as_float(power);
    return x < least ? v16{} : y;
}

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }

}  // namespace cavelight
