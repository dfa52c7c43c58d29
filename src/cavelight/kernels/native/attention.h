// Absorbed attention over latent rows where they lie, in pages: the queries of all heads meet a row in one pass.
//
// Letters: H heads, N width without position, R rotary width, C latent width, L = C + R, G groups of sixteen queries.
//
// A query is one head of one token; sixteen of them lie side by side in the lanes of a vector, so a row's number is
// spread over the lanes and the product needs no sum across. The past is cut at fixed positions and each piece has
// its own softmax; the pieces are put together in their order. So a token's bits depend on nothing but its past.
#pragma once
#include "product.h"

namespace cavelight {

struct Span {  // tokens of one sequence in a step
    int64_t first, count, start, pages;  // first token; how many; position of the first; where its pages begin
};

// A row in INT8: its latent in integers, a float32 scale for each GROUP of them, from `key_at` on its rotary key in
// bfloat16. See run/rows.py.
constexpr int64_t GROUP = 128;
inline int64_t key_at(int64_t C) { return C + (C + GROUP - 1) / GROUP * 4; }

struct Past {  // a layer's rows
    uint8_t *rows;
    const int64_t *pages;
    int64_t page, width, C;  // positions of a page; L; C
    int64_t kind, row_bytes;

    const uint8_t *at(const Span &span, int64_t position) const {
        return rows + (pages[span.pages + position / page] * page + position % page) * row_bytes;
    }
    void put(const Span &span, int64_t position, const float *row) const;
};

struct Piece {  // of one sequence's past, for all its queries
    int64_t span, first, last, out;  // positions; index of its first group's sums
};

constexpr int64_t BLOCK = 128;  // positions that are looked at together
constexpr int64_t LATER = 32;   // so many after a row, another one is fetched meanwhile
constexpr int ROWS = 16;        // looked at at once,
constexpr int COLUMNS = 96;     // and of each so many numbers, which a core's first cache holds
constexpr float LOWEST = -3.4e38f;  // below every score: minus infinity would be NaN where it is subtracted from itself

inline void Past::put(const Span &span, int64_t position, const float *row) const {
    uint8_t *to = const_cast<uint8_t *>(at(span, position));
    if (kind == FLOAT32) std::memcpy(to, row, 4 * width);
    for (int64_t i = 0; kind == BFLOAT16 && i < width; i++) ((uint16_t *)to)[i] = narrow(row[i]);
    if (kind != INT8) return;
    for (int64_t first = 0; first < C; first += GROUP) {
        const int64_t last = std::min(first + GROUP, C);
        float largest = 0;
        for (int64_t i = first; i < last; i++)
            if (!(std::fabs(row[i]) <= largest) && largest == largest) largest = std::fabs(row[i]);  // NaN stays
        const float scale = largest / 127.0f;
        std::memcpy(to + C + first / GROUP * 4, &scale, 4);
        for (int64_t i = first; i < last; i++) to[i] = scale > 0 ? int8_t(std::nearbyint(row[i] / scale)) : 0;
    }
    for (int64_t i = C; i < width; i++) {
        const uint16_t x = narrow(row[i]);
        std::memcpy(to + key_at(C) + 2 * (i - C), &x, 2);
    }
}

inline int64_t groups_of(const Span &span, int64_t H) { return (span.count * H + LANES - 1) / LANES; }

// Where the piece that begins at `position` ends.
inline int64_t piece_end(int64_t position) { return position + (position < 512 ? 64 : position < 4096 ? 256 : 1024); }

struct Sums {  // of one group over one piece: each query's largest score, sum of weights, and [16][C] of weighted rows
    Floats largest, total, mixed;
    void make_room(int64_t count, int64_t C) {
        largest.resize(count * LANES), total.resize(count * LANES), mixed.resize(count * LANES * C);
    }
};

// Sixteen numbers of a row from i on, or one: i a multiple of sixteen.
template <int kind>
inline v16 numbers(const uint8_t *row, int64_t i, int64_t C) {
    if constexpr (kind == INT8) {
        if (i >= C) return widen(load<h16>(row + key_at(C) + 2 * (i - C)));
        return widen(load<b16>(row + i)) * load<float>(row + C + i / GROUP * 4);
    }
    if constexpr (kind == BFLOAT16) return widen(load<h16>(row + 2 * i));
    return load<v16>(row + 4 * i);
}
template <int kind>
inline float number(const uint8_t *row, int64_t i, int64_t C) {
    if constexpr (kind == INT8) {
        if (i >= C) return widen(load<uint16_t>(row + key_at(C) + 2 * (i - C)));
        return int8_t(row[i]) * load<float>(row + C + i / GROUP * 4);
    }
    return value<kind>(row, i);
}

// Where a row's number i stands while it is worked on: of 32 in bfloat16 first those at even places, then those at odd
// ones, since so they are quickest to widen.
inline int64_t place(int64_t i, int64_t L, int64_t kind) {
    return kind == BFLOAT16 && i < L / 32 * 32 ? i / 32 * 32 + i % 2 * LANES + i % 32 / 2 : i;
}

// 32 numbers of a row in the order of `place`.
template <int kind>
inline void unfold(const uint8_t *row, int64_t i, int64_t C, float *to) {
    if constexpr (kind == BFLOAT16) {
        i16 both = load<i16>(row + 2 * i);
        store(to, as_float(both << 16)), store(to + LANES, as_float(both & ~0xffff));
    } else {
        store(to, numbers<kind>(row, i, C)), store(to + LANES, numbers<kind>(row, i + LANES, C));
    }
}

// 32 numbers in the order of `place` in bfloat16, back in their own.
inline void fold(float *numbers) {
    v16 even = load<v16>(numbers), odd = load<v16>(numbers + LANES);
    store(numbers, BOTH(even, odd, {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}));
    store(numbers + LANES, BOTH(even, odd, {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}));
}

// scores[g][row][lane] of sixteen rows for all groups' queries [G][L][16], each number at its `place`.
// next: rows that will be wanted later.
template <int kind>
inline void score(const Past &past, const uint8_t *const *rows, const uint8_t *next, int64_t G, const float *queries,
                  float *scores, int64_t stride) {
    const int64_t L = past.width, C = past.C, apart = ROWS * past.row_bytes / L;
    float wide[ROWS][COLUMNS];
    for (int64_t from = 0; from < L; from += COLUMNS) {
        const int64_t count = std::min<int64_t>(COLUMNS, L - from);
        int64_t whole = count / 32 * 32;
        for (int64_t i = 0; i < whole; i += 32)
            EACH for (int r = 0; r < ROWS; r++) unfold<kind>(rows[r], from + i, C, &wide[r][i]);
        for (int64_t i = whole; i < count; i++)
            for (int r = 0; r < ROWS; r++) wide[r][i] = number<kind>(rows[r], from + i, C);
        for (int64_t g = 0; g < G; g++) {
            v16 sums[ROWS];
            float *at = scores + g * stride;
            EACH for (int r = 0; r < ROWS; r++) sums[r] = from ? load<v16>(at + r * LANES) : v16{};
            const float *query = queries + (g * L + from) * LANES;
            for (int64_t i = 0; i < count; i++) {
                v16 q = load<v16>(query + i * LANES);
                EACH for (int r = 0; r < ROWS; r++) sums[r] += q * wide[r][i];
                if (!g && (kind == FLOAT32 || i % 2 == 0))  // once for each 64 bytes or less
                    __builtin_prefetch(next + (from + i) * apart, 0, 2);
            }
            EACH for (int r = 0; r < ROWS; r++) store(at + r * LANES, sums[r]);
        }
    }
}

// mixed[lane][c] = mixed * keep[lane] + sum of weights[row][lane] * rows[row][c], each c at its `place`; fresh: there is
// no `mixed` yet.
template <int kind>
inline void mix(const uint8_t *const *rows, int64_t count, int64_t C, const float *weights, const float *keep,
                bool fresh, float *mixed) {
    for (int64_t c = 0; c < C; c += LANES) {
        v16 sums[LANES];
        EACH for (int i = 0; i < LANES; i++) sums[i] = fresh ? v16{} : load<v16>(mixed + i * C + c) * keep[i];
        auto add = [&](auto sixteen) {
            for (int64_t s = 0; s < count; s++) {
                v16 row = sixteen(rows[s]);
                EACH for (int i = 0; i < LANES; i++) sums[i] += row * weights[s * LANES + i];
            }
        };
        const int64_t both = 2 * (c / 32 * 32);  // where even and odd places begin
        if (kind != BFLOAT16 || c >= C / 32 * 32)
            add([&](const uint8_t *row) { return numbers<kind>(row, c, C); });
        else if (c % 32)
            add([&](const uint8_t *row) { return as_float(load<i16>(row + both) & ~0xffff); });
        else
            add([&](const uint8_t *row) { return as_float(load<i16>(row + both) << 16); });
        EACH for (int i = 0; i < LANES; i++) store(mixed + i * C + c, sums[i]);
    }
}

// All of a sequence's queries over one piece of its past. last: of each lane, what it may see.
template <int kind>
inline void look(const Past &past, const Span &span, const Piece &piece, int64_t H, const float *queries,
                 const i16 *last, Sums &sums, Floats &room) {
    const int64_t C = past.C, G = groups_of(span, H), stride = BLOCK * LANES;
    room.resize(G * stride);
    float *weights = room.data();
    for (int64_t g = 0; g < G; g++) {
        int64_t out = piece.out + g;
        store(&sums.largest[out * LANES], all(LOWEST)), store(&sums.total[out * LANES], v16{});
    }
    for (int64_t first = piece.first; first < piece.last; first += BLOCK) {
        const uint8_t *rows[BLOCK];  // those past the last one are the last one again, and seen by nobody
        int64_t count = std::min(BLOCK, piece.last - first), padded = (count + ROWS - 1) / ROWS * ROWS;
        for (int64_t s = 0; s < padded; s++) rows[s] = past.at(span, first + std::min(s, count - 1));
        for (int64_t s = 0; s < padded; s += ROWS) {
            int64_t ahead = std::min(first + s + LATER, piece.last - 1);
            score<kind>(past, rows + s, past.at(span, ahead), G, queries, weights + s * LANES, stride);
        }
        for (int64_t g = 0; g < G; g++) {
            float *mine = weights + g * stride, keep[LANES];
            int64_t out = piece.out + g;
            v16 before = load<v16>(&sums.largest[out * LANES]), largest = before, total = {};
            for (int64_t s = 0; s < padded; s++) {
                i16 position = i16{} + (s < count ? int32_t(first + s) : INT32_MAX);
                v16 x = position <= last[g] ? load<v16>(mine + s * LANES) : all(-INFINITY);
                store(mine + s * LANES, x);
                largest = larger(largest, x);
            }
            for (int64_t s = 0; s < padded; s++) {
                v16 w = exp(load<v16>(mine + s * LANES) - largest);
                store(mine + s * LANES, w);
                total += w;
            }
            v16 kept = exp(before - largest);
            store(keep, kept);
            store(&sums.total[out * LANES], load<v16>(&sums.total[out * LANES]) * kept + total);
            store(&sums.largest[out * LANES], largest);
            mix<kind>(rows, padded, C, mine, keep, first == piece.first, &sums.mixed[out * C * LANES]);
        }
    }
}

}  // namespace cavelight
