// AdamW, and in the same pass over memory the EMA of the key encoder's parameters.
//
//   param *= 1 - lr * weight_decay;  g = -grad if maximize else grad
//   average <- beta1 * average + (1 - beta1) * g;  square <- beta2 * square + (1 - beta2) * g^2
//   param -= lr / (1 - beta1^t) * average / (sqrt(square) / sqrt(1 - beta2^t) + eps)
//   key <- m * key + (1 - m) * param
//
// t, the number of steps including this one, is an fp32 tensor of each parameter, on its device: a captured
// graph sees it grow. Operations in the order of torch.optim.AdamW; low precision is computed in fp32 and
// rounded when stored. With a key 36 bytes per fp32 parameter instead of 40.
//
// Reference: moco_fast.reference.adamw_.  Tests: tests/test_optim.py.
#pragma once

#include "rounding.h"
#include "tensor_rows.h"

namespace moco_fast {

struct AdamwStep {
    double beta1, beta2, eps, weight_decay;
    bool maximize;
};

namespace adamw {

// One dtype per row, but kStep is the address of one fp32 value; the key may be null.
enum Role { kParam, kGrad, kAverage, kSquare, kKey, kStep, kRoles };

// The step of one parameter in the precision of the arithmetic, without branches, so that it vectorises.
template <class C>
struct Numbers {
    C sign, decay, slope, beta2, take2, size, root, eps;
    bool from_average;
};

// correction = 1 - beta^t of both moments.
template <class C>
MOCO_FAST_BOTH Numbers<C> numbers(const AdamwStep& s, double lr, double correction1, double correction2) {
    // torch.lerp goes from the nearer end, with the rounded weight.
    const C take1 = C(1.0 - s.beta1);
    const bool near = take1 < C(0.5);
    return {C(s.maximize ? -1 : 1),
            C(rounded::add(1.0, -rounded::mul(lr, s.weight_decay))),
            near ? take1 : rounded::add(take1, C(-1)),
            C(s.beta2),
            C(1.0 - s.beta2),
            C(-lr / correction1),
            C(rounded::root(correction2)),
            C(s.eps),
            near};
}

template <class C>
MOCO_FAST_BOTH C updated(C param, C grad, C& average, C& square, const Numbers<C>& n) {
    using namespace rounded;
    const C g = mul(n.sign, grad);
    average = fma(n.slope, add(g, -average), n.from_average ? average : g);
    square = fma(mul(n.take2, g), g, mul(n.beta2, square));
    const C divisor = add(div(root(square), n.root), n.eps);
    return add(mul(param, n.decay), div(mul(n.size, average), divisor));
}

}  // namespace adamw

void adamw_step(const TensorRows& rows, const AdamwStep& step, double lr, double m, int threads);

// Queues one launch per table of tensors. Throws std::runtime_error naming the CUDA call that failed. Defined
// in CUDA builds only.
void adamw_step_cuda(const TensorRows& rows, const AdamwStep& step, const Scalar& lr, const Scalar& m,
                     const CudaStream& where);

}  // namespace moco_fast
