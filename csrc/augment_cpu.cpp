// One view of an image (specification in augment.h), compiled once per instruction set.
//
// Three passes over the rows of the view, which lies in scratch, in fp32, between them:
//   1  resample; the colour adjustments before the contrast, which needs the mean of all rows
//   2  the contrast and the adjustments after it; blur along the row
//   3  blur along columns; solarise, normalise, write
// Rows are filled up to whole vectors with zeros, which the adjustments before the contrast leave zero: sums
// over rows may take them in.
#include <cmath>
#include <cstring>
#include <utility>

#include "augment_isa.h"
#include "simd.h"

namespace moco_fast {
namespace MOCO_FAST_ISA {
namespace {

constexpr float kLuma[3] = {0.2989f, 0.587f, 0.114f};
constexpr float kLeastTap = 1e-9f;  // of a blur whose largest tap is 1; smaller ones are left out

MOCO_FAST_INLINE int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }
MOCO_FAST_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
MOCO_FAST_INLINE Vec clamped(Vec x) { return min(max(x, Vec{}), splat(1.0f)); }

// One axis of the view in the image: output pixel i is the mean of the source pixels under a triangle about
// its place, cut at the edges of the image.
struct Axis {
    double start, step;  // in source pixels; steps are negative where mirrored
    double half;         // of the base of the triangle
    int64_t length, taps;

    Axis(double fraction, double extent, int64_t pixels, int64_t size)
        : start(fraction * double(pixels)), step(extent * double(pixels) / double(size)), length(pixels) {
        half = std::fabs(step) > 1 ? std::fabs(step) : 1.0;
        taps = 2 * half < double(length) ? int64_t(std::ceil(2 * half)) : length;
    }

    // The first of `taps` source pixels for output pixel i, and their weights, which add up to `sum`.
    int64_t weigh(int64_t i, double sum, float* weights, int64_t stride) const {
        const double centre = start + (double(i) + 0.5) * step;
        const double before = std::floor(centre - half - 0.5) + 1;
        const int64_t last = length - taps;
        const int64_t first = before > 0 ? (before < double(last) ? int64_t(before) : last) : 0;
        double total = 0;
        for (int64_t t = 0; t < taps; ++t) total += weight(centre, first + t);
        for (int64_t t = 0; t < taps; ++t)
            weights[t * stride] = float(sum * weight(centre, first + t) / total);
        return first;
    }

  private:
    double weight(double centre, int64_t pixel) const {
        const double left = 1 - std::fabs(double(pixel) + 0.5 - centre) / half;
        return left > 0 ? left : 0;
    }
};

// Where things lie in the scratch of a view.
struct Scratch {
    int64_t row, plane;      // floats of a row, and of the S rows of a channel
    float *planes, *rows;    // (C, S, row), (C, row)
    float* taps;             // (row) of the blur
    float* edged;            // a row between its reflections
    float *lines, *columns;  // (kLanes, W) rows of the view before they are resampled along columns, and
                             // transposed
    float *weights, *row_weights;  // (taps, row) along rows, (kLanes, taps) along columns
    int32_t* first;                // (row) first source column of every column of the view

    int64_t floats = 0;  // that it takes in all

