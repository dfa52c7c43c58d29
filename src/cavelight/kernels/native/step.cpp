// Layers of a DeepSeek-V2/V3-style model for a few tokens of any sequences: latent attention over their caches in
// pages, then a dense feed-forward or a mixture of experts. Weights are read once, where they lie; sums are float32.
//
// Letters: T tokens, D hidden size, H heads, N width without position, R rotary width, U value width, C latent width,
// L = C + R, E experts, K experts a token, F width of an expert, S width of the shared ones or of a dense feed-forward.
#include "latent.h"
#include "layer.h"
#include "routing.h"

using namespace cavelight;

namespace {

// Down into the latents of queries and of keys and values; without the first, all heads' queries at once.
void down(Hand &hand) {
    const Layer &l = hand.l;
    const Step &s = hand.s;
    norms(s.x, l.D, l.attention_norm, l.eps, s.T, l.D, hand.normed);
    const Matrix &first = l.low_rank_query ? l.query_down : l.query_up;
    const float *x = arranged(first.kind, hand.normed.data(), s.T, l.D, hand.order), *x_latent = x;
    if (first.kind != l.latent_down.kind)
        x_latent = arranged(l.latent_down.kind, hand.normed.data(), s.T, l.D, hand.inner);
    const Parts of_first(first, s.threads), of_latent(l.latent_down, s.threads);
    float *query = l.low_rank_query ? hand.room.low.data() : hand.room.query.data();
    hand.share(of_first.count + of_latent.count, [&](int64_t i) {
        if (i < of_first.count)
            part_of(first, of_first, i, 0, x, s.T, query);
        else
            part_of(l.latent_down, of_latent, i - of_first.count, 0, x_latent, s.T, hand.room.latent.data());
    });
    hand.wait();
}

// Up to the heads' queries; the new rows go into the cache.
void up(Hand &hand) {
    const Layer &l = hand.l;
    const Step &s = hand.s;
    Room &room = hand.room;
    if (l.low_rank_query) {
        const int64_t Q = l.query_down.rows;
        norms(room.low.data(), Q, l.query_norm, l.latent_eps, s.T, Q, hand.normed);
        const float *x = arranged(l.query_up.kind, hand.normed.data(), s.T, Q, hand.order);
        const Parts parts(l.query_up, s.threads);
        hand.share(parts.count, [&](int64_t i) { part_of(l.query_up, parts, i, 0, x, s.T, room.query.data()); });
    }
    hand.share(s.spans_count, [&](int64_t n) {
        const int64_t L = l.C + l.R;
        Floats row(L);
        for (int64_t j = 0; j < s.spans[n].count; j++) {
            int64_t t = s.spans[n].first + j;
            norm(&room.latent[t * L], l.latent_norm, l.latent_eps, l.C, row.data());
            rotate(&room.latent[t * L + l.C], s.cos + t * l.R / 2, s.sin + t * l.R / 2, l.R, &row[l.C]);
            s.past.put(s.spans[n], s.spans[n].start + j, row.data());
        }
    });
    hand.wait();
}

// Attention in the latent space: mixed[h][t][C].
void look_back(Hand &hand) {
    const Layer &l = hand.l;
    const Step &s = hand.s;
    Room &room = hand.room;
    const int64_t L = l.C + l.R;
    hand.share(l.H, [&](int64_t h) { absorb(l, s, h, room.query.data(), room.absorbed.data(), hand.inner); });
    hand.wait();
    hand.share(room.last.size(), [&](int64_t g) {
        auto after = std::upper_bound(room.group_of_span.begin(), room.group_of_span.end(), g);
        int64_t n = after - room.group_of_span.begin() - 1;
        int64_t first = s.spans[n].first * l.H + (g - room.group_of_span[n]) * LANES;
        int64_t left = (s.spans[n].first + s.spans[n].count) * l.H - first;
        side_by_side(&room.absorbed[first * L], left, L, s.past.kind, &room.lanes[g * L * LANES]);
    });
    hand.wait();
    hand.share(room.pieces.size(), [&](int64_t i) {
        const Piece &piece = room.pieces[room.pieces.size() - 1 - i];  // long ones first
        int64_t group = room.group_of_span[piece.span];
        auto act = s.past.kind == INT8 ? look<INT8> : s.past.kind == BFLOAT16 ? look<BFLOAT16> : look<FLOAT32>;
        act(s.past, s.spans[piece.span], piece, l.H, &room.lanes[group * L * LANES], &room.last[group], room.sums,
            hand.inner);
    });
    hand.wait();
    hand.share(s.T * l.H, [&](int64_t i) {
        int64_t t = i / l.H, n = 0;
        while (t >= s.spans[n].first + s.spans[n].count) n++;
        gather(l, s, n, i - s.spans[n].first * l.H, room);
    });
    hand.wait();
}

// Values of all heads, and out of attention: x plus what it made of x.
void out(Hand &hand) {
    const Layer &l = hand.l;
    const Step &s = hand.s;
    Room &room = hand.room;
    hand.share(l.H, [&](int64_t h) {
        const float *x = arranged(l.value_up.kind, &room.mixed[h * s.T * l.C], s.T, l.C, hand.inner);
        rows(l.value_up, h, 0, l.U, x, s.T, &room.values[h * l.U], l.H * l.U);
    });
    hand.wait();
    const float *x = arranged(l.output.kind, room.values.data(), s.T, l.H * l.U, hand.order);
    const Parts parts(l.output, s.threads);
    hand.share(parts.count, [&](int64_t i) {
        part_of(l.output, parts, i, 0, x, s.T, room.x.data());
        for (int64_t t = 0; t < s.T; t++)
            for (int64_t d = parts.first(i); d < parts.last(i); d++) room.x[t * l.D + d] += s.x[t * l.D + d];
    });
    hand.wait();
}

// gate = silu(gate) * up, for some of the columns of [T, F].
void swiglu(float *gate, const float *up, int64_t T, int64_t F, int64_t first, int64_t last) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = t * F + first; i < t * F + last; i++) gate[i] = silu(gate[i]) * up[i];
}

