// Which experts a token goes to, and with what weight; see model/router.py.
//
// Letters: T tokens, E experts, K experts a token, G groups of experts.
#pragma once
#include <numeric>

#include "layer.h"

namespace cavelight {

// NaN is the largest of all, as torch has it: then it comes out at the end.
inline bool less(float a, float b) { return a < b || (b != b && a == a); }

// The largest of choice_E, marked taken by -inf; the lowest number wins a tie.
inline int64_t take_largest(float *choice, int64_t E) {
    int64_t best = std::max_element(choice, choice + E, less) - choice;
    choice[best] = -INFINITY;
    return best;
}

inline void choose(const Layer &l, const float *logits, float *scores, int64_t *ids, float *weights) {
    Floats choice(l.E), group(l.G), some;
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
            std::partial_sort(some.begin(), some.begin() + l.best_of_group, some.end(),
                              [](float a, float b) { return less(b, a); });
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
inline void sort_pairs(const Layer &l, const Step &s, Room &room) {
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

}  // namespace cavelight