    // Without memory it only counts.
    Scratch(const Augment& a, float* memory) : row(padded(a.size)), plane(a.size * row) {
        const auto take = [this, memory](int64_t count) {
            float* const taken = memory ? memory + floats : nullptr;
            floats += padded(count);
            return taken;
        };
        planes = take(a.channels * plane);
        rows = take(a.channels * row);
        taps = take(row);
        edged = take(3 * row);
        first = reinterpret_cast<int32_t*>(take(row));
        lines = take(kLanes * padded(a.width));
        columns = take(kLanes * padded(a.width));
        row_weights = take(kLanes * a.height);
        weights = take(a.width * row);  // last: of so many taps few are used
    }
};

int64_t scratch(const Augment& a) { return Scratch(a, nullptr).floats; }

// line[x] = sum_t weights[t] row_t[x], in columns [begin, end).
void add_rows(const uint8_t* source, int64_t stride, const float* weights, int64_t taps, int64_t begin,
              int64_t end, float* __restrict line) {
    for (int64_t x = begin; x < end; ++x) line[x] = weights[0] * float(source[x]);
    for (int64_t t = 1; t < taps; ++t) {
        const uint8_t* const row = source + t * stride;
        const float weight = weights[t];
        if (weight == 0) continue;
        for (int64_t x = begin; x < end; ++x) line[x] += weight * float(row[x]);
    }
}

// Of a and b, blocks of Block lanes in turn: the even blocks of both, and the odd ones.
template <int Block, int... Lane>
MOCO_FAST_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
    const Vec even = __builtin_shufflevector(a, b, (Lane & Block ? kLanes + Lane - Block : Lane)...);
    b = __builtin_shufflevector(a, b, (Lane & Block ? kLanes + Lane : Lane + Block)...);
#else
    const Vec even = __builtin_shuffle(a, b, Int{(Lane & Block ? kLanes + Lane - Block : Lane)...});
    b = __builtin_shuffle(a, b, Int{(Lane & Block ? kLanes + Lane : Lane + Block)...});
#endif
    a = even;
}

// Rows become columns.
template <int Block = 1>
MOCO_FAST_INLINE void transpose(Vec (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i)
        if (!(i & Block))
            exchange<Block>(rows[i], rows[i + Block], std::make_integer_sequence<int, kLanes>());
    if constexpr (2 * Block < kLanes) transpose<2 * Block>(rows);
}

// (kLanes, stride) -> (count, kLanes), a whole number of vectors.
void to_columns(const float* rows, int64_t stride, int64_t count, float* columns) {
    for (int64_t x = 0; x < count; x += kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load(rows + i * stride + x);
        transpose(block);
        for (int i = 0; i < kLanes; ++i) store(columns + (x + i) * kLanes, block[i]);
    }
}

// out[i][x] = sum_t weights[t][x] columns[first[x] + t][i], of `rows` rows i.
void resample_columns(const float* columns, const int32_t* first, const float* weights, int64_t taps,
                      int64_t size, int64_t rows, float* out) {
    for (int64_t x = 0; x < size; x += kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            const float* const from = columns + first[x + i] * kLanes;
            Vec sum{};
            for (int64_t t = 0; t < taps; ++t) sum += load(from + t * kLanes) * weights[t * size + x + i];
            block[i] = sum;
        }
        transpose(block);
        for (int64_t i = 0; i < rows; ++i) store(out + i * size + x, block[i]);
    }
}

MOCO_FAST_INLINE Vec luma(const Vec (&c)[3]) { return c[0] * kLuma[0] + c[1] * kLuma[1] + c[2] * kLuma[2]; }

// Turns the hue of HSV, value and saturation stay. A channel is max - (max - min) clamp(min(k, 4 - k), 0, 1)
// with k = (n + h) mod 6, h the hue in sixths of a turn and n = 5, 3, 1 for red, green, blue.
MOCO_FAST_INLINE void shift_hue(Vec (&c)[3], float shift) {
    const Vec red = c[0], green = c[1], blue = c[2];
    const Vec high = max(max(red, green), blue), chroma = high - min(min(red, green), blue);
    const Vec inverse = 1.0f / (chroma == 0.0f ? splat(1.0f) : chroma);
    Vec hue = high == green ? 2.0f + (blue - red) * inverse : 4.0f + (red - green) * inverse;
    hue = (high == red ? (green - blue) * inverse : hue) + 6 * (shift - std::floor(shift));
    for (int i = 0; i < 3; ++i) {
        Vec k = hue + float(5 - 2 * i);  // in [0, 16]
        k -= 6.0f * __builtin_convertvector(__builtin_convertvector(k * (1.0f / 6), Int), Vec);
        c[i] = high - chroma * clamped(min(k, 4.0f - k));
    }
}

// What leaves every pixel as it is.
MOCO_FAST_INLINE bool idle(int adjustment, float amount) {
    return amount == (adjustment == kHue ? 0.0f : 1.0f);
}

// A row of the view: C times `size` values, filled up to whole vectors.
struct Row {
    float* data;
    int64_t size, stride;  // from one channel to the next
};

MOCO_FAST_INLINE Vec read(Row row, int channel, int64_t x) {
    return load(row.data + channel * row.stride + x);
}
MOCO_FAST_INLINE void write(Row row, int channel, int64_t x, Vec v) {
    store(row.data + channel * row.stride + x, v);
}

