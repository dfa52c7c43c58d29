// One layer of a DeepSeek-V2/V3-style model for a few tokens of any sequences: latent attention over their caches in
// pages, then a dense feed-forward or a mixture of experts. Weights are read once, where they lie; sums are float32.
//
// Letters: T tokens, D hidden size, H heads, N width without position, R rotary width, U value width, C latent width,
// L = C + R, E experts, K experts a token, G groups of experts, F width of a feed-forward.
#include <atomic>
#include <numeric>

#include "attention.h"
#include "product.h"

using namespace cavelight;

namespace {

constexpr int64_t MOST_ROWS = 512;  // of a matrix that a thread takes at a time: long ones are read faster
constexpr int PHASES = 14;
constexpr int NEAR = 8;  // rows that are added up together

// Threads take numbered pieces of work as they get free, phase after phase.
struct Team {
    std::atomic<int64_t> next[PHASES] = {};
    template <class Act>
    void share(int phase, int64_t count, Act act) {
        for (int64_t i; (i = next[phase]++) < count;) act(i);
    }
};

// A matrix cut into equal parts, one for each thread or more.
struct Cut {
    int64_t rows, size, parts;
    Cut(const Matrix &m, int64_t threads) : rows(m.rows) {
        size = std::min(MOST_ROWS, (rows + threads - 1) / threads + 3) / 4 * 4;
        parts = size ? (rows + size - 1) / size : 0;
    }
    int64_t first(int64_t part) const { return part * size; }
    int64_t last(int64_t part) const { return std::min(rows, first(part) + size); }
};

void part_of(const Matrix &m, const Cut &cut, int64_t part, int64_t e, const float *x, int64_t T, float *y) {
    rows(m, e, cut.first(part), cut.last(part), x, T, y, m.rows);
}

// gain: one row, float32 or bfloat16.
void norm(const float *x, const Matrix &gain, float eps, int64_t width, float *y) {
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

void norms(const float *x, int64_t stride, const Matrix &gain, float eps, int64_t T, int64_t width,
           std::vector<float> &y) {
    y.resize(T * width);
    for (int64_t t = 0; t < T; t++) norm(x + t * stride, gain, eps, width, &y[t * width]);
}

// RoPE on adjacent pairs.
void rotate(const float *x, const float *cos, const float *sin, int64_t R, float *y) {
    for (int64_t i = 0; i < R / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        y[2 * i] = a * cos[i] - b * sin[i];
        y[2 * i + 1] = a * sin[i] + b * cos[i];
    }
}

}  // namespace

extern "C" {

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
}

namespace {

// What a step needs to remember between its phases. One for each thread that asks for steps.
struct Room {
    std::vector<float> low, latent, query, absorbed, lanes, mixed, values, x, routed, shared, hidden, shared_hidden, normed;
    std::vector<i16> last;
    std::vector<Piece> pieces;
    std::vector<int64_t> group_of_span, met, first_pair, pair, place;
    Sums sums;
};

// NaN is the largest of all, as torch has it: then it comes out at the end.
bool less(float a, float b) { return a < b || (b != b && a == a); }

// The largest of choice_E, marked taken by -inf; the lowest number wins a tie.
int64_t take_largest(float *choice, int64_t E) {
    int64_t best = std::max_element(choice, choice + E, less) - choice;
    choice[best] = -INFINITY;
    return best;
}

void choose(const Layer &l, const float *logits, float *scores, int64_t *ids, float *weights) {
    std::vector<float> choice(l.E), group(l.G), some;
    if (l.sigmoid) {
        for (int64_t e = 0; e < l.E; e++) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    } else {
        float most = *std::max_element(logits, logits + l.E), total = 0;
        for (int64_t e = 0; e < l.E; e++) total += scores[e] = std::exp(logits[e] - most);
        for (int64_t e = 0; e < l.E; e++) scores[e] /= total;
    }
    for (int64_t e = 0; e < l.E; e++) choice[e] = scores[e] + (l.bias ? l.bias[e] : 0.0f);
    if (l.best_of_group) {  // only the best groups are kept
        int64_t each = l.E / l.G;
        for (int64_t g = 0; g < l.G; g++) {
            some.assign(&choice[g * each], &choice[g * each] + each);
            std::partial_sort(some.begin(), some.begin() + l.best_of_group, some.end(), [](float a, float b) { return less(b, a); });
            group[g] = std::accumulate(some.begin(), some.begin() + l.best_of_group, 0.0f);
        }
        std::vector<bool> kept(l.G);
        for (int64_t i = 0; i < l.kept_groups; i++) kept[take_largest(group.data(), l.G)] = true;
        for (int64_t e = 0; e < l.E; e++)
            if (!kept[e / each]) choice[e] = -INFINITY;
    }
    float total = 0;
    for (int64_t k = 0; k < l.K; k++) {
        ids[k] = take_largest(choice.data(), l.E);
        total += weights[k] = scores[ids[k]];
    }
    for (int64_t k = 0; k < l.K; k++)
        weights[k] = (l.normalise ? weights[k] / (total + 1e-20f) : weights[k]) * l.routed_scale;
}

// Pairs of token and choice by expert: met experts, and where each one's pairs begin.
void sort_pairs(const Layer &l, const Step &s, Room &room) {
    std::vector<int64_t> count(l.E);
    for (int64_t p = 0; p < s.T * l.K; p++) count[s.ids[p]]++;
    room.place.resize(s.T * l.K);
    room.met.clear(), room.first_pair.assign(1, 0), room.pair.clear();
    for (int64_t e = 0; e < l.E; e++) {
        if (!count[e]) continue;
        room.met.push_back(e);
        room.first_pair.push_back(room.first_pair.back() + count[e]);
        for (int64_t p = 0; p < s.T * l.K; p++)
            if (s.ids[p] == e) room.place[p] = room.pair.size(), room.pair.push_back(p);
    }
}

// The queries of one head, taken down into the latent space and scaled: low[t][h][L]. They are worked on side by side,
// since as they lie they would meet in the same few places of a core's cache.
void absorb(const Layer &l, const Step &s, int64_t h, const float *queries, float *low, std::vector<float> &room) {
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
                w[i] = half ? numbers<true>(p, c) : numbers<false>(p, c);
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

// Sixteen queries side by side, from low[query][L]; those past the last are zero.
void side_by_side(const float *low, int64_t queries, int64_t L, float *lanes) {
    int64_t count = std::min<int64_t>(queries, LANES);
    for (int64_t i = 0; i < L; i++)
        for (int64_t lane = 0; lane < LANES; lane++) lanes[i * LANES + lane] = lane < count ? low[lane * L + i] : 0.0f;
}

// Cut every sequence's past into pieces, and say what each lane may see.
void cut(const Layer &l, const Step &s, Room &room) {
    int64_t groups = 0, out = 0;
    room.pieces.clear(), room.group_of_span.clear(), room.last.clear();
    for (int64_t n = 0; n < s.spans_count; n++) {
        const Span &span = s.spans[n];
        int64_t G = groups_of(span, l.H), end = span.start + span.count;
        room.group_of_span.push_back(groups);
        for (int64_t lane = 0; lane < G * LANES; lane++) {
            if (lane % LANES == 0) room.last.push_back(i16{});
            room.last.back()[lane % LANES] = int32_t(span.start + std::min(lane / l.H, span.count - 1));
        }
        for (int64_t first = 0; first < end; first = piece_end(first), out += G)
            room.pieces.push_back({n, first, std::min(end, piece_end(first)), out});
        groups += G;
    }
    room.lanes.resize(groups * (l.C + l.R) * LANES);
    room.sums.make_room(out, l.C);
}

// Put the pieces of one span's past together for one query: mixed[h][t][c].
void gather(const Layer &l, const Step &s, int64_t n, int64_t query, Room &room) {
    const Span &span = s.spans[n];
    auto first = std::find_if(room.pieces.begin(), room.pieces.end(), [n](const Piece &p) { return p.span == n; });
    auto last = std::find_if(first, room.pieces.end(), [n](const Piece &p) { return p.span != n; });
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
}

// y = x + shared experts + routed ones, in the order of each token's choices, for some of the columns.
void add_up(const Layer &l, const Step &s, int64_t first, int64_t last, const Room &room) {
    for (int64_t t = 0; t < s.T; t++) {
        float *y = s.y + t * l.D;
        for (int64_t d = first; d < last; d++) y[d] = 0;
        for (int64_t k = 0; k < l.K; k++) {
            const float weight = s.weights[t * l.K + k], *from = &room.routed[room.place[t * l.K + k] * l.D];
            for (int64_t d = first; d < last; d++) y[d] += weight * from[d];
        }
        if (l.shared)
            for (int64_t d = first; d < last; d++) y[d] += room.shared[t * l.D + d];
        for (int64_t d = first; d < last; d++) y[d] += room.x[t * l.D + d];
    }
}

// gate = silu(gate) * up, for some of the columns of [T, F].
void swiglu(float *gate, const float *up, int64_t T, int64_t F, int64_t first, int64_t last) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = t * F + first; i < t * F + last; i++) gate[i] = silu(gate[i]) * up[i];
}

}  // namespace

