// Rows in another order: out_i <- rows[index_i], for rows of any type, as bytes.
//
// M rows are read and written once, each in one stretch: 2 M B bytes.
//
// Shapes: rows (R, B) bytes; index (M) int64 in [0, R); out (M, B), not overlapping rows.
// Reference: moco_fast.reference.take_rows.  Tests: tests/test_take_rows.py.
#pragma once

#include <cstdint>

namespace moco_fast {

struct TakeRows {
    const char* rows;
    int64_t bytes;  // per row
    const int64_t* index;
    int64_t count;
    char* out;
    int threads;
};

void take_rows(const TakeRows& args);

}  // namespace moco_fast
