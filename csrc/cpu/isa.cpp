// The kernels of one instruction set. CMake compiles this file once per set, with PK_ISA naming the table it defines.
#include "attention.h"
#include "implicit.h"
#include "plan.h"
#include "points.h"
#include "sinkhorn.h"
#include "token_cost_gradient.h"
#include "unrolled.h"

#define PK_JOIN(a, b) a##b
#define PK_TABLE(isa) PK_JOIN(cpu_kernels_, isa)
#define PK_TEXT(isa) #isa
#define PK_NAME(isa) PK_TEXT(isa)

namespace {
template <class T> Kernels<T> kernels() {
  Kernels<T> k{};
  k.sinkhorn_scratch = sinkhorn_scratch<T>, k.sinkhorn = sinkhorn_one<T>;
  k.token_cost_scratch = cost_scratch<T>, k.token_cost = token_cost_one<T>;
  k.cost_gradient_scratch = gradient_scratch<T>, k.cost_gradient = token_cost_gradient_one<T>;
  k.attention_bytes = attention_bytes<T>, k.attention_sample = attention_sample<T>, k.attention = attention_one<T>;
  k.fusion_gradient = fusion_gradient_rows<T>;
  k.plan_scratch = plan_scratch<T>, k.plan = plan_one<T>;
  k.plan_sums = plan_sums_one<T>, k.plan_backward = plan_backward_one<T>;
  k.implicit_scratch = implicit_scratch<T>, k.implicit = implicit_one<T>;
  k.unrolled_scratch = unrolled_scratch<T>, k.unrolled = unrolled_one<T>;
  k.points_scratch = points_scratch_of<T>;
  k.points_solve = points_solve_one<T>, k.points_self = points_self_one<T>, k.points_transform = points_transform_one<T>;
  k.points_product_scratch = points_product_scratch_of<T>, k.points_product = points_product_one<T>;
  return k;
}
}  // namespace

namespace pk {
const CpuKernels& PK_TABLE(PK_ISA)() {
  static const CpuKernels table = {PK_NAME(PK_ISA), kernels<float>(), kernels<double>()};
  return table;
}
}  // namespace pk