// `mean` is that of the luma of the whole view.
template <int C>
void adjust(int adjustment, float amount, float mean, Row row) {
    if (idle(adjustment, amount) || (C == 1 && adjustment >= kSaturation)) return;
    for (int64_t x = 0; x < row.size; x += kLanes) {
        Vec c[3];
        for (int i = 0; i < C; ++i) c[i] = read(row, i, x);
        if (C == 3 && adjustment == kHue) {
            shift_hue(c, amount);
        } else {
            Vec reference{};
            if (adjustment == kContrast) reference = splat(mean);
            if (C == 3 && adjustment >= kSaturation) reference = luma(c);
            for (int i = 0; i < C; ++i) c[i] = clamped(c[i] * amount + reference * (1 - amount));
        }
        for (int i = 0; i < C; ++i) write(row, i, x, c[i]);
    }
}

template <int C>
double sum_of_luma(Row row) {
    Vec sum{};
    for (int64_t x = 0; x < row.size; x += kLanes) {
        Vec c[3];
        for (int i = 0; i < C; ++i) c[i] = read(row, i, x);
        sum += C == 3 ? luma(c) : c[0];
    }
    double total = 0;
    for (int i = 0; i < kLanes; ++i) total += double(sum[i]);
    return total;
}

// A Gaussian, taps[d] for pixels d away; how far the farthest is.
int64_t gaussian(double sigma, int64_t size, float* taps) {
    const int64_t widest = int64_t(std::nearbyint(0.05 * double(size)));
    int64_t radius = widest > 1 ? widest : 1;
    radius = radius < size ? radius : size - 1;
    if (!(sigma > 0)) radius = 0;
    double total = 0;
    for (int64_t d = 0; d <= radius; ++d) {
        const double x = d > 0 ? double(d) / sigma : 0;
        taps[d] = float(std::exp(-0.5 * x * x));
        total += (d > 0 ? 2 : 1) * std::exp(-0.5 * x * x);
    }
    while (radius > 0 && taps[radius] < kLeastTap) --radius;
    for (int64_t d = 0; d <= radius; ++d) taps[d] = float(double(taps[d]) / total);
    return radius;
}

MOCO_FAST_INLINE int64_t reflected(int64_t i, int64_t size) {
    i = i < 0 ? -i : i;
    return i < size ? i : 2 * (size - 1) - i;
}

void blur_row(float* row, int64_t stride, int64_t size, const float* taps, int64_t radius, float* edged) {
    float* const middle = edged + radius;
    std::memcpy(middle, row, std::size_t(size) * sizeof(float));
    for (int64_t d = 1; d <= radius; ++d) {
        middle[-d] = row[reflected(-d, size)];
        middle[size - 1 + d] = row[reflected(size - 1 + d, size)];
    }
    for (int64_t x = 0; x < stride; x += kLanes) {
        Vec sum = load(middle + x) * taps[0];
        for (int64_t d = 1; d <= radius; ++d) sum += (load(middle + x - d) + load(middle + x + d)) * taps[d];
        store(row + x, sum);
    }
}

void blur_column(const float* plane, int64_t stride, int64_t size, int64_t y, const float* taps,
                 int64_t radius, float* out) {
    const float* const middle = plane + y * stride;
    for (int64_t x = 0; x < stride; x += kLanes) store(out + x, load(middle + x) * taps[0]);
    for (int64_t d = 1; d <= radius; ++d) {
        const float* const above = plane + reflected(y - d, size) * stride;
        const float* const below = plane + reflected(y + d, size) * stride;
        for (int64_t x = 0; x < stride; x += kLanes)
            store(out + x, load(out + x) + (load(above + x) + load(below + x)) * taps[d]);
    }
}

// Solarise and normalise a row, and write it as row y of the view.
template <int C, class T>
void finish(const Augment& a, float threshold, Row row, int64_t y, T* view) {
    for (int i = 0; i < C; ++i) {
        const float mean = a.mean[i], scale = float(1 / double(a.std[i]));
        for (int64_t x = 0; x < row.size; x += kLanes) {
            const Vec v = read(row, i, x);
            write(row, i, x, ((v >= threshold ? 1.0f - v : v) - mean) * scale);
        }
    }
    if (a.channels_last) {
        T* const out = view + y * a.size * C;
        for (int64_t x = 0; x < a.size; ++x)
            for (int i = 0; i < C; ++i) from_float(row.data[i * row.stride + x], out[x * C + i]);
        return;
    }
    for (int i = 0; i < C; ++i) {
        T* const out = view + (i * a.size + y) * a.size;
        int64_t x = 0;
        for (; x + kLanes <= a.size; x += kLanes) store(out + x, read(row, i, x));
        for (; x < a.size; ++x) from_float(row.data[i * row.stride + x], out[x]);
    }
}

