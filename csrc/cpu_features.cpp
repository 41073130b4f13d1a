#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>

#if defined(MOCO_FAST_X86_64)
#include <cpuid.h>

// __builtin_cpu_supports knows this name only from GCC 11 and Clang 19 on.
static bool has_f16c() {
    unsigned int eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

namespace moco_fast {

// __builtin_cpu_supports asks cpuid and xgetbv: true only where the operating system saves the registers too.
std::vector<Isa> supported_isas() {
    std::vector<Isa> isas{Isa::baseline};
#if defined(MOCO_FAST_X86_64)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2) isas.push_back(Isa::avx2);
    if (avx2 && avx512) isas.push_back(Isa::avx512);
#endif
    return isas;
}

std::string isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "baseline";
    }
}

Isa selected_isa() {
    const std::vector<Isa> isas = supported_isas();
    const char* wanted = std::getenv("MOCO_FAST_ISA");
    if (!wanted || !*wanted) return isas.back();
    std::string names;
    for (Isa isa : isas) {
        if (isa_name(isa) == wanted) return isa;
        names += (names.empty() ? "" : ", ") + isa_name(isa);
    }
    throw std::invalid_argument("MOCO_FAST_ISA is '" + std::string(wanted) + "'; this CPU and build offer " +
                                names);
}

}  // namespace moco_fast
