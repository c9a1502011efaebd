// Attention of a few rows to blocks where they lie in the slab: none of them is copied.
//
// A group's keys are read first, then, when the weight of every block is known, its values; while
// one block is read the next is asked for, as the hardware cannot guess where it lies.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kvstore/native/share.h"
#include "vector.h"

namespace model {
namespace {

// Numbers attended to from which on several threads do it.
constexpr std::int64_t SHARED = 1 << 15;
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr std::int64_t LINE = 64;  // bytes

constexpr std::int64_t padded(std::int64_t n) { return (n + PAIR - 1) / PAIR * PAIR; }

// A plane of the block that is read next, asked for piece by piece.
class Ahead {
public:
    INLINE Ahead(const void* from, std::int64_t nbytes)
        : at_(static_cast<const char*>(from)), end_(at_ ? at_ + nbytes : nullptr) {}

    INLINE void ask(std::int64_t nbytes) {
        for (const char* stop = at_ + nbytes; at_ < stop && at_ < end_; at_ += LINE) {
            __builtin_prefetch(at_, 0, 3);
        }
    }

private:
    const char *at_, *end_;
};

// scores[i] = q . k[i] for N tokens; q is paired up and padded with zeros.
template <int N, class T>
INLINE void dots(const float* q, const T* k, std::int64_t dim, float* scores) {
    Floats sums[N] = {};
    const auto add = [&](std::int64_t d, const auto& load_k) {
        const Floats first = load(q + d), second = load(q + d + LANES);
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            const Pair x = load_k(k + i * dim + d);
            sums[i] += first * x.first;
            sums[i] += second * x.second;
        }
    };
    std::int64_t d = 0;
    for (; d + PAIR <= dim; d += PAIR) add(d, [](const T* at) { return load_pair(at); });
    if (d < dim) add(d, [&](const T* at) { return load_some(at, dim - d); });
    if constexpr (N == 4) {
        const Quad a = folded(sums[0]), b = folded(sums[1]);
        const Quad c = folded(sums[2]), d = folded(sums[3]);
        const Quad ab = shuffled<0, 4, 1, 5>(a, b) + shuffled<2, 6, 3, 7>(a, b);  // a, b, a, b
        const Quad cd = shuffled<0, 4, 1, 5>(c, d) + shuffled<2, 6, 3, 7>(c, d);
        const Quad all = shuffled<0, 1, 4, 5>(ab, cd) + shuffled<2, 3, 6, 7>(ab, cd);
        std::memcpy(scores, &all, sizeof(all));
    } else {
        for (int i = 0; i < N; i++) scores[i] = sum(sums[i]);
    }
}

// scores[j] = e^(q . k[j] - top), then zeros; returns top and the sum.
template <class T>
INLINE void scored(const float* q, const T* k, std::int64_t size, std::int64_t dim, Ahead& next,
                   float* scores, float& top, float& total) {
    constexpr int AT_ONCE = 4;
    std::int64_t j = 0;
    for (; j + AT_ONCE <= size; j += AT_ONCE) {
        next.ask(sizeof(T) * AT_ONCE * dim);
        dots<AT_ONCE>(q, k + j * dim, dim, scores + j);
    }
    for (; j < size; j++) dots<1>(q, k + j * dim, dim, scores + j);
    const std::int64_t end = padded(size);
    for (; j < end; j++) scores[j] = NONE;
    Floats most = load(scores);
    for (j = LANES; j < end; j += LANES) most = greater(most, load(scores + j));
    top = greatest(most);
    Floats sums = {};
    for (j = 0; j < end; j += LANES) {
        const Floats e = exp_of_negative(load(scores + j) - top);
        store(scores + j, e);
        sums += e;
    }
    total = sum(sums);
}

// out[0 : N pairs] += factor * sum_j shares[j] v[j]; load_v is load_pair or load_some.
template <int N, class T, class Load>
INLINE void add_columns(float factor, const float* shares, const T* v, std::int64_t size,
                        std::int64_t stride, Ahead& next, float* out, const Load& load_v) {
    Floats first[N] = {}, second[N] = {};
    for (std::int64_t j = 0; j < size; j++) {
        next.ask(stride * std::int64_t{sizeof(T)});
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            const Pair x = load_v(v + j * stride + i * PAIR);
            first[i] += shares[j] * x.first;
            second[i] += shares[j] * x.second;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
        float* to = out + i * PAIR;
        store(to, load(to) + factor * first[i]);
        store(to + LANES, load(to + LANES) + factor * second[i]);
    }
}

// out += factor * sum_j shares[j] v[j]; out is paired up and padded.
template <class T>
INLINE void add_values(float factor, const float* shares, const T* v, std::int64_t size,
                       std::int64_t dim, Ahead& next, float* out) {
    constexpr int AT_ONCE = 4;  // eight sums: each addition waits for the last to the same
    const auto whole = [](const T* at) { return load_pair(at); };
    std::int64_t d = 0;
    for (; d + AT_ONCE * PAIR <= dim; d += AT_ONCE * PAIR) {
        add_columns<AT_ONCE>(factor, shares, v + d, size, dim, next, out + d, whole);
    }
    for (; d + PAIR <= dim; d += PAIR) {
        add_columns<1>(factor, shares, v + d, size, dim, next, out + d, whole);
    }
    if (d < dim) {
        const auto some = [&](const T* at) { return load_some(at, dim - d); };
        add_columns<1>(factor, shares, v + d, size, dim, next, out + d, some);
    }
}

// What one call needs besides its arguments; rows are padded to whole vectors.
struct Scratch {
    explicit Scratch(const Attention& a)
        : size(padded(a.size)),
          dim(padded(a.dim)),
          out_dim(padded(a.out_dim)),
          q(dim),
          paired_q(dim),
          shares(a.blocks * a.rows * size),
          totals(a.blocks * a.rows),
          out(out_dim),
          ordered_out(out_dim) {}

