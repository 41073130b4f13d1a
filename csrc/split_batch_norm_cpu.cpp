// The passes of split_batch_norm over a tile (specification in split_batch_norm.h), compiled once per
// instruction set. Where the channels of a row lie together a vector holds channels, else positions of one
// channel.
//
// What whole vectors leave of a row is done by one more that ends where the row ends: values that it meets a
// second time get the same result again, and sums over positions leave them out. Rows shorter than a vector
// are copied.
#include <type_traits>

#include "simd.h"
#include "split_batch_norm_isa.h"

#define MOCO_FAST_INLINE_LAMBDA __attribute__((always_inline))

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

template <class T>
MOCO_FAST_INLINE Vec read(const T* p, int64_t count) {
    if (count == kLanes) return load(p);
    Vec v{};
    for (int64_t i = 0; i < count; ++i) v[i] = to_float(p[i]);
    return v;
}

template <class T>
MOCO_FAST_INLINE void write(T* p, Vec v, int64_t count) {
    if (count == kLanes) return store(p, v);
    for (int64_t i = 0; i < count; ++i) from_float(v[i], p[i]);
}

template <int U, class T>
MOCO_FAST_INLINE void read(const T* p, int64_t count, Vec (&v)[U]) {
    for (int u = 0; u < U; ++u) v[u] = read(p + u * kLanes, count);
}

// Zero outside the lanes from `first` to before `end`.
MOCO_FAST_INLINE Vec keep(Vec v, int64_t first, int64_t end) {
    if (first == 0 && end == kLanes) return v;
    Int lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return Vec(Int(v) & (lane >= int32_t(first)) & (lane < int32_t(end)));
}

template <int U>
MOCO_FAST_INLINE double total(const Vec (&v)[U]) {
    Vec all = v[0];
    for (int u = 1; u < U; ++u) all += v[u];
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += all[i];
    return sum;
}

// visit(U vectors, where they start, values in each), over channels that lie together.
template <class Visit>
MOCO_FAST_INLINE void for_blocks(int64_t size, Visit visit) {
    int64_t at = 0;
    for (; at + 4 * kLanes <= size; at += 4 * kLanes) visit(std::integral_constant<int, 4>(), at, kLanes);
    for (; at + 2 * kLanes <= size; at += 2 * kLanes) visit(std::integral_constant<int, 2>(), at, kLanes);
    for (; at + kLanes <= size; at += kLanes) visit(std::integral_constant<int, 1>(), at, kLanes);
    if (at == size) return;
    if (size > kLanes)
        visit(std::integral_constant<int, 1>(), size - kLanes, kLanes);
    else
        visit(std::integral_constant<int, 1>(), int64_t(0), size);
}

constexpr int kChains = 4;  // sums side by side, which hide the latency of an addition

// visit(chain, where a vector starts, values in it, those of them that an earlier one held), over positions.
template <class Visit>
MOCO_FAST_INLINE void for_vectors(int64_t size, Visit visit) {
    int64_t at = 0;
    for (; at + kChains * kLanes <= size; at += kChains * kLanes) {
#pragma GCC unroll 4
        for (int u = 0; u < kChains; ++u) visit(u, at + u * kLanes, kLanes, int64_t(0));
    }
    for (; at + kLanes <= size; at += kLanes) visit(0, at, kLanes, int64_t(0));
    if (at == size) return;
    if (size > kLanes)
        visit(1, size - kLanes, kLanes, kLanes - (size - at));
    else
        visit(1, int64_t(0), size, int64_t(0));
}

// A value that is no outlier, unless two of the three are.
MOCO_FAST_INLINE Vec median(Vec a, Vec b, Vec c) {
    const Vec low = a < b ? a : b, high = max(a, b);
    const Vec rest = high < c ? high : c;
    return max(low, rest);
}

// The mean of n values and the squares about it, from the sums of what they are above a pivot and of its
// squares.
MOCO_FAST_INLINE void about_mean(float pivot, double sum, double squares, double n, double& mean,
                                 double& rest) {
    mean = pivot + sum / n;
    const double found = squares - sum * sum / n;
    rest = found < 0 ? 0 : found;  // a NaN stays
}

