// What the compiled code offers to the bindings: plain pointers and sizes, no framework.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pk {

// P problems of N rows and M columns, all arrays contiguous. Null where optional.
template <class T> struct SinkhornTask {
  const T* cost;            // [P, N, M]
  const T* a;               // [P, N]
  const T* b;               // [P, M]
  const double* epsilon;    // [P]
  const double* mass;       // [P] or null
  const uint8_t* row_mask;  // [P, N] or null, 1 where the row exists
  const uint8_t* col_mask;  // [P, M] or null
  const T* f_init;          // [P, N] or null
  const T* g_init;          // [P, M] or null
  T* f;                     // [P, N]
  T* g;                     // [P, M]
  int32_t* n_iters;         // [P]
  T* residual;              // [P]
  int64_t problems, rows, cols;
  double tau_a, tau_b, tol;
  int max_iters;
  bool anderson;  // acceleration
};

// B samples of H heads: the PISCES cost of N text tokens and M video tokens.
template <class T> struct CostTask {
  const T* text;            // [B, N, D]
  const T* video;           // [B, M, D]
  const T* attention;       // [B, H, N, M]
  const T* frame;           // [B, M]
  const T* positions;       // [B, M, 2]
  const uint8_t* row_mask;  // [B, N] or null; what is masked may hold anything
  const uint8_t* col_mask;  // [B, M] or null
  int64_t samples, heads, rows, cols, dim;
  T gamma, place_weight;    // place_weight: eta / sqrt(2)
  bool normalize;
  T* cost;                  // [B, H, N, M]: result of token_cost
};

// Gradient of the token cost; cost.cost is the result of the forward pass.
template <class T> struct CostGradientTask {
  CostTask<T> cost;
  const T* grad;      // [B, H, N, M]
  T* attention;       // results, of the shapes of the inputs
  T *text, *video;    // CPU only
  T* cosine;          // [B, N, M], CUDA only: gradient with respect to cosine(text_i, video_j); two products from the features'
};

// Token cost with the solve and the fusion behind it, one head after the other in scratch memory.
template <class T> struct AttentionTask {
  CostTask<T> cost;                // its col_mask is null
  double epsilon, tau, mass, tol;  // mass 0: not given
  int max_iters;
  T* refined;  // [B, H, N, M]
  T* plan;     // [B, H, N, M] or null
};

// Gradient of attention with the plan held: of A where refined = A P / sum A P with A = attention + 1e-6.
template <class T> struct FusionGradientTask {
  const T *grad, *attention, *refined;  // [B, H, N, M]
  const uint8_t* row_mask;              // [B, N] or null: rows that are not selected pass their gradient on
  int64_t samples, heads, rows, cols;
  T* result;                            // [B, H, N, M]
};

// How the CUDA kernels multiply points: with the rounding of float32, or on tensor cores with that of TF32 or bfloat16.
enum class Precision : int { float32, tf32, bf16 };

// P problems between clouds of N and M points in D dimensions, whose cost is never stored. Null where optional.
template <class T> struct PointsTask {
  const T* x;               // [P, N, D]: centred for the squared distance, of length 1 or 0 for the cosine
  const T* y;               // [P, M, D]; null: x against itself
  const T* a;               // [P, N]
  const T* b;               // [P, M]; transform: logs of weights
  const double* epsilon;    // [P]
  const double* mass;       // [P] or null
  const uint8_t* row_mask;  // [P, N] or null
  const uint8_t* col_mask;  // [P, M] or null
  const T* f_init;          // [P, N] or null
  const T* g_init;          // [P, M] or null
  T* f;                     // [P, N]
  T* g;                     // [P, M]
  int32_t* n_iters;         // [P]
  T* residual;              // [P]
  int64_t problems, rows, cols, dim;
  double tau_a, tau_b, tol;
  int max_iters, threads;
  bool squared;             // the cost is the squared distance, else 1 - cos
  bool anderson;
  Precision precision;      // CUDA only
};

// out = (K * left right_factor^T) right with K_ij = exp(row_i + col_j - cost_ij / epsilon), for clouds as above.
template <class T> struct PointsProductTask {
  const T* x;               // [P, N, D]
  const T* y;               // [P, M, D]
  const T* row;             // [P, N]
  const T* col;             // [P, M]
  const double* epsilon;    // [P]
  const T* right;           // [P, M, width]
  const T* left;            // [P, N, factors] or null: K alone
  const T* right_factor;    // [P, M, factors] or null
  T* out;                   // [P, N, width]
  int64_t problems, rows, cols, dim, width, factors;
  int threads;
  bool squared;
};

// P solved problems: everything that their plans follow from.
template <class T> struct Solved {
  const T* cost;            // [P, N, M]
  const T* f;               // [P, N]
  const T* g;               // [P, M]
  const T* a;               // [P, N]
  const T* b;               // [P, M]
  const double* epsilon;    // [P]
  const uint8_t* row_mask;  // [P, N] or null
  const uint8_t* col_mask;  // [P, M] or null
  int64_t problems, rows, cols;
};

// The plan exp((f + g - cost) / epsilon) a b.
template <class T> struct PlanTask {
  Solved<T> problem;
  bool logarithm;  // -inf where there is nothing
  T* plan;         // [P, N, M]: result, or its logarithm
};

// Its sums over columns [P, N] and rows [P, M], and sum(plan * cost) [P].
template <class T> struct PlanSumsTask {
  Solved<T> problem;
  T *rows, *cols, *energy;
};