    std::int64_t size, dim, out_dim;
    std::vector<float> q, paired_q;       // [D]
    std::vector<float> shares;            // [M, R, B]
    std::vector<float> totals;            // [M, R]
    std::vector<float> out, ordered_out;  // [Dv]
};

// The query that the m-th block sees: x, or x rotated (see layers.py).
INLINE void place(const Attention& a, std::int64_t m, const float* x, float* q) {
    if (!a.cos) {
        std::memcpy(q, x, sizeof(float) * a.dim);
        return;
    }
    const std::int64_t half = a.dim / 2;
    const float *cos = a.cos + m * a.dim, *sin = a.sin + m * a.dim;
    for (std::int64_t d = 0; d < half; d++) {
        q[d] = x[d] * cos[d] + x[d + half] * sin[d];
        q[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half];
    }
}

// One group's blocks; `at` is its number among all streams' groups.
template <class T>
INLINE void attend_group(const Attention& a, std::int64_t at, Scratch& s) {
    const std::int64_t* slots = a.slots + at * a.blocks;
    const auto block = [&](const void* slab, std::int64_t m, std::int64_t width) {
        while (m < a.blocks && slots[m] < 0) m++;
        if (m == a.blocks) return static_cast<const T*>(nullptr);
        return static_cast<const T*>(slab) + slots[m] * a.size * width;
    };
    const std::int64_t k_bytes = std::int64_t{sizeof(T)} * a.size * a.dim;
    const std::int64_t v_bytes = std::int64_t{sizeof(T)} * a.size * a.out_dim;
    float* weights = a.weights + at * a.blocks * a.rows;
    for (std::int64_t m = 0; m < a.blocks; m++) {
        if (slots[m] < 0) {
            for (std::int64_t r = 0; r < a.rows; r++) weights[m * a.rows + r] = NONE;
            continue;
        }
        const T* k = block(a.keys, m, a.dim);
        const T* after = block(a.keys, m + 1, a.dim);
        Ahead next = after ? Ahead(after, k_bytes) : Ahead(block(a.values, 0, a.out_dim), v_bytes);
        for (std::int64_t r = 0; r < a.rows; r++) {
            const std::int64_t pair = m * a.rows + r, which = at * a.blocks + m;
            const std::int64_t row = (a.each_placed ? which : at) * a.rows + r;
            place(a, m, a.q + row * a.dim, s.q.data());
            pair_up<T>(s.q.data(), s.paired_q.data(), s.dim);
            float top;
            scored(s.paired_q.data(), k, a.size, a.dim, next, &s.shares[pair * s.size], top,
                   s.totals[pair]);
            if (a.gate) {
                weights[pair] = a.gate[which * a.rows + r];
            } else if (a.landmarks) {
                dots<1>(s.q.data(), a.landmarks + which * a.dim, a.dim, weights + pair);
            } else {
                weights[pair] = top + std::log(s.totals[pair]);
            }
        }
    }
    for (std::int64_t r = 0; r < a.rows; r++) {
        const std::int64_t row = at * a.rows + r;
        float top = a.local_lse ? a.local_lse[row] : NONE;
        for (std::int64_t m = 0; m < a.blocks; m++) top = std::max(top, weights[m * a.rows + r]);
        if (top == NONE) top = 0;  // nothing at all: no number, as in PyTorch
        const float local = a.local_lse ? exp_of_negative(a.local_lse[row] - top) : 0;
        float total = local;
        for (std::int64_t m = 0; m < a.blocks; m++) {
            float& weight = weights[m * a.rows + r];
            weight = exp_of_negative(weight - top);
            total += weight;
        }
        a.lse[row] = top + std::log(total);
        std::fill(s.out.begin(), s.out.end(), 0.0f);
        for (std::int64_t m = 0; m < a.blocks; m++) {
            const std::int64_t pair = m * a.rows + r;
            weights[pair] /= total;
            if (slots[m] < 0) continue;
            Ahead next(r ? nullptr : block(a.values, m + 1, a.out_dim), v_bytes);
            add_values(weights[pair] / s.totals[pair], &s.shares[pair * s.size],
                       block(a.values, m, a.out_dim), a.size, a.out_dim, next, s.out.data());
        }
        put_in_order<T>(s.out.data(), s.ordered_out.data(), s.out_dim);
        float* out = a.out + row * a.out_dim;
        std::memcpy(out, s.ordered_out.data(), sizeof(float) * a.out_dim);
        if (a.local_out) {
            const float* from = a.local_out + row * a.out_dim;
            for (std::int64_t d = 0; d < a.out_dim; d++) out[d] += local / total * from[d];
        }
    }
}

template <class T>
INLINE void attend_some(const Attention& a, std::int64_t first, std::int64_t last) {
    Scratch scratch(a);
    for (std::int64_t at = first; at < last; at++) attend_group<T>(a, at, scratch);
}

}  // namespace

MODEL_VECTOR void attend_float32(const Attention& a, std::int64_t first, std::int64_t last) {
    attend_some<float>(a, first, last);
}
MODEL_VECTOR void attend_bfloat16(const Attention& a, std::int64_t first, std::int64_t last) {
    attend_some<BFloat16>(a, first, last);
}
MODEL_VECTOR void attend_float16(const Attention& a, std::int64_t first, std::int64_t last) {
    attend_some<Float16>(a, first, last);
}

void attend(const Attention& a, std::int64_t threads) {
    const std::int64_t groups = a.streams * a.groups;
    const std::int64_t numbers = groups * a.blocks * a.size * (a.dim + a.out_dim);
    const std::int64_t pieces =
        numbers < SHARED ? 1 : std::max<std::int64_t>(1, std::min(threads, groups));
    kvstore::share(pieces, threads, [&](std::int64_t i) {
        const std::int64_t first = groups * i / pieces, last = groups * (i + 1) / pieces;
        switch (a.element) {
            case Element::float32: return attend_float32(a, first, last);
            case Element::bfloat16: return attend_bfloat16(a, first, last);
            case Element::float16: return attend_float16(a, first, last);
        }
    });
}

}  // namespace model