template <class T>
struct Channels {
    static void statistics(const NormTile& t, double* mean, double* squares) {
        const T* x = static_cast<const T*>(t.x);
        for_blocks(t.channels, [&](auto width, int64_t c, int64_t count) MOCO_FAST_INLINE_LAMBDA {
            constexpr int U = decltype(width)::value;
            Vec pivot[U], value[U], last[U], sum[U] = {}, square[U] = {};
            read(x + c, count, pivot);
            read(x + t.rows / 2 * t.row_stride + c, count, value);
            read(x + (t.rows - 1) * t.row_stride + c, count, last);
            for (int u = 0; u < U; ++u) pivot[u] = median(pivot[u], value[u], last[u]);
            for (int64_t r = 0; r < t.rows; ++r) {
                read(x + r * t.row_stride + c, count, value);
                for (int u = 0; u < U; ++u) {
                    const Vec d = value[u] - pivot[u];
                    sum[u] += d;
                    square[u] += d * d;
                }
            }
            for (int u = 0; u < U; ++u)
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t at = c + u * kLanes + i;
                    about_mean(pivot[u][i], sum[u][i], square[u][i], double(t.rows), mean[at], squares[at]);
                }
        });
    }

    static void normalise(const NormTile& t, const NormFactors& f) {
        const T* x = static_cast<const T*>(t.x);
        T* y = static_cast<T*>(t.out);
        for_blocks(t.channels, [&](auto width, int64_t c, int64_t count) MOCO_FAST_INLINE_LAMBDA {
            constexpr int U = decltype(width)::value;
            Vec mean[U], scale[U], offset[U], value[U];
            read(f.mean + c, count, mean);
            read(f.scale + c, count, scale);
            read(f.offset + c, count, offset);
            for (int64_t r = 0; r < t.rows; ++r) {
                const int64_t at = r * t.row_stride + c;
                read(x + at, count, value);
                for (int u = 0; u < U; ++u)
                    write(y + at + u * kLanes, (value[u] - mean[u]) * scale[u] + offset[u], count);
            }
        });
    }

    static void sums(const NormTile& t, const float* means, double* dy_sum, double* dot) {
        const T *x = static_cast<const T*>(t.x), *dy = static_cast<const T*>(t.dy);
        for_blocks(t.channels, [&](auto width, int64_t c, int64_t count) MOCO_FAST_INLINE_LAMBDA {
            constexpr int U = decltype(width)::value;
            Vec mean[U], value[U], grad[U], sum[U] = {}, product[U] = {};
            read(means + c, count, mean);
            for (int64_t r = 0; r < t.rows; ++r) {
                const int64_t at = r * t.row_stride + c;
                read(x + at, count, value);
                read(dy + at, count, grad);
                for (int u = 0; u < U; ++u) {
                    sum[u] += grad[u];
                    product[u] += grad[u] * (value[u] - mean[u]);
                }
            }
            for (int u = 0; u < U; ++u)
                for (int64_t i = 0; i < count; ++i) {
                    dy_sum[c + u * kLanes + i] = sum[u][i];
                    dot[c + u * kLanes + i] = product[u][i];
                }
        });
    }

    static void gradient(const NormTile& t, const NormFactors& f) {
        const T *x = static_cast<const T*>(t.x), *dy = static_cast<const T*>(t.dy);
        T* dx = static_cast<T*>(t.out);
        for_blocks(t.channels, [&](auto width, int64_t c, int64_t count) MOCO_FAST_INLINE_LAMBDA {
            constexpr int U = decltype(width)::value;
            Vec mean[U], scale[U], slope[U], offset[U], value[U], grad[U];
            read(f.mean + c, count, mean);
            read(f.scale + c, count, scale);
            read(f.slope + c, count, slope);
            read(f.offset + c, count, offset);
            for (int64_t r = 0; r < t.rows; ++r) {
                const int64_t at = r * t.row_stride + c;
                read(x + at, count, value);
                read(dy + at, count, grad);
                for (int u = 0; u < U; ++u)
                    write(dx + at + u * kLanes,
                          grad[u] * scale[u] + ((value[u] - mean[u]) * slope[u] + offset[u]), count);
            }
        });
    }
};