// Gradient of a function of the plan and its sums, with respect to what the plan follows from.
template <class T> struct PlanBackwardTask {
  Solved<T> problem;
  const T* grad_plan;                              // [P, N, M] or null
  const T *grad_rows, *grad_cols, *grad_energy;    // [P, N], [P, M], [P], each or null
  T *cost, *f, *g, *a, *b;
  double* epsilon;
};

// Gradient of a function of the potentials at the fixed point.
template <class T> struct ImplicitTask {
  Solved<T> problem;
  double tau_a, tau_b;
  bool exact_mass;
  const T *grad_f, *grad_g;         // [P, N], [P, M]
  T *cost, *a, *b;
  double *epsilon, *mass;           // [P]
  uint8_t* sound;                   // [P], 0: the range of the plan's sums is beyond float64, nothing was written
};

// Gradient of a function of the potentials after n_iters iterations.
template <class T> struct UnrolledTask {
  Solved<T> problem;                // f, g: where the iterations start, each or null
  const double* mass;               // [P] or null
  const int32_t* n_iters;           // [P]
  int64_t most_iters;               // the largest of them
  double tau_a, tau_b;
  const T *grad_f, *grad_g;         // [P, N], [P, M]
  T *cost, *a, *b, *f, *g;          // f, g: with respect to the start, null where that is
  double *epsilon, *to_mass;        // [P]
  uint8_t* sound;                   // [P], 0: a weight of zero or something not finite, nothing was written
};

// Names of the instruction sets that were compiled and that this machine can run, slowest first, separated by spaces.
const char* cpu_instruction_sets();
// Choose one by name (null: the best). Returns the name in use, or null if the machine cannot run it.
const char* cpu_use(const char* name);
const char* cpu_in_use();

template <class T> void cpu_sinkhorn(const SinkhornTask<T>&, int threads);
template <class T> void cpu_token_cost(const CostTask<T>&, int threads);
template <class T> void cpu_token_cost_gradient(const CostGradientTask<T>&, int threads);
template <class T> void cpu_transport_attention(const AttentionTask<T>&, int threads);
template <class T> void cpu_fusion_gradient(const FusionGradientTask<T>&, int threads);
template <class T> void cpu_points_solve(const PointsTask<T>&);
template <class T> void cpu_points_self(const PointsTask<T>&);
template <class T> void cpu_points_transform(const PointsTask<T>&);
template <class T> void cpu_points_product(const PointsProductTask<T>&);
template <class T> void cpu_plan(const PlanTask<T>&, int threads);
template <class T> void cpu_plan_sums(const PlanSumsTask<T>&, int threads);
template <class T> void cpu_plan_backward(const PlanBackwardTask<T>&, int threads);
template <class T> void cpu_implicit(const ImplicitTask<T>&, int threads);
template <class T> void cpu_unrolled(const UnrolledTask<T>&, int threads);

// CUDA launchers; defined only when nvcc was there, and by the emulator of the tests. They compute in float. A null message
// means success. All pointers are on `device`. Asynchronous on the stream and capturable in a graph: they neither allocate
// nor synchronise.
enum class Storage : int { float32, bfloat16, float16 };
struct CudaCall {
  // Of some arrays in memory, whatever their pointers' type: the cost of sinkhorn and of a plan; text, video and attention of the
  // token cost; these and the refined attention of transport attention; all of the fusion's gradient.
  Storage storage;
  int device;
  uintptr_t stream;
  void* workspace;  // as many bytes as the function's *_workspace asks for, aligned to 256; need not be cleared
};
struct CudaStatus {
  int devices;
  const char* message;
};
CudaStatus cuda_devices();
size_t cuda_sinkhorn_workspace(const SinkhornTask<float>&, const CudaCall&);  // bytes
const char* cuda_sinkhorn(const SinkhornTask<float>&, const CudaCall&);
size_t cuda_token_cost_workspace(const CostTask<float>&, const CudaCall&);
const char* cuda_token_cost(const CostTask<float>&, const CudaCall&);
size_t cuda_token_cost_gradient_workspace(const CostGradientTask<float>&, const CudaCall&);
const char* cuda_token_cost_gradient(const CostGradientTask<float>&, const CudaCall&);
size_t cuda_transport_attention_workspace(const AttentionTask<float>&, const CudaCall&);
const char* cuda_transport_attention(const AttentionTask<float>&, const CudaCall&);
const char* cuda_fusion_gradient(const FusionGradientTask<float>&, const CudaCall&);
const char* cuda_plan(const PlanTask<float>&, const CudaCall&);
size_t cuda_plan_sums_workspace(const PlanSumsTask<float>&, const CudaCall&);
const char* cuda_plan_sums(const PlanSumsTask<float>&, const CudaCall&);
size_t cuda_plan_backward_workspace(const PlanBackwardTask<float>&, const CudaCall&);
const char* cuda_plan_backward(const PlanBackwardTask<float>&, const CudaCall&);
size_t cuda_implicit_workspace(const ImplicitTask<float>&, const CudaCall&);
const char* cuda_implicit(const ImplicitTask<float>&, const CudaCall&);
size_t cuda_points_workspace(const PointsTask<float>&, const CudaCall&);  // of the three that follow
const char* cuda_points_solve(const PointsTask<float>&, const CudaCall&);
const char* cuda_points_self(const PointsTask<float>&, const CudaCall&);
const char* cuda_points_transform(const PointsTask<float>&, const CudaCall&);
const char* cuda_points_product(const PointsProductTask<float>&, const CudaCall&);

}  // namespace pk
