#include <stdexcept>

#include "nt_xent.h"
#include "pairs.h"

namespace moco_fast {

void nt_xent(const NtXent& a) {
    if (a.rows % 2)
        throw std::invalid_argument("nt_xent: two views of every image are an even number of rows");
    const UnitRows z(a.z, a.dtype, 1, a.rows, a.features, a.threads);
    const Pairing views = {a.rows / 2, true};
    Softmaxes found(z);
    first_pass(z, z, views, a.temperature, found, a.loss, nullptr, a.threads);
    if (a.dz) second_pass(z, z, views, a.temperature, found, a.dz, a.threads);
}

}  // namespace moco_fast
