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

}  // namespace moco_fast