extern "C" {

// y [T, O] = x [T, I] W^T.
void cavelight_product(const Matrix *m, const float *x, int64_t T, float *y, int64_t threads) {
    Team team;
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> room;
        const float *mine = arranged(m->kind, x, T, m->columns, room);
        const Cut cut(*m, threads);
        team.share(0, cut.parts, [&](int64_t i) { part_of(*m, cut, i, 0, mine, T, y); });
    }
}

}

namespace {

void compute(const Layer &l, const Step &s, Room &room) {
    Team team;
    const int64_t T = s.T, D = l.D, L = l.C + l.R, Q = l.query_down.rows, heads = l.H * (l.N + l.R);
    room.low.resize(T * Q), room.latent.resize(T * L), room.query.resize(T * heads), room.absorbed.resize(T * l.H * L);
    room.mixed.resize(l.H * T * l.C), room.values.resize(T * l.H * l.U), room.x.resize(T * D);
    const int64_t F = l.gate.rows, S = l.shared_gate.rows;
    room.hidden.resize(2 * T * l.K * F), room.routed.resize(T * l.K * D);
    room.shared_hidden.resize(2 * T * S), room.shared.resize(T * D);
    room.normed.resize(T * l.E);
    float *logits = room.normed.data();
    cut(l, s, room);

#pragma omp parallel num_threads(s.threads)
    {
        static thread_local std::vector<float> normed, order, inner, look_room;

        // Down into the latents of queries and of keys and values.
        norms(s.x, D, l.attention_norm, l.eps, T, D, normed);
        const Matrix &first = l.low_rank_query ? l.query_down : l.query_up;
        const float *x = arranged(first.kind, normed.data(), T, D, order);
        const float *x_latent = first.kind == l.latent_down.kind ? x : arranged(l.latent_down.kind, normed.data(), T, D, inner);
        const Cut of_first(first, s.threads), of_latent(l.latent_down, s.threads);
        team.share(0, of_first.parts + of_latent.parts, [&](int64_t i) {
            if (i < of_first.parts)
                part_of(first, of_first, i, 0, x, T, l.low_rank_query ? room.low.data() : room.query.data());
            else
                part_of(l.latent_down, of_latent, i - of_first.parts, 0, x_latent, T, room.latent.data());
        });
#pragma omp barrier
        // Up to the heads' queries; the new rows go into the cache.
        if (l.low_rank_query) {
            norms(room.low.data(), Q, l.query_norm, l.latent_eps, T, Q, normed);
            x = arranged(l.query_up.kind, normed.data(), T, Q, order);
            const Cut cut(l.query_up, s.threads);
            team.share(1, cut.parts, [&](int64_t i) { part_of(l.query_up, cut, i, 0, x, T, room.query.data()); });
        }
        team.share(2, s.spans_count, [&](int64_t n) {
            std::vector<float> row(L);
            for (int64_t j = 0; j < s.spans[n].count; j++) {
                int64_t t = s.spans[n].first + j;
                norm(&room.latent[t * L], l.latent_norm, l.latent_eps, l.C, row.data());
                rotate(&room.latent[t * L + l.C], s.cos + t * l.R / 2, s.sin + t * l.R / 2, l.R, &row[l.C]);
                s.past.put(s.spans[n], s.spans[n].start + j, row.data());
            }
        });
#pragma omp barrier
        team.share(3, l.H, [&](int64_t h) { absorb(l, s, h, room.query.data(), room.absorbed.data(), inner); });
#pragma omp barrier
        team.share(12, room.last.size(), [&](int64_t g) {
            int64_t n = std::upper_bound(room.group_of_span.begin(), room.group_of_span.end(), g) - room.group_of_span.begin() - 1;
            int64_t first = s.spans[n].first * l.H + (g - room.group_of_span[n]) * LANES;
            int64_t left = (s.spans[n].first + s.spans[n].count) * l.H - first;
            side_by_side(&room.absorbed[first * L], left, L, &room.lanes[g * L * LANES]);
        });
#pragma omp barrier
        team.share(4, room.pieces.size(), [&](int64_t i) {
            const Piece &piece = room.pieces[i];
            int64_t group = room.group_of_span[piece.span];
            auto act = s.past.half ? look<true> : look<false>;
            act(s.past, s.spans[piece.span], piece, l.H, l.C, &room.lanes[group * L * LANES], &room.last[group],
                 room.sums, look_room);
        });
#pragma omp barrier
        team.share(5, T * l.H, [&](int64_t i) {
            int64_t t = i / l.H, n = 0;
            while (t >= s.spans[n].first + s.spans[n].count) n++;
            gather(l, s, n, i - s.spans[n].first * l.H, room);
        });
#pragma omp barrier
        team.share(6, l.H, [&](int64_t h) {
            const float *x = arranged(l.value_up.kind, &room.mixed[h * T * l.C], T, l.C, inner);
            rows(l.value_up, h, 0, l.U, x, T, &room.values[h * l.U], l.H * l.U);
        });
#pragma omp barrier
        x = arranged(l.output.kind, room.values.data(), T, l.H * l.U, order);
        const Cut of_output(l.output, s.threads);
        team.share(7, of_output.parts, [&](int64_t i) {
            part_of(l.output, of_output, i, 0, x, T, room.x.data());
            for (int64_t t = 0; t < T; t++)
                for (int64_t d = of_output.first(i); d < of_output.last(i); d++) room.x[t * D + d] += s.x[t * D + d];
        });
#pragma omp barrier
        // The feed-forward: routing first, beside the part that all tokens go through.
        norms(room.x.data(), D, l.ffn_norm, l.eps, T, D, normed);
        if (l.E) {
            x = arranged(l.router.kind, normed.data(), T, D, order);
            const Cut cut(l.router, s.threads);
            team.share(8, cut.parts, [&](int64_t i) { part_of(l.router, cut, i, 0, x, T, logits); });
#pragma omp barrier
#pragma omp single nowait
            {
                for (int64_t t = 0; t < T; t++)
                    choose(l, logits + t * l.E, s.scores + t * l.E, s.ids + t * l.K, s.weights + t * l.K);
                sort_pairs(l, s, room);
            }
        }
        if (l.shared) {
            x = arranged(l.shared_gate.kind, normed.data(), T, D, order);
            const Cut cut(l.shared_gate, s.threads);
            team.share(9, cut.parts, [&](int64_t i) {
                float *gate = room.shared_hidden.data(), *up = gate + T * S;
                part_of(l.shared_gate, cut, i, 0, x, T, gate), part_of(l.shared_up, cut, i, 0, x, T, up);
                swiglu(gate, up, T, S, cut.first(i), cut.last(i));
            });
        }
#pragma omp barrier
        const int64_t met = l.E ? room.met.size() : 0;
        if (l.E) {
            x = arranged(l.gate.kind, normed.data(), T, D, order);
            const Cut cut(l.gate, s.threads);
            team.share(10, met * cut.parts, [&](int64_t i) {
                int64_t at = i / cut.parts, part = i % cut.parts, first = room.first_pair[at];
                int64_t n = room.first_pair[at + 1] - first;
                float *gate = &room.hidden[first * F], *up = &room.hidden[(T * l.K + first) * F];
                inner.resize(n * stride(D));
                for (int64_t j = 0; j < n; j++)
                    std::copy_n(x + room.pair[first + j] / l.K * stride(D), D, &inner[j * stride(D)]);
                part_of(l.gate, cut, part, room.met[at], inner.data(), n, gate);
                part_of(l.up, cut, part, room.met[at], inner.data(), n, up);
                swiglu(gate, up, n, F, cut.first(part), cut.last(part));
            });
#pragma omp barrier
        }
        const Cut cut(l.shared ? l.shared_down : l.down, s.threads);
        const int64_t routed = met * cut.parts;
        const float *hidden = nullptr;
        int64_t arranged_at = -1;
        if (l.shared) x = arranged(l.shared_down.kind, room.shared_hidden.data(), T, S, order);
        team.share(11, routed + (l.shared ? cut.parts : 0), [&](int64_t i) {
            if (i >= routed) return part_of(l.shared_down, cut, i - routed, 0, x, T, room.shared.data());
            int64_t at = i / cut.parts, first = room.first_pair[at], n = room.first_pair[at + 1] - first;
            if (at != arranged_at) hidden = arranged(l.down.kind, &room.hidden[first * F], n, F, inner), arranged_at = at;
            part_of(l.down, cut, i % cut.parts, room.met[at], hidden, n, &room.routed[first * D]);
        });
#pragma omp barrier
        team.share(13, cut.parts, [&](int64_t i) { add_up(l, s, cut.first(i), cut.last(i), room); });
    }
}

}  // namespace

extern "C" {

// `count` layers in turn. stride: bytes from one layer's rows to the next one's.
void cavelight_layers(const Layer *const *layers, int64_t count, const Step *step, int64_t stride) {
    static thread_local Room room;
    Step s = *step;
    for (int64_t i = 0; i < count; i++) {
        const Layer &l = *layers[i];
        compute(l, s, room);
        s.x = s.y;
        s.past.rows += stride;
        if (l.E) s.ids += s.T * l.K, s.weights += s.T * l.K, s.scores += s.T * l.E;
    }
}

}
