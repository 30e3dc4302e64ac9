// Dense batched Sinkhorn: the whole solve in one launch.
#include "placement.h"
#include "solver.cuh"

namespace pk {
namespace {

using namespace device;

template <int ROWS>
__global__ void __launch_bounds__(ROWS > 0 ? ONE_PASS_THREADS : ROWS == 0 ? TWO_PASS_THREADS : GLOBAL_THREADS, 1)
    sinkhorn_kernel(SinkhornTask<float> task, Storage storage, Placement place, unsigned char* workspace) {
  PK_DYNAMIC_SHARED(memory);
  Solver<(ROWS > 0 ? ROWS : 0), DenseCost> solver;
  Problem& problem = solver.problem;
  Carver fast{memory};
  settle<ROWS == GLOBAL_ROWS>(problem, solver.peers, place, fast, workspace, task.rows, task.cols);
  const int64_t N = task.rows, M = task.cols;
  const size_t element = storage == Storage::float32 ? 4 : 2;
  for (int64_t p = blockIdx.x / place.team; p < task.problems; p += place.teams) {
    solver.cost = {reinterpret_cast<const char*>(task.cost) + size_t(p * N * M) * element, storage, int(M)};
    Inputs in{};
    in.a = task.a + p * N, in.b = task.b + p * M;
    in.row_mask = task.row_mask ? task.row_mask + p * N : nullptr;
    in.col_mask = task.col_mask ? task.col_mask + p * M : nullptr;
    in.f_init = task.f_init ? task.f_init + p * N : nullptr;
    in.g_init = task.g_init ? task.g_init + p * M : nullptr;
    in.epsilon = float(task.epsilon[p]), in.tau_a = task.mass ? 1.0f : float(task.tau_a);
    in.tau_b = task.mass ? 1.0f : float(task.tau_b);
    in.mass = task.mass ? float(task.mass[p]) : 0.0f, in.tol = float(task.tol), in.max_iters = task.max_iters;
    solver.begin(in);
    const Outcome outcome = solver.solve(in, solver.see_cost());
    const bool sound = outcome.residual == outcome.residual;
    const float instead = outcome.empty ? 0.0f : NAN;
    if (solver.peers.rank == 0) {
      for (int i = threadIdx.x; i < problem.n; i += blockDim.x) {
        const bool there = exists(problem.rows.weight(i));
        task.f[p * N + i] = !there ? 0.0f : sound && !outcome.empty ? problem.row_potential(i) : instead;
      }
      if (threadIdx.x == 0) task.n_iters[p] = outcome.iterations, task.residual[p] = outcome.residual;
    }
    for (int j = threadIdx.x; j < problem.m; j += blockDim.x) {
      const bool there = exists(problem.cols.weight(j));
      task.g[p * M + problem.first + j] = !there ? 0.0f : sound && !outcome.empty ? problem.col_potential(j) : instead;
    }
  }
  if (place.meeting == Meeting::cluster) cluster_sync();  // others may still read this block's shared memory
}

const char* refusal(const SinkhornTask<float>& task) {
  if (task.anderson) return "Anderson acceleration is not there on CUDA; use acceleration=None or backend='reference'";
  if (task.rows > 0x7fffffff / 8 || task.cols > 0x7fffffff / 8) return "more than 2^28 rows or columns";
  return nullptr;
}
cudaError_t find_place(const SinkhornTask<float>& task, const CudaCall& call, Placement& found) {
  Limits limits;
  const cudaError_t error = limits_of(call.device, limits);
  if (error == cudaSuccess) found = place({rows_template(task.rows)}, task.rows, task.cols, task.problems, limits);
  return error;
}

}  // namespace

size_t cuda_sinkhorn_workspace(const SinkhornTask<float>& task, const CudaCall& call) {
  Placement found;
  if (task.problems == 0 || refusal(task) != nullptr || find_place(task, call, found) != cudaSuccess || found.team == 0) return 0;
  return Workspace(found).bytes();
}

const char* cuda_sinkhorn(const SinkhornTask<float>& task, const CudaCall& call) {
  if (task.problems == 0) return nullptr;
  if (const char* reason = refusal(task)) return reason;
  return on_device(call.device, [&] {
    Placement found;
    cudaError_t error = find_place(task, call, found);
    if (error != cudaSuccess) return error;
    if (found.team == 0) return cudaErrorInvalidConfiguration;
    auto* workspace = static_cast<unsigned char*>(call.workspace);
    const size_t counters = Workspace(found).counters;
    if (counters > 0) error = clear(workspace, counters, call.stream);
    if (error != cudaSuccess) return error;
    const Launch where = launch_of(found, call.stream);
    switch (found.rows_template) {
      case 16:
        return launch(sinkhorn_kernel<16>, where, task, call.storage, found, workspace);
      case 32:
        return launch(sinkhorn_kernel<32>, where, task, call.storage, found, workspace);
      case 40:
        return launch(sinkhorn_kernel<40>, where, task, call.storage, found, workspace);
      case 0:
        return launch(sinkhorn_kernel<0>, where, task, call.storage, found, workspace);
      default:
        return launch(sinkhorn_kernel<GLOBAL_ROWS>, where, task, call.storage, found, workspace);
    }
  });
}

}  // namespace pk