// Who goes to which expert; meanwhile the first half of the part that all tokens go through.
void route(Hand &hand) {
    const Layer &l = hand.l;
    const Step &s = hand.s;
    Room &room = hand.room;
    norms(room.x.data(), l.D, l.ffn_norm, l.eps, s.T, l.D, hand.normed);
    if (l.E) {
        const float *x = arranged(l.router.kind, hand.normed.data(), s.T, l.D, hand.order);
        const Parts parts(l.router, s.threads);
        hand.share(parts.count, [&](int64_t i) { part_of(l.router, parts, i, 0, x, s.T, room.logits.data()); });
        hand.wait();
#pragma omp single nowait
        {
            for (int64_t t = 0; t < s.T; t++)
                choose(l, &room.logits[t * l.E], s.scores + t * l.E, s.ids + t * l.K, s.weights + t * l.K);
            sort_pairs(l, s, room);
        }
    }
    if (l.shared) {
        const int64_t S = l.shared_gate.rows;
        const float *x = arranged(l.shared_gate.kind, hand.normed.data(), s.T, l.D, hand.order);
        const Parts parts(l.shared_gate, s.threads);
        hand.share(parts.count, [&](int64_t i) {
            float *gate = room.shared_hidden.data(), *up = gate + s.T * S;
            part_of(l.shared_gate, parts, i, 0, x, s.T, gate), part_of(l.shared_up, parts, i, 0, x, s.T, up);
            swiglu(gate, up, s.T, S, parts.first(i), parts.last(i));
        });
    }
    hand.wait();
}

