// The CUDA kernels' host functions, for ctypes: each returns an empty string or what went wrong. Those of the
// sources that were compiled, by MOCO_FAST_HAS_*.
#include <string>

#include "adamw.h"
#include "ema_update.h"
#include "info_nce_sweep.h"
#include "machine.h"
#include "sgd.h"

namespace mf = moco_fast;

namespace {

template <class Call>
const char* told(Call call) {
    static std::string message;
    message.clear();
    try {
        call();
    } catch (const std::exception& error) {
        message = error.what();
    }
    return message.c_str();
}

mf::TensorRows rows_of(const mf::TensorRow* rows, int count) { return {rows, rows + count}; }

}  // namespace

namespace moco_fast::ema {
void check(const TensorRows&) {}  // csrc/ema_update_cpu.cpp has it; Python tests it there
}  // namespace moco_fast::ema

extern "C" {

void seed(unsigned value) { emulated::machine().random.seed(value); }

#if defined(MOCO_FAST_HAS_EMA_UPDATE)
const char* ema_update(const mf::TensorRow* rows, int count, const mf::Scalar* m) {
    return told([&] { mf::ema_update_cuda(rows_of(rows, count), *m, {0, nullptr}); });
}
#endif

#if defined(MOCO_FAST_HAS_SGD)
const char* sgd_step(const mf::TensorRow* rows, int count, const mf::SgdStep* step, const mf::Scalar* lr,
                     const mf::Scalar* m) {
    return told([&] {
        const mf::TensorRows all = rows_of(rows, count);
        std::vector<double> scratch(std::size_t(mf::sgd_scratch_cuda(all)), NAN);
        mf::sgd_step_cuda(all, *step, *lr, *m, scratch.data(), {0, nullptr});
    });
}
#endif

#if defined(MOCO_FAST_HAS_ADAMW)
const char* adamw_step(const mf::TensorRow* rows, int count, const mf::AdamwStep* step, const mf::Scalar* lr,
                       const mf::Scalar* m) {
    return told([&] { mf::adamw_step_cuda(rows_of(rows, count), *step, *lr, *m, {0, nullptr}); });
}
#endif

#if defined(MOCO_FAST_HAS_INFO_NCE_SWEEP)
const char* info_nce_sweep(const mf::InfoNceSweep* args) {
    return told([&] { mf::info_nce_sweep_cuda(*args, {0, nullptr}); });
}
#endif

}  // extern "C"
