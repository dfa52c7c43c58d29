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

constexpr int64_t AHEAD = 8192;        // bytes that are asked for before they are needed
constexpr int64_t BLOCK_ROWS = 32;      // of a matrix that are gone through together
constexpr int64_t MOST_NUMBERS = 10240;  // of x that a core's first cache holds, and something beside
constexpr int64_t MOST_GROUPS = 4096;  // of a row

// Columns that one turn of the inner loop takes, and where in it x has to lie.
template <int kind>
constexpr int STEP = kind == INT4 ? 128 : kind == BFLOAT16 ? 32 : LANES;

// From a row of arranged x to the next: rows a whole number of pages apart would crowd one corner of a core's cache.
inline int64_t stride(int64_t I) { return I + LANES; }

// x [T, I] in the order in which a matrix of this kind meets its columns; what does not fill a turn stays in place.
inline const float *arranged(int kind, const float *x, int64_t T, int64_t I, Floats &room) {
    const int64_t step = kind == INT4 ? STEP<INT4> : kind == BFLOAT16 ? STEP<BFLOAT16> : LANES;
    const int64_t parts = step / LANES, whole = I / step * step;
    if (parts == 1 && T == 1) return x;
    room.resize(T * stride(I));
    for (int64_t t = 0; t < T; t++) {
        const float *from = x + t * I;
        float *to = room.data() + t * stride(I);
        for (int64_t i = 0; i < whole && parts > 1; i += step)
            for (int64_t part = 0; part < parts; part++)
                for (int64_t lane = 0; lane < LANES; lane++)
                    to[i + part * LANES + lane] = from[i + lane * parts + part];
        int64_t done = parts > 1 ? whole : 0;
        std::copy(from + done, from + I, to + done);
    }
    return room.data();
}

inline float scale_at(const Matrix &m, int64_t index) {
    return m.scale_kind == BFLOAT16 ? widen(load<uint16_t>(m.scale + 2 * index)) : load<float>(m.scale + 4 * index);
}

template <int kind>
inline float value(const uint8_t *row, int64_t i) {
    if (kind == FLOAT32) return load<float>(row + 4 * i);
    if (kind == BFLOAT16) return widen(load<uint16_t>(row + 2 * i));
    return kind == INT8 ? float(int(row[i]) - 128) : float(((row[i / 2] >> (4 * (i % 2))) & 15) - 8);
}

inline void read_scales(const Matrix &m, int64_t first, int64_t count, float *scale) {
    int64_t g = 0;
    for (; m.scale_kind == BFLOAT16 && g + LANES <= count; g += LANES)
        store(scale + g, widen(load<h16>(m.scale + 2 * (first + g))));
    for (; g < count; g++) scale[g] = scale_at(m, first + g);
}

// R rows of W with T rows of x. ahead: bytes to where memory will be read from soon, 0 to leave that to others.
template <int kind, int R, int T>
inline void tile(const Matrix &m, const uint8_t *row, int64_t scales, const float *x, int64_t ahead,
                 float (&out)[R][T]) {
    const int64_t I = m.columns, X = stride(I), step = STEP<kind>, whole = I / step * step;
    const int64_t group = std::min(m.group, I), groups = kind >= INT4 ? (I + group - 1) / group : 0;
    v16 sums[R][T] = {};
    float scale[R][kind >= INT4 ? MOST_GROUPS + LANES : 1];
    for (int r = 0; r < R && groups; r++) read_scales(m, scales + r * m.scale_row, groups, scale[r]);
    if constexpr (kind == FLOAT32 || kind == BFLOAT16) {
        for (int64_t i = 0; i < whole; i += step) {
            EACH for (int r = 0; r < R; r++) {
                const uint8_t *p = row + r * m.row_bytes + (kind == FLOAT32 ? 4 : 2) * i;
                if (ahead) __builtin_prefetch(p + ahead);
                if constexpr (kind == FLOAT32) {
                    v16 w = load<v16>(p);
                    EACH for (int t = 0; t < T; t++) sums[r][t] += w * load<v16>(x + t * X + i);
                } else {
                    i16 pairs = load<i16>(p);
                    v16 even = as_float(pairs << 16), odd = as_float(pairs & int(0xffff0000));
                    EACH for (int t = 0; t < T; t++) sums[r][t] += even * load<v16>(x + t * X + i);
                    EACH for (int t = 0; t < T; t++) sums[r][t] += odd * load<v16>(x + t * X + i + LANES);
                }
            }
        }
    } else if constexpr (kind == INT8) {
        for (int64_t first = 0, g = 0; first < whole; first += group, g++) {
            v16 part[R][T] = {};
            for (int64_t i = first; i < std::min(first + group, whole); i += step) {
                EACH for (int r = 0; r < R; r++) {
                    const uint8_t *p = row + r * m.row_bytes + i;
                    if (ahead) __builtin_prefetch(p + ahead);
                    v16 w = widen(load<b16>(p) ^ int8_t(-128));
                    EACH for (int t = 0; t < T; t++) part[r][t] += w * load<v16>(x + t * X + i);
                }
            }
            EACH for (int r = 0; r < R; r++)
                EACH for (int t = 0; t < T; t++) sums[r][t] += part[r][t] * scale[r][g];
        }
    } else {
        const v16 values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        i16 group_of_lane;  // a lane holds eight columns that follow one another
        for (int lane = 0; lane < LANES; lane++) group_of_lane[lane] = 8 * lane / group;
        for (int64_t i = 0; i < whole; i += step) {
            v16 part[R][T] = {};
            i16 words[R];
            EACH for (int r = 0; r < R; r++) {
                const uint8_t *p = row + r * m.row_bytes + i / 2;
                if (ahead) __builtin_prefetch(p + ahead);
                words[r] = load<i16>(p);
            }
            EACH for (int place = 0; place < 8; place++) {
                EACH for (int r = 0; r < R; r++) {
                    v16 w = __builtin_shuffle(values, words[r] >> (4 * place));
                    EACH for (int t = 0; t < T; t++) part[r][t] += w * load<v16>(x + t * X + i + place * LANES);
                }
            }
            EACH for (int r = 0; r < R; r++) {
                v16 lanes = __builtin_shuffle(load<v16>(&scale[r][i / group]), group_of_lane);
                EACH for (int t = 0; t < T; t++) sums[r][t] += part[r][t] * lanes;
            }
        }
    }
    if constexpr (R * T == LANES)
        store(out[0], cavelight::sums(sums[0]));
    else
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) out[r][t] = sum(sums[r][t]);
    for (int r = 0; r < R && whole < I; r++)
        for (int t = 0; t < T; t++) {
            float rest = 0;
            for (int64_t i = whole; i < I; i++)
                rest += value<kind>(row + r * m.row_bytes, i) * (groups ? scale[r][i / group] : 1.0f) * x[t * X + i];
            out[r][t] += rest;
        }
}

