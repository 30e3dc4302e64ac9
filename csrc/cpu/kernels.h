// The table of kernels that every instruction set fills, and what its kernels see of the threads. Included by code of all
// instruction sets: no standard library beyond sizes.
#pragma once
#include "../api.h"

namespace pk {

// Threads that split one long problem. run: work(context, chunk) for every chunk in [0, chunks), on any of the threads in any
// order; returns when all are done. Chunks must be cut by the sizes of the problem alone, and partial results added in the
// order of the chunks: the answer is then bitwise the same for any number of threads.
struct Team {
  void (*run)(Team* self, void (*work)(void* context, int64_t chunk), void* context, int64_t chunks);
};

// Memory of transport attention: what a sample's heads share, and what works on a sample or a head need of their own.
struct AttentionBytes {
  size_t shared, sample, head;
};

// Kernels for one problem, sample or head each, in caller's scratch memory of the bytes that the function before them says.
// A null team is one thread.
template <class T> struct Kernels {
  size_t (*sinkhorn_scratch)(const SinkhornTask<T>&);
  void (*sinkhorn)(const SinkhornTask<T>&, int64_t problem, char* scratch, Team*);

  size_t (*token_cost_scratch)(const CostTask<T>&);
  void (*token_cost)(const CostTask<T>&, int64_t sample, char* scratch, Team*);
  size_t (*cost_gradient_scratch)(const CostTask<T>&);
  void (*cost_gradient)(const CostGradientTask<T>&, int64_t sample, char* scratch, Team*);

  AttentionBytes (*attention_bytes)(const AttentionTask<T>&);
  void (*attention_sample)(const AttentionTask<T>&, int64_t sample, char* shared, char* scratch, Team*);
  void (*attention)(const AttentionTask<T>&, int64_t head, const char* shared, char* scratch, Team*);
  void (*fusion_gradient)(const FusionGradientTask<T>&, int64_t first_row, int64_t last_row);

  size_t (*plan_scratch)(const Solved<T>&);  // of all three
  void (*plan)(const PlanTask<T>&, int64_t problem, char* scratch, Team*);
  void (*plan_sums)(const PlanSumsTask<T>&, int64_t problem, char* scratch, Team*);
  void (*plan_backward)(const PlanBackwardTask<T>&, int64_t problem, char* scratch, Team*);
  size_t (*implicit_scratch)(const ImplicitTask<T>&);
  void (*implicit)(const ImplicitTask<T>&, int64_t problem, char* scratch, Team*);
  size_t (*unrolled_scratch)(const UnrolledTask<T>&);
  void (*unrolled)(const UnrolledTask<T>&, int64_t problem, char* scratch, Team*);

  size_t (*points_scratch)(const PointsTask<T>&);
  void (*points_solve)(const PointsTask<T>&, int64_t problem, char* scratch, Team*);
  void (*points_self)(const PointsTask<T>&, int64_t problem, char* scratch, Team*);
  void (*points_transform)(const PointsTask<T>&, int64_t problem, char* scratch, Team*);
  size_t (*points_product_scratch)(const PointsProductTask<T>&);
  void (*points_product)(const PointsProductTask<T>&, int64_t problem, char* scratch, Team*);
};

struct CpuKernels {
  const char* name;  // of the instruction set
  Kernels<float> f32;
  Kernels<double> f64;
};

// The kernels in use: the best that this machine runs, or what `cpu_use` chose.
const CpuKernels& cpu_kernels();

}  // namespace pk
