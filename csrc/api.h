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
  const T* similarity;      // [B, N, M], cosine of text and video tokens
  const T* attention;       // [B, H, N, M]
  const T* frame;           // [B, M]
  const T* place_y;         // [B, M]
  const T* place_x;         // [B, M]
  const T* time_weight;     // [B], gamma / (t_max - t_min)
  const uint8_t* row_mask;  // [B, N] or null
  const uint8_t* col_mask;  // [B, M] or null (token_cost only)
  int64_t samples, heads, rows, cols;
  T place_weight;           // eta / sqrt(2)
  bool normalize;
  T* cost;                  // [B, H, N, M]: result of token_cost
};

// The same with the solve and the fusion behind it, one head after the other in scratch memory.
template <class T> struct AttentionTask {
  CostTask<T> cost;
  double epsilon, tau, mass, tol;  // mass 0: not given
  int max_iters;
  T* refined;  // [B, H, N, M], rows that are not selected are left alone
  T* plan;     // [B, H, N, M] or null, the same
};

// One instruction set's kernels: one problem (or head) each, in caller's scratch memory.
struct CpuKernels {
  const char* name;
  size_t (*sinkhorn_scratch)(int64_t rows, int64_t cols, size_t element, bool anderson);
  void (*sinkhorn_f32)(const SinkhornTask<float>&, int64_t problem, char* scratch);
  void (*sinkhorn_f64)(const SinkhornTask<double>&, int64_t problem, char* scratch);
  void (*token_cost_f32)(const CostTask<float>&, int64_t head);
  void (*token_cost_f64)(const CostTask<double>&, int64_t head);
  void (*attention_f32)(const AttentionTask<float>&, int64_t head, char* scratch);
  void (*attention_f64)(const AttentionTask<double>&, int64_t head, char* scratch);
};

// Names of the instruction sets that were compiled and that this machine can run, slowest first, separated by spaces.
const char* cpu_instruction_sets();
// Choose one by name (null: the best). Returns the name in use, or null if the machine cannot run it.
const char* cpu_use(const char* name);
const char* cpu_in_use();

template <class T> void cpu_sinkhorn(const SinkhornTask<T>&, int threads);
template <class T> void cpu_token_cost(const CostTask<T>&, int threads);
template <class T> void cpu_transport_attention(const AttentionTask<T>&, int threads);

// CUDA launchers; defined only when nvcc was there. A null message means success.
struct CudaStatus {
  int devices;
  const char* message;
};
CudaStatus cuda_devices();
// Elements of workspace that one launch needs.
template <class T> size_t cuda_sinkhorn_workspace(const SinkhornTask<T>&);
// All pointers on the given device. mass must be null. Asynchronous on the stream.
template <class T> const char* cuda_sinkhorn(const SinkhornTask<T>&, T* workspace, int device, uintptr_t stream);

}  // namespace pk