template <int kind, int R, int T>
inline void rows_and_tokens(const Matrix &m, int64_t e, int64_t o, const float *x, int64_t ahead, float *y,
                            int64_t width) {
    float out[R][T];
    const uint8_t *row = m.data + e * m.stack_bytes + o * m.row_bytes;
    tile<kind, R, T>(m, row, e * m.scale_stack + o * m.scale_row, x, ahead, out);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) y[t * width + o + r] = out[r][t];
}

struct Ahead {  // bytes to what is fetched meanwhile, 0 for nothing: on in the matrix, past `end` of it somewhere else
    int64_t bytes, end, beyond;
    int64_t at(int64_t byte) const { return bytes && byte + bytes >= end ? beyond : bytes; }
};

// y[t][o] for o in [first, last), `width` apart from row to row; x as `arranged` gives it; e: which matrix of a stack.
template <int kind, int T>
void block(const Matrix &m, int64_t e, int64_t first, int64_t last, const float *x, const Ahead &ahead, float *y,
           int64_t width) {
    constexpr int R = T == 8 ? 2 : 4;
    int64_t o = first;
    for (; o + R <= last; o += R) rows_and_tokens<kind, R, T>(m, e, o, x, ahead.at(o * m.row_bytes), y, width);
    for (; o < last; o++) rows_and_tokens<kind, 1, T>(m, e, o, x, ahead.at(o * m.row_bytes), y, width);
}

// The same for any T. next: what will be read after these rows, if that is known.
template <int kind>
void rows_of_kind(const Matrix &m, int64_t e, int64_t first, int64_t last, const float *x, int64_t T, float *y,
                  int64_t width, const uint8_t *next) {
    const int64_t near = 4 * m.row_bytes, far = (AHEAD + near - 1) / near * near, X = stride(m.columns);
    const int64_t stop = last * m.row_bytes;
    const int64_t beyond = next ? far + (next - (m.data + e * m.stack_bytes + stop)) : far;
    for (int64_t o = first; o < last; o += BLOCK_ROWS) {  // these stay in the cache while all tokens meet them
        const int64_t end = std::min(last, o + BLOCK_ROWS);
        Ahead ahead{far, stop, beyond};
        for (int64_t t = 0; t < T; ahead.bytes = 0) {
            const float *some = x + t * X;
            float *to = y + t * width;
            int64_t left = T - t;
            if (left >= 8 && X <= MOST_NUMBERS / 8) block<kind, 8>(m, e, o, end, some, ahead, to, width), t += 8;
            else if (left >= 4) block<kind, 4>(m, e, o, end, some, ahead, to, width), t += 4;
            else if (left >= 2) block<kind, 2>(m, e, o, end, some, ahead, to, width), t += 2;
            else block<kind, 1>(m, e, o, end, some, ahead, to, width), t += 1;
        }
    }
}

inline void rows(const Matrix &m, int64_t e, int64_t first, int64_t last, const float *x, int64_t T, float *y,
                 int64_t width, const uint8_t *next = nullptr) {
    switch (m.kind) {
        case FLOAT32: return rows_of_kind<FLOAT32>(m, e, first, last, x, T, y, width, next);
        case BFLOAT16: return rows_of_kind<BFLOAT16>(m, e, first, last, x, T, y, width, next);
        case INT8: return rows_of_kind<INT8>(m, e, first, last, x, T, y, width, next);
        default: return rows_of_kind<INT4>(m, e, first, last, x, T, y, width, next);
    }
}

}  // namespace cavelight
