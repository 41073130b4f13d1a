// Which instruction set the process runs, decided once per process.
#pragma once

#include <string>
#include <vector>

namespace moco_fast {

enum class Isa { baseline, avx2, avx512 };

// Those compiled in that this CPU and operating system can run, weakest first.
std::vector<Isa> supported_isas();

// The strongest supported one, or what MOCO_FAST_ISA names.
// Throws std::invalid_argument for a name that is unknown, not compiled in or not supported here.
Isa selected_isa();

std::string isa_name(Isa isa);

// Whether avx512 is in use and there are matrix units for bf16 beside it (AMX), compiled in and granted by
// the operating system.
bool has_amx();

template <class Table>
const Table& pick(const Table& baseline, const Table& avx2, const Table& avx512) {
    const Isa isa = selected_isa();
    return isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : baseline;
}

}  // namespace moco_fast

// The table or function of this name of the instruction set in use: one lies in the namespace of each.
#if defined(MOCO_FAST_X86_64)
#define MOCO_FAST_SELECTED(table) ::moco_fast::pick(baseline::table, avx2::table, avx512::table)
#else
#define MOCO_FAST_SELECTED(table) baseline::table
#endif
