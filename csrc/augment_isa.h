// One view of one image, compiled once per instruction set. Chosen in augment.cpp.
#pragma once

#include <cstdint>

#include "augment.h"
#include "isa_tables.h"

namespace moco_fast {

// The columns of the parameters.
struct ViewParameters {
    float left, top, width, height;
    float amounts[5];  // by Adjustment
    float order[5];    // an Adjustment each
    float sigma, threshold;
};

enum Adjustment { kBrightness, kContrast, kSaturation, kHue, kGray, kAdjustments };

struct AugmentIsa {
    // Floats of scratch that a view takes.
    int64_t (*scratch)(const Augment&);
    // Make view `index`.
    void (*view)(const Augment&, int64_t index, float* scratch);
};

MOCO_FAST_TABLES(AugmentIsa, kAugment)

}  // namespace moco_fast
