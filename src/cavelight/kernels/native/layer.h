// What a layer is, what a step asks of it, and how threads go through it together.
//
// Letters: T tokens, D hidden size, H heads, N width without position, R rotary width, U value width, C latent width,
// L = C + R, E experts, K experts a token, G groups of experts.
#pragma once
#include <atomic>

#include "attention.h"
#include "product.h"

namespace cavelight {

struct Layer {
    int64_t D, H, N, R, C, U, E, K, G, kept_groups, best_of_group;
    int32_t low_rank_query, sigmoid, normalise, shared;  // shared: a dense layer's whole feed-forward, too
    float eps, latent_eps, softmax_scale, routed_scale;
    const float *bias;
    Matrix attention_norm, query_norm, latent_norm, ffn_norm;
    Matrix query_down, query_up, latent_down, key_up, value_up, output;
    Matrix router, gate, up, down, shared_gate, shared_up, shared_down;
};

struct Step {
    int64_t T, spans_count, threads;
    const float *x, *cos, *sin;
    const Span *spans;
    Past past;
    float *y;                // [T, D]
    int64_t *ids;            // [T, K]
    float *weights, *scores;  // [T, K], [T, E]
};

// What a step needs to remember between its phases. One for each thread that asks for steps.
struct Room {
    Floats low, latent, query, absorbed, lanes, mixed, values;
    Floats x, logits, hidden, routed, shared_hidden, shared;
    std::vector<i16> last;
    std::vector<Piece> pieces;
    std::vector<int64_t> group_of_span, piece_of_span, met, first_pair, pair, place;
    Sums sums;
};

constexpr int ACTS = 16;            // at least as many as a layer has
constexpr int64_t MOST_ROWS = 512;  // of a matrix that a thread takes at a time: long ones are read faster

using Team = std::atomic<int64_t>[ACTS];  // of each act, the next piece of work that nobody has taken

// One thread of a team. All go through the same acts, and in each take numbered pieces of work as they get free.
struct Hand {
    const Layer &l;
    const Step &s;
    Room &room;
    Team &team;
    Floats &normed, &order, &inner;  // of its own
    int act = 0;

    template <class Piece>
    void share(int64_t count, Piece piece) {
        for (int64_t i; (i = team[act]++) < count;) piece(i);
        act++;
    }
    void wait() {
#pragma omp barrier
    }
};

// A matrix cut into equal parts, one for each thread or more.
struct Parts {
    int64_t rows, size, count;
    Parts(const Matrix &m, int64_t threads) : rows(m.rows) {
        size = std::min(MOST_ROWS, (rows + threads - 1) / threads + 3) / 4 * 4;
        count = size ? (rows + size - 1) / size : 0;
    }
    int64_t first(int64_t part) const { return part * size; }
    int64_t last(int64_t part) const { return std::min(rows, first(part) + size); }
};

inline void part_of(const Matrix &m, const Parts &parts, int64_t part, int64_t e, const float *x, int64_t T, float *y,
                    const uint8_t *next = nullptr) {
    rows(m, e, parts.first(part), parts.last(part), x, T, y, m.rows, next);
}

// A part of each expert that was chosen, one expert after the other.
struct Chosen {
    const std::vector<int64_t> &met;
    const Parts &parts;
    int64_t count() const { return met.size() * parts.count; }
    const uint8_t *start(const Matrix &m, int64_t i) const {  // nothing past the last one
        if (i >= count()) return nullptr;
        return m.data + met[i / parts.count] * m.stack_bytes + parts.first(i % parts.count) * m.row_bytes;
    }
};

// gain: one row, float32 or bfloat16.
inline void norm(const float *x, const Matrix &gain, float eps, int64_t width, float *y) {
    v16 squares = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) squares += load<v16>(x + i) * load<v16>(x + i);
    for (; i < width; i++) rest += x[i] * x[i];
    float r = 1.0f / std::sqrt((sum(squares) + rest) / width + eps);
    if (gain.kind == BFLOAT16)
        for (i = 0; i < width; i++) y[i] = x[i] * r * value<BFLOAT16>(gain.data, i);
    else
        for (i = 0; i < width; i++) y[i] = x[i] * r * value<FLOAT32>(gain.data, i);
}

inline void norms(const float *x, int64_t stride, const Matrix &gain, float eps, int64_t T, int64_t width,
           Floats &y) {
    y.resize(T * width);
    for (int64_t t = 0; t < T; t++) norm(x + t * stride, gain, eps, width, &y[t * width]);
}

// RoPE on adjacent pairs.
inline void rotate(const float *x, const float *cos, const float *sin, int64_t R, float *y) {
    for (int64_t i = 0; i < R / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        y[2 * i] = a * cos[i] - b * sin[i];
        y[2 * i + 1] = a * sin[i] + b * cos[i];
    }
}

}  // namespace cavelight
