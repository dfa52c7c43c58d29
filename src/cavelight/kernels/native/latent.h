// Around attention: queries taken down into the latent space, the past laid out for it, and its pieces put together.
//
// Letters: T tokens, H heads, N width without position, R rotary width, C latent width, L = C + R.
#pragma once
#include "layer.h"

namespace cavelight {

constexpr int NEAR = 8;  // rows that are added up together

// The queries of one head, taken down into the latent space and scaled: low[t][h][L]. They are worked on side by side,
// since as they lie they would meet in the same few places of a core's cache.
inline void absorb(const Layer &l, const Step &s, int64_t h, const float *queries, float *low,
                   Floats &room) {
    const int64_t L = l.C + l.R, width = l.N + l.R, wide = l.C + LANES, narrow = l.N + LANES;
    const uint8_t *up = l.key_up.data + h * l.key_up.stack_bytes;
    const bool half = l.key_up.kind == BFLOAT16;
    room.assign(s.T * (wide + narrow), 0.0f);
    float *sums = room.data(), *query = sums + s.T * wide;
    for (int64_t t = 0; t < s.T; t++) std::copy_n(queries + (t * l.H + h) * width, l.N, query + t * narrow);
    for (int64_t n = 0; n < l.N; n += NEAR) {  // past N there are zeros in `query`
        const uint8_t *from = up + n * l.key_up.row_bytes;
        const int64_t near = std::min<int64_t>(NEAR, l.N - n);
        for (int64_t c = 0; c < l.C; c += LANES) {
            v16 w[NEAR];
            EACH for (int64_t i = 0; i < NEAR; i++) {
                const uint8_t *p = from + std::min(i, near - 1) * l.key_up.row_bytes;
                __builtin_prefetch(p + NEAR * l.key_up.row_bytes + (half ? 2 : 4) * c);
                w[i] = half ? numbers<BFLOAT16>(p, c, l.C) : numbers<FLOAT32>(p, c, l.C);
            }
            for (int64_t t = 0; t < s.T; t++) {
                float *to = sums + t * wide + c;
                const float *q = query + t * narrow + n;
                v16 sum = load<v16>(to);
                EACH for (int64_t i = 0; i < NEAR; i++) sum += w[i] * q[i];
                store(to, sum);
            }
        }
    }
    for (int64_t t = 0; t < s.T; t++) {
        float *row = low + (t * l.H + h) * L;
        std::copy_n(sums + t * wide, l.C, row);
        rotate(queries + (t * l.H + h) * width + l.N, s.cos + t * l.R / 2, s.sin + t * l.R / 2, l.R, row + l.C);
        for (int64_t i = 0; i < L; i++) row[i] *= l.softmax_scale;
    }
}

// Sixteen queries side by side, from low[query][L], for rows of this kind; those past the last are zero.
inline void side_by_side(const float *low, int64_t queries, int64_t L, int64_t kind, float *lanes) {
    int64_t count = std::min<int64_t>(queries, LANES);
    for (int64_t i = 0; i < L; i++) {
        float *to = lanes + place(i, L, kind) * LANES;
        for (int64_t lane = 0; lane < LANES; lane++) to[lane] = lane < count ? low[lane * L + i] : 0.0f;
    }
}

// Cut every sequence's past into pieces, and say what each lane may see.
inline void lay_out(const Layer &l, const Step &s, Room &room) {
    int64_t groups = 0, out = 0;
    room.pieces.clear(), room.group_of_span.clear(), room.piece_of_span.clear(), room.last.clear();
    for (int64_t n = 0; n < s.spans_count; n++) {
        const Span &span = s.spans[n];
        int64_t G = groups_of(span, l.H), end = span.start + span.count;
        room.group_of_span.push_back(groups), room.piece_of_span.push_back(room.pieces.size());
        for (int64_t lane = 0; lane < G * LANES; lane++) {
            if (lane % LANES == 0) room.last.push_back(i16{});
            room.last.back()[lane % LANES] = int32_t(span.start + std::min(lane / l.H, span.count - 1));
        }
        for (int64_t first = 0; first < end; first = piece_end(first), out += G)
            room.pieces.push_back({n, first, std::min(end, piece_end(first)), out});
        groups += G;
    }
    room.piece_of_span.push_back(room.pieces.size());
    room.lanes.resize(groups * (l.C + l.R) * LANES);
    room.sums.make_room(out, l.C);
}

// Put the pieces of one span's past together for one query: mixed[h][t][c].
inline void gather(const Layer &l, const Step &s, int64_t n, int64_t query, Room &room) {
    const Span &span = s.spans[n];
    auto first = room.pieces.begin() + room.piece_of_span[n], last = room.pieces.begin() + room.piece_of_span[n + 1];
    auto at = [query](const Piece &p) { return p.out * LANES + query; };
    float largest = LOWEST, total = 0;
    for (auto p = first; p != last; p++) largest = std::max(largest, room.sums.largest[at(*p)]);
    int64_t t = span.first + query / l.H, h = query % l.H;
    float *mixed = &room.mixed[(h * s.T + t) * l.C];
    std::fill_n(mixed, l.C, 0.0f);
    for (auto p = first; p != last; p++) {
        float weight = std::exp(room.sums.largest[at(*p)] - largest);
        total += weight * room.sums.total[at(*p)];
        const float *from = &room.sums.mixed[at(*p) * l.C];
        for (int64_t c = 0; c < l.C; c++) mixed[c] += weight * from[c];
    }
    for (int64_t c = 0; c < l.C; c++) mixed[c] /= total;
    if (s.past.kind == BFLOAT16)
        for (int64_t c = 0; c < l.C / 32 * 32; c += 32) fold(mixed + c);
}

}  // namespace cavelight