// The first half of the chosen experts, each with the tokens that go to it.
void into_experts(Hand &hand) {
    const Layer &l = hand.l;
    const Step &s = hand.s;
    Room &room = hand.room;
    const int64_t F = l.gate.rows, D = l.D;
    const float *x = arranged(l.gate.kind, hand.normed.data(), s.T, D, hand.order);
    const Parts parts(l.gate, s.threads);
    const Chosen chosen{room.met, parts};
    hand.share(chosen.count(), [&](int64_t i) {
        int64_t at = i / parts.count, part = i % parts.count, first = room.first_pair[at];
        int64_t n = room.first_pair[at + 1] - first;
        float *gate = &room.hidden[first * F], *up = &room.hidden[(s.T * l.K + first) * F];
        hand.inner.resize(n * stride(D));
        for (int64_t j = 0; j < n; j++)
            std::copy_n(x + room.pair[first + j] / l.K * stride(D), D, &hand.inner[j * stride(D)]);
        part_of(l.gate, parts, part, room.met[at], hand.inner.data(), n, gate, chosen.start(l.up, i));
        part_of(l.up, parts, part, room.met[at], hand.inner.data(), n, up, chosen.start(l.gate, i + s.threads));
        swiglu(gate, up, n, F, parts.first(part), parts.last(part));
    });
    hand.wait();
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

// The second half of all experts, and everything added up.
void out_of_experts(Hand &hand) {
    const Layer &l = hand.l;
    const Step &s = hand.s;
    Room &room = hand.room;
    const int64_t F = l.gate.rows, S = l.shared_gate.rows;
    const Parts parts(l.shared ? l.shared_down : l.down, s.threads);
    const Chosen chosen{room.met, parts};
    const int64_t routed = l.E ? chosen.count() : 0;
    const float *x = l.shared ? arranged(l.shared_down.kind, room.shared_hidden.data(), s.T, S, hand.order) : nullptr;
    const float *hidden = nullptr;
    int64_t arranged_at = -1;
    hand.share(routed + (l.shared ? parts.count : 0), [&](int64_t i) {
        if (i >= routed) return part_of(l.shared_down, parts, i - routed, 0, x, s.T, room.shared.data());
        int64_t at = i / parts.count, first = room.first_pair[at], n = room.first_pair[at + 1] - first;
        if (at != arranged_at) hidden = arranged(l.down.kind, &room.hidden[first * F], n, F, hand.inner);
        arranged_at = at;
        float *y = &room.routed[first * l.D];
        part_of(l.down, parts, i % parts.count, room.met[at], hidden, n, y, chosen.start(l.down, i + s.threads));
    });
    hand.wait();
    hand.share(parts.count, [&](int64_t i) { add_up(l, s, parts.first(i), parts.last(i), room); });
}

void make_room(const Layer &l, const Step &s, Room &room) {
    const int64_t T = s.T, L = l.C + l.R;
    room.low.resize(T * l.query_down.rows), room.latent.resize(T * L), room.query.resize(T * l.H * (l.N + l.R));
    room.absorbed.resize(T * l.H * L), room.mixed.resize(l.H * T * l.C), room.values.resize(T * l.H * l.U);
    room.x.resize(T * l.D), room.logits.resize(T * l.E);
    room.hidden.resize(2 * T * l.K * l.gate.rows), room.routed.resize(T * l.K * l.D);
    room.shared_hidden.resize(2 * T * l.shared_gate.rows), room.shared.resize(T * l.D);
}

void compute(const Layer &l, const Step &s, Room &room) {
    Team team = {};
    make_room(l, s, room);
    lay_out(l, s, room);
#pragma omp parallel num_threads(s.threads)
    {
        static thread_local Floats normed, order, inner;
        Hand hand{l, s, room, team, normed, order, inner};
        down(hand);
        up(hand);
        look_back(hand);
        out(hand);
        route(hand);
        if (l.E) into_experts(hand);
        out_of_experts(hand);
    }
}

}  // namespace

extern "C" {

// y [T, O] = x [T, I] W^T.
void cavelight_product(const Matrix *m, const float *x, int64_t T, float *y, int64_t threads) {
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
        static thread_local Floats room;
        const float *mine = arranged(m->kind, x, T, m->columns, room);
        const Parts parts(*m, threads);
        for (int64_t i; (i = next++) < parts.count;) part_of(*m, parts, i, 0, mine, T, y);
    }
}

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
