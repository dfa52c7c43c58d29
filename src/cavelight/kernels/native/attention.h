// Absorbed attention over latent rows where they lie, in pages: the queries of all heads meet a row in one pass.
//
// Letters: H heads, N width without position, R rotary width, C latent width, L = C + R, G groups of sixteen queries.
//
// A query is one head of one token; sixteen of them lie side by side in the lanes of a vector, so a row's number is
// spread over the lanes and the product needs no sum across. The past is cut at fixed positions and each piece has
// its own softmax; the pieces are put together in their order. So a token's bits depend on nothing but its past.
#pragma once
#include "lanes.h"

namespace cavelight {

struct Span {  // tokens of one sequence in a step
    int64_t first, count, start, pages;  // first token; how many; position of the first; where its pages begin
};

struct Past {  // a layer's rows
    uint8_t *rows;
    const int64_t *pages;
    int64_t page, width;  // positions of a page; L
    bool half;            // bfloat16

    uint8_t *at(const Span &span, int64_t position) const {
        int64_t slot = pages[span.pages + position / page] * page + position % page;
        return rows + slot * width * (half ? 2 : 4);
    }
    void put(const Span &span, int64_t position, const float *row) const {
        uint8_t *to = at(span, position);
        if (!half) std::memcpy(to, row, 4 * width);
        for (int64_t i = 0; half && i < width; i++) ((uint16_t *)to)[i] = narrow(row[i]);
    }
    void get(const Span &span, int64_t position, float *row) const {
        const uint8_t *from = at(span, position);
        if (!half) std::memcpy(row, from, 4 * width);
        int64_t i = 0;
        for (; half && i + LANES <= width; i += LANES) store(row + i, widen(load<h16>(from + 2 * i)));
        for (; half && i < width; i++) row[i] = widen(((const uint16_t *)from)[i]);
    }
};

struct Piece {  // of one sequence's past, for all its queries
    int64_t span, first, last, out;  // positions; index of its first group's sums
};

constexpr int64_t BLOCK = 256;  // positions that are looked at together
constexpr int ROWS = 8;         // of these at once

inline int64_t groups_of(const Span &span, int64_t H) { return (span.count * H + LANES - 1) / LANES; }

// Where the piece that begins at `position` ends.
inline int64_t piece_end(int64_t position) { return position + (position < 512 ? 64 : position < 4096 ? 256 : 1024); }

struct Sums {  // of one group over one piece: the largest score, the sum of weights, and [C][16] of weighted rows
    std::vector<float> largest, total, mixed;
    void make_room(int64_t count, int64_t C) {
        largest.resize(count * LANES), total.resize(count * LANES), mixed.resize(count * C * LANES);
    }
};

// scores[row][lane] of `count` rows, a multiple of ROWS, for one group's queries [L][16].
inline void score(const float *rows, int64_t count, int64_t L, const float *query, float *scores) {
    for (int64_t s = 0; s < count; s += ROWS) {
        v16 sums[ROWS] = {};
        const float *some = rows + s * L;
        for (int64_t i = 0; i < L; i++) {
            v16 q = load<v16>(query + i * LANES);
            for (int r = 0; r < ROWS; r++) sums[r] += q * some[r * L + i];
        }
        for (int r = 0; r < ROWS; r++) store(scores + (s + r) * LANES, sums[r]);
    }
}

// mixed[c][lane] = mixed * keep + sum of weights[row][lane] * rows[row][c].
inline void mix(const float *rows, int64_t count, int64_t L, int64_t C, const float *weights, v16 keep, float *mixed) {
    for (int64_t c = 0; c < C; c += LANES) {
        v16 sums[LANES];
        for (int i = 0; i < LANES; i++) sums[i] = load<v16>(mixed + (c + i) * LANES) * keep;
        for (int64_t s = 0; s < count; s++) {
            v16 w = load<v16>(weights + s * LANES);
            const float *row = rows + s * L + c;
            for (int i = 0; i < LANES; i++) sums[i] += w * row[i];
        }
        for (int i = 0; i < LANES; i++) store(mixed + (c + i) * LANES, sums[i]);
    }
}

// All of a sequence's queries over one piece of its past. room: of the thread; last: of each lane, what it may see.
inline void look(const Past &past, const Span &span, const Piece &piece, int64_t H, int64_t C, const float *queries,
                 const i16 *last, Sums &sums, std::vector<float> &room) {
    const int64_t L = past.width, G = groups_of(span, H);
    room.resize(BLOCK * L + BLOCK * LANES);
    float *rows = room.data(), *weights = rows + BLOCK * L;
    for (int64_t g = 0; g < G; g++) {
        int64_t out = piece.out + g;
        store(&sums.largest[out * LANES], all(-1e30f)), store(&sums.total[out * LANES], v16{});
        std::fill_n(&sums.mixed[out * C * LANES], C * LANES, 0.0f);
    }
    for (int64_t first = piece.first; first < piece.last; first += BLOCK) {
        int64_t count = std::min(BLOCK, piece.last - first), padded = (count + ROWS - 1) / ROWS * ROWS;
        for (int64_t s = 0; s < count; s++) past.get(span, first + s, rows + s * L);
        std::fill_n(rows + count * L, (padded - count) * L, 0.0f);
        for (int64_t g = 0; g < G; g++) {
            int64_t out = piece.out + g;
            score(rows, padded, L, queries + g * L * LANES, weights);
            v16 before = load<v16>(&sums.largest[out * LANES]), largest = before, total = {};
            for (int64_t s = 0; s < padded; s++) {
                i16 seen = (i16{} + int32_t(first + s)) <= last[g];
                v16 x = seen ? load<v16>(weights + s * LANES) : all(-INFINITY);
                store(weights + s * LANES, x);
                largest = larger(largest, x);
            }
            for (int64_t s = 0; s < padded; s++) {
                v16 w = exp(load<v16>(weights + s * LANES) - largest);
                store(weights + s * LANES, w);
                total += w;
            }
            v16 keep = exp(before - largest);
            store(&sums.total[out * LANES], load<v16>(&sums.total[out * LANES]) * keep + total);
            store(&sums.largest[out * LANES], largest);
            mix(rows, padded, L, C, weights, keep, &sums.mixed[out * C * LANES]);
        }
    }
}

}  // namespace cavelight