template <int C>
void resample(const Augment& a, int64_t index, const ViewParameters& p, const Scratch& s) {
    const Axis along_row(p.left, p.width, a.width, a.size), along_column(p.top, p.height, a.height, a.size);
    std::memset(s.weights, 0, std::size_t(along_row.taps * s.row) * sizeof(float));
    int64_t begin = a.width, end = 0;  // of the columns of the image that the view sees
    for (int64_t x = 0; x < a.size; ++x) {
        const int64_t first = along_row.weigh(x, 1.0 / 255, s.weights + x, s.row);
        s.first[x] = int32_t(first);
        begin = first < begin ? first : begin;
        end = first + along_row.taps > end ? first + along_row.taps : end;
    }
    for (int64_t x = a.size; x < s.row; ++x) s.first[x] = int32_t(begin);
    const int64_t stride = padded(a.width), from = begin / kLanes * kLanes;
    for (int64_t y = 0; y < a.size; y += kLanes) {
        const int64_t rows = a.size - y < kLanes ? a.size - y : kLanes;
        int64_t top[kLanes];
        for (int64_t i = 0; i < rows; ++i)
            top[i] = along_column.weigh(y + i, 1.0, s.row_weights + i * along_column.taps, 1);
        for (int c = 0; c < C; ++c) {
            const uint8_t* const channel = a.images + index * a.image_stride + c * a.channel_stride;
            for (int64_t i = 0; i < rows; ++i)
                add_rows(channel + top[i] * a.row_stride, a.row_stride, s.row_weights + i * along_column.taps,
                         along_column.taps, begin, end, s.lines + i * stride);
            to_columns(s.lines + from, stride, padded(end - from), s.columns + from * kLanes);
            resample_columns(s.columns, s.first, s.weights, along_row.taps, s.row, rows,
                             s.planes + c * s.plane + y * s.row);
        }
    }
}

template <int C, class T>
void view(const Augment& a, int64_t index, float* memory) {
    ViewParameters p;
    static_assert(sizeof p == 16 * sizeof(float), "a row of the parameters");
    std::memcpy(&p, a.parameters + index * 16, sizeof p);
    const Scratch s(a, memory);
    const auto row = [&s](int64_t y) { return Row{s.planes + y * s.row, s.row, s.plane}; };
    const auto adjust_by = [&p](int i, float mean, Row of) {
        adjust<C>(int(p.order[i]), p.amounts[int(p.order[i])], mean, of);
    };
    int contrast = kAdjustments;  // where in the order, if anywhere
    for (int i = 0; i < kAdjustments; ++i)
        if (int(p.order[i]) == kContrast && !idle(kContrast, p.amounts[kContrast])) contrast = i;

    resample<C>(a, index, p, s);
    double sum = 0;
    for (int64_t y = 0; y < a.size; ++y) {
        for (int i = 0; i < contrast; ++i) adjust_by(i, 0, row(y));
        if (contrast < kAdjustments) sum += sum_of_luma<C>(row(y));
    }
    const auto mean = float(sum / double(a.size * a.size));
    const int64_t radius = gaussian(p.sigma, a.size, s.taps);
    for (int64_t y = 0; y < a.size; ++y) {
        for (int i = contrast; i < kAdjustments; ++i) adjust_by(i, mean, row(y));
        for (int i = 0; radius > 0 && i < C; ++i)
            blur_row(s.planes + i * s.plane + y * s.row, s.row, a.size, s.taps, radius, s.edged);
    }
    T* const out = static_cast<T*>(a.out) + index * C * a.size * a.size;
    for (int64_t y = 0; y < a.size; ++y) {
        for (int i = 0; radius > 0 && i < C; ++i)
            blur_column(s.planes + i * s.plane, s.row, a.size, y, s.taps, radius, s.rows + i * s.row);
        finish<C>(a, p.threshold, radius > 0 ? Row{s.rows, s.row, s.row} : row(y), y, out);
    }
}

template <int C>
void view_of(const Augment& a, int64_t index, float* memory) {
    if (a.dtype == DType::f32) return view<C, float>(a, index, memory);
    if (a.dtype == DType::bf16) return view<C, bf16_t>(a, index, memory);
    return view<C, f16_t>(a, index, memory);
}

void any_view(const Augment& a, int64_t index, float* memory) {
    return a.channels == 3 ? view_of<3>(a, index, memory) : view_of<1>(a, index, memory);
}

}  // namespace

const AugmentIsa kAugment = {scratch, any_view};

}  // namespace MOCO_FAST_ISA
}  // namespace moco_fast
