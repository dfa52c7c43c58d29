// y = x W^T for a few rows of x, with W read once as it is stored: float32, bfloat16, or integers of 8 or 4 bits.
//
// Letters: T rows of x, O outputs (rows of W), I inputs (its columns).
//
// Every number of y is summed in the same order whatever T is and whoever computes it: one vector of sixteen sums
// goes along the columns, then the sixteen are added. So a token's bits do not depend on its company.
#pragma once
#include "lanes.h"

namespace cavelight {

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 8, INT4 = 4 };

struct Matrix {  // [O, I], or a stack of them
    int32_t kind, scale_kind;
    int64_t rows, columns;
    const uint8_t *data;
    const uint8_t *scale;
    int64_t row_bytes, stack_bytes;        // from a row to the next, from a matrix of a stack to the next
    int64_t scale_row, scale_stack, group;  // the same for scales, in elements; columns that share a scale
};

// Columns that one turn of the inner loop takes, and where in it x has to lie.
template <int kind>
constexpr int STEP = kind == INT4 ? 128 : kind == BFLOAT16 ? 32 : LANES;

// x [T, I] in the order in which a matrix of this kind meets its columns; what does not fill a turn stays in place.
inline const float *arranged(int kind, const float *x, int64_t T, int64_t I, std::vector<float> &room) {
    if (kind != BFLOAT16 && kind != INT4) return x;
    int64_t step = kind == INT4 ? STEP<INT4> : STEP<BFLOAT16>, parts = step / LANES, whole = I / step * step;
    room.resize(T * I);
    for (int64_t t = 0; t < T; t++) {
        const float *from = x + t * I;
        float *to = room.data() + t * I;
        for (int64_t i = 0; i < whole; i += step)
            for (int64_t part = 0; part < parts; part++)
                for (int64_t lane = 0; lane < LANES; lane++) to[i + part * LANES + lane] = from[i + lane * parts + part];
        std::copy(from + whole, from + I, to + whole);
    }
    return room.data();
}

inline float scale_at(const Matrix &m, int64_t index) {
    return m.scale_kind == BFLOAT16 ? widen(load<uint16_t>(m.scale + 2 * index)) : load<float>(m.scale + 4 * index);
}

template <int kind>
inline float value(const Matrix &m, const uint8_t *row, int64_t scales, int64_t i) {
    if (kind == FLOAT32) return load<float>(row + 4 * i);
    if (kind == BFLOAT16) return widen(load<uint16_t>(row + 2 * i));
    float integer = kind == INT8 ? float(int(row[i]) - 128) : float(((row[i / 2] >> (4 * (i % 2))) & 15) - 8);
    return integer * scale_at(m, scales + i / m.group);
}

// The scales of 128 columns, each in the lanes of its columns: a lane holds eight that follow one another.
inline v16 scales_of_turn(const Matrix &m, int64_t scales, int64_t i) {
    if (m.group >= STEP<INT4>) return all(scale_at(m, scales + i / m.group));
    float lanes[LANES];
    int64_t each = m.group / 8, first = scales + i / m.group;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = scale_at(m, first + lane / each);
    return load<v16>(lanes);
}

