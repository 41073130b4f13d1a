// A table of functions per instruction set, in a namespace of its name; cpu_features.h picks the one in use.
#pragma once

#if defined(MOCO_FAST_X86_64)
#define MOCO_FAST_TABLES(Table, name) \
    namespace baseline {              \
    extern const Table name;          \
    }                                 \
    namespace avx2 {                  \
    extern const Table name;          \
    }                                 \
    namespace avx512 {                \
    extern const Table name;          \
    }
#else
#define MOCO_FAST_TABLES(Table, name) \
    namespace baseline {              \
    extern const Table name;          \
    }
#endif