template <class T>
struct Positions {
    static void statistics(const NormTile& t, double* mean, double* squares) {
        for (int64_t c = 0; c < t.channels; ++c) {
            const T* x = static_cast<const T*>(t.x) + c * t.channel_stride;
            const int64_t last = (t.rows - 1) * t.row_stride + t.run - 1;
            const Vec pivot =
                median(splat(to_float(x[0])), splat(to_float(x[t.run / 2])), splat(to_float(x[last])));
            Vec sum[kChains] = {}, square[kChains] = {};
            for (int64_t r = 0; r < t.rows; ++r) {
                const T* row = x + r * t.row_stride;
                for_vectors(t.run,
                            [&](int u, int64_t i, int64_t count, int64_t seen) MOCO_FAST_INLINE_LAMBDA {
                                const Vec d = keep(read(row + i, count) - pivot, seen, count);
                                sum[u] += d;
                                square[u] += d * d;
                            });
            }
            about_mean(pivot[0], total(sum), total(square), double(t.rows * t.run), mean[c], squares[c]);
        }
    }

    static void normalise(const NormTile& t, const NormFactors& f) {
        for (int64_t r = 0; r < t.rows; ++r)
            for (int64_t c = 0; c < t.channels; ++c) {
                const int64_t at = r * t.row_stride + c * t.channel_stride;
                const T* x = static_cast<const T*>(t.x) + at;
                T* y = static_cast<T*>(t.out) + at;
                const Vec mean = splat(f.mean[c]), scale = splat(f.scale[c]), offset = splat(f.offset[c]);
                for_vectors(t.run, [&](int, int64_t i, int64_t count, int64_t) MOCO_FAST_INLINE_LAMBDA {
                    write(y + i, (read(x + i, count) - mean) * scale + offset, count);
                });
            }
    }

    static void sums(const NormTile& t, const float* means, double* dy_sum, double* dot) {
        for (int64_t c = 0; c < t.channels; ++c) {
            const Vec mean = splat(means[c]);
            Vec sum[kChains] = {}, product[kChains] = {};
            for (int64_t r = 0; r < t.rows; ++r) {
                const int64_t at = r * t.row_stride + c * t.channel_stride;
                const T *x = static_cast<const T*>(t.x) + at, *dy = static_cast<const T*>(t.dy) + at;
                for_vectors(t.run,
                            [&](int u, int64_t i, int64_t count, int64_t seen) MOCO_FAST_INLINE_LAMBDA {
                                const Vec grad = keep(read(dy + i, count), seen, count);
                                sum[u] += grad;
                                product[u] += keep(grad * (read(x + i, count) - mean), seen, count);
                            });
            }
            dy_sum[c] = total(sum);
            dot[c] = total(product);
        }
    }

    static void gradient(const NormTile& t, const NormFactors& f) {
        for (int64_t r = 0; r < t.rows; ++r)
            for (int64_t c = 0; c < t.channels; ++c) {
                const int64_t at = r * t.row_stride + c * t.channel_stride;
                const T *x = static_cast<const T*>(t.x) + at, *dy = static_cast<const T*>(t.dy) + at;
                T* dx = static_cast<T*>(t.out) + at;
                const Vec mean = splat(f.mean[c]), scale = splat(f.scale[c]);
                const Vec slope = splat(f.slope[c]), offset = splat(f.offset[c]);
                for_vectors(t.run, [&](int, int64_t i, int64_t count, int64_t) MOCO_FAST_INLINE_LAMBDA {
                    const Vec value = read(x + i, count), grad = read(dy + i, count);
                    write(dx + i, grad * scale + ((value - mean) * slope + offset), count);
                });
            }
    }
};

// run(Channels<T> or Positions<T>)
template <class Run>
void choose(const NormTile& t, Run run) {
    const bool together = t.channel_stride == 1;
    switch (t.dtype) {
        case DType::f32:
            return together ? run(Channels<float>()) : run(Positions<float>());
        case DType::bf16:
            return together ? run(Channels<bf16_t>()) : run(Positions<bf16_t>());
        default:
            return together ? run(Channels<f16_t>()) : run(Positions<f16_t>());
    }
}

void statistics(const NormTile& t, double* mean, double* squares) {
    choose(t, [&](auto layout) { layout.statistics(t, mean, squares); });
}

void normalise(const NormTile& t, const NormFactors& f) {
    choose(t, [&](auto layout) { layout.normalise(t, f); });
}

void sums(const NormTile& t, const float* mean, double* dy, double* dot) {
    choose(t, [&](auto layout) { layout.sums(t, mean, dy, dot); });
}

void gradient(const NormTile& t, const NormFactors& f) {
    choose(t, [&](auto layout) { layout.gradient(t, f); });
}

}  // namespace

const NormIsa kNorm = {statistics, normalise, sums, gradient};

}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