// R rows of W with T rows of x: sums[R][T].
template <int kind, int R, int T>
inline void tile(const Matrix &m, const uint8_t *row, int64_t scales, const float *x, int64_t ahead, float (&out)[R][T]) {
    const int64_t I = m.columns, step = STEP<kind>, whole = I / step * step;
    v16 sums[R][T] = {};
    if constexpr (kind == FLOAT32) {
        for (int64_t i = 0; i < whole; i += step)
            for (int r = 0; r < R; r++) {
                const uint8_t *p = row + r * m.row_bytes + 4 * i;
                __builtin_prefetch(p + ahead);
                v16 w = load<v16>(p);
                for (int t = 0; t < T; t++) sums[r][t] += w * load<v16>(x + t * I + i);
            }
    } else if constexpr (kind == BFLOAT16) {
        for (int64_t i = 0; i < whole; i += step)
            for (int r = 0; r < R; r++) {
                const uint8_t *p = row + r * m.row_bytes + 2 * i;
                __builtin_prefetch(p + ahead);
                i16 pairs = load<i16>(p);
                v16 even = as_float(pairs << 16), odd = as_float(pairs & int(0xffff0000));
                for (int t = 0; t < T; t++) {
                    sums[r][t] += even * load<v16>(x + t * I + i);
                    sums[r][t] += odd * load<v16>(x + t * I + i + LANES);
                }
            }
    } else if constexpr (kind == INT8) {
        const int64_t group = std::min(m.group, I);
        for (int64_t first = 0, g = 0; first < whole; first += group, g++) {
            v16 part[R][T] = {};
            for (int64_t i = first; i < std::min(first + group, whole); i += step)
                for (int r = 0; r < R; r++) {
                    const uint8_t *p = row + r * m.row_bytes + i;
                    __builtin_prefetch(p + ahead);
                    v16 w = __builtin_convertvector(__builtin_convertvector(load<b16>(p) ^ int8_t(-128), i16), v16);
                    for (int t = 0; t < T; t++) part[r][t] += w * load<v16>(x + t * I + i);
                }
            for (int r = 0; r < R; r++)
                for (int t = 0; t < T; t++) sums[r][t] += part[r][t] * scale_at(m, scales + r * m.scale_row + g);
        }
    } else {
        const v16 values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        for (int64_t i = 0; i < whole; i += step)
            for (int r = 0; r < R; r++) {
                const uint8_t *p = row + r * m.row_bytes + i / 2;
                __builtin_prefetch(p + ahead);
                i16 words = load<i16>(p);
                v16 part[T] = {};
                for (int place = 0; place < 8; place++) {
                    v16 w = __builtin_shuffle(values, (words >> (4 * place)) & 15);
                    for (int t = 0; t < T; t++) part[t] += w * load<v16>(x + t * I + i + place * LANES);
                }
                v16 scale = scales_of_turn(m, scales + r * m.scale_row, i);
                for (int t = 0; t < T; t++) sums[r][t] += part[t] * scale;
            }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            float rest = 0;
            for (int64_t i = whole; i < I; i++)
                rest += value<kind>(m, row + r * m.row_bytes, scales + r * m.scale_row, i) * x[t * I + i];
            out[r][t] = sum(sums[r][t]) + rest;
        }
}

template <int kind, int R, int T>
inline void rows_and_tokens(const Matrix &m, int64_t e, int64_t o, const float *x, float *y, int64_t width) {
    float out[R][T];
    const uint8_t *row = m.data + e * m.stack_bytes + o * m.row_bytes;
    tile<kind, R, T>(m, row, e * m.scale_stack + o * m.scale_row, x, R * m.row_bytes, out);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) y[t * width + o + r] = out[r][t];
}

// y[t][o] for o in [first, last), `width` apart from row to row; x as `arranged` gives it; e: which matrix of a stack.
template <int kind>
void rows_of_kind(const Matrix &m, int64_t e, int64_t first, int64_t last, const float *x, int64_t T, float *y,
                  int64_t width) {
    constexpr int R = 4;
    for (int64_t o = first; o < last;) {
        bool many = o + R <= last;
        for (int64_t t = 0; t < T;) {
            const float *some = x + t * m.columns;
            float *to = y + t * width;
            int64_t left = T - t;
            if (left >= 4) {
                many ? rows_and_tokens<kind, R, 4>(m, e, o, some, to, width)
                     : rows_and_tokens<kind, 1, 4>(m, e, o, some, to, width);
                t += 4;
            } else if (left >= 2) {
                many ? rows_and_tokens<kind, R, 2>(m, e, o, some, to, width)
                     : rows_and_tokens<kind, 1, 2>(m, e, o, some, to, width);
                t += 2;
            } else {
                many ? rows_and_tokens<kind, R, 1>(m, e, o, some, to, width)
                     : rows_and_tokens<kind, 1, 1>(m, e, o, some, to, width);
                t += 1;
            }
        }
        o += many ? R : 1;
    }
}

inline void rows(const Matrix &m, int64_t e, int64_t first, int64_t last, const float *x, int64_t T, float *y,
                 int64_t width) {
    switch (m.kind) {
        case FLOAT32: return rows_of_kind<FLOAT32>(m, e, first, last, x, T, y, width);
        case BFLOAT16: return rows_of_kind<BFLOAT16>(m, e, first, last, x, T, y, width);
        case INT8: return rows_of_kind<INT8>(m, e, first, last, x, T, y, width);
        default: return rows_of_kind<INT4>(m, e, first, last, x, T, y, width);
    }
}

}  // namespace cavelight
