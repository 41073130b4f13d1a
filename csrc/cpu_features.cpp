#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>

#if defined(MOCO_FAST_X86_64)
#include <cpuid.h>
#if defined(MOCO_FAST_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// __builtin_cpu_supports knows this name only from GCC 11 and Clang 19 on.
static bool has_f16c() {
    unsigned int eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

#if defined(MOCO_FAST_AMX)
static bool cpu_has_amx() {
    constexpr unsigned int kBf16Tiles = 1u << 22 | 1u << 24, kBf16Vectors = 1u << 5;  // AMX-BF16 and -TILE
    constexpr unsigned int kSaved = 1u << 17 | 1u << 18;  // by the operating system: tiles and their shape
    unsigned int eax, ebx, ecx, edx, xcr0, high;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16Tiles) != kBf16Tiles) return false;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & kBf16Vectors)) return false;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return false;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    return (xcr0 & kSaved) == kSaved;
}

// Linux lets a process use the tiles once it has asked: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static bool granted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#endif
#endif

namespace moco_fast {

// __builtin_cpu_supports asks cpuid and xgetbv: true only where the operating system saves the registers too.
std::vector<Isa> supported_isas() {
    std::vector<Isa> isas{Isa::baseline};
#if defined(MOCO_FAST_X86_64)
    // Asked once: in a virtual machine a cpuid takes microseconds, and every kernel comes here.
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
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

bool has_amx() {
#if defined(MOCO_FAST_AMX)
    static const bool has = cpu_has_amx() && granted();
    return has && selected_isa() == Isa::avx512;
#else
    return false;
#endif
}

}  // namespace moco_fast
