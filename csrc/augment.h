// Views of images on the CPU: crop, resize, flip, colour, blur, solarise, normalise, one after the other
// while the image is in the cache. What a view is, and the columns of its parameters:
// moco_fast.reference.augment.
//
// Reads the crop once, in uint8, and writes the view once. Per value of it about 2 FLOP for every source
// pixel under the triangles of its row and of its column, 50 for colours, and 3 for every tap of the blur on
// either side, along rows and along columns.
//
// Shapes: images (N, C, H, W) uint8 with columns together in memory, other strides any; parameters (N, 16);
// out (N, C, S, S), contiguous or channels-last. C is 1 or 3.
// Reference: moco_fast.reference.augment.  Tests: tests/test_augment.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace moco_fast {

struct Augment {
    const uint8_t* images;
    int64_t count, channels, height, width;
    int64_t image_stride, channel_stride, row_stride;  // in bytes, 0 where the values are the same ones
    const float* parameters;
    int64_t size;  // S
    float mean[3], std[3];
    DType dtype;  // of out; fp64 is not served
    bool channels_last;
    void* out;
    int threads;
};

// Throws std::invalid_argument for impossible sizes, before anything is written.
void augment(const Augment& args);

}  // namespace moco_fast
