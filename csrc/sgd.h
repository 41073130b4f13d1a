// SGD and LARS, and in the same pass over memory the EMA of the key encoder's parameters.
//
//   d = -grad if maximize else grad;  d += weight_decay * param
//   d *= trust * |param| / |d| where both norms are above 0   (LARS: trust > 0, norms of the whole tensor)
//   buffer = d if first else momentum * buffer + (1 - dampening) * d
//   d = d + momentum * buffer if nesterov else buffer          (without a buffer d stays)
//   param -= lr * d;  key <- m * key + (1 - m) * param
//
// Rounded as torch.optim.SGD rounds on fp32 and fp64 tensors, bit for bit where trust is 0: every `a + alpha
// * b` is one fused multiply-add. Low precision is computed in fp32 and rounded when stored. With momentum
// and a key 28 bytes per fp32 parameter: param, grad, buffer and key read, all but grad written; 32 if the
// EMA reads the parameters again. LARS reads param and grad twice. Its norms are sums of fixed parts in a
// fixed order.
//
// Reference: moco_fast.reference.sgd_.  Tests: tests/test_optim.py.
#pragma once

#include "rounding.h"
#include "tensor_rows.h"

namespace moco_fast {

struct SgdStep {
    double momentum, dampening, weight_decay, trust;
    bool nesterov, maximize, first;
};

namespace sgd {

enum Role { kParam, kGrad, kBuffer, kKey, kRoles };  // one dtype per row; buffer and key may be null

// The step in the precision of the arithmetic. Shared by CPU and GPU, so that both round alike.
template <class C>
struct Numbers {
    C sign, lr, momentum, take, weight_decay;
    bool nesterov, first;
};

template <class C>
MOCO_FAST_BOTH Numbers<C> numbers(const SgdStep& s, double lr) {
    return {C(s.maximize ? -1 : 1), C(lr),      C(s.momentum), C(1.0 - s.dampening),
            C(s.weight_decay),      s.nesterov, s.first};
}

template <class C>
MOCO_FAST_BOTH C decayed(C param, C grad, const Numbers<C>& n) {
    const C d = rounded::mul(n.sign, grad);
    return n.weight_decay != 0 ? rounded::fma(n.weight_decay, param, d) : d;
}

template <class C>
MOCO_FAST_BOTH C with_momentum(C d, C& buffer, const Numbers<C>& n) {
    buffer = n.first ? d : rounded::fma(n.take, d, rounded::mul(n.momentum, buffer));
    return n.nesterov ? rounded::fma(n.momentum, buffer, d) : buffer;
}

// What LARS multiplies the update by, from the sums of squares of param and d.
MOCO_FAST_BOTH double trust_ratio(double trust, double params, double updates) {
    return params > 0 && updates > 0 ? trust * rounded::root(params) / rounded::root(updates) : 1.0;
}

}  // namespace sgd

void sgd_step(const TensorRows& rows, const SgdStep& step, double lr, double m, int threads);

// Queues one launch (LARS: two) per table of tensors; scratch holds sgd_scratch_cuda(rows) doubles on the GPU
// if trust > 0. Throws std::runtime_error naming the CUDA call that failed. Defined in CUDA builds only.
void sgd_step_cuda(const TensorRows& rows, const SgdStep& step, const Scalar& lr, const Scalar& m,
                   double* scratch, const CudaStream& where);
int64_t sgd_scratch_cuda(const TensorRows& rows);

}  // namespace moco_fast
