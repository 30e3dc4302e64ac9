// Every operation of csrc/api.h: its problems spread over threads. Compiled for the baseline of the platform.
#include "parallel.h"

namespace pk {
namespace {

template <class T> const Kernels<T>& kernels() {
  if constexpr (sizeof(T) == sizeof(float)) return cpu_kernels().f32;
  else return cpu_kernels().f64;
}

// Starting threads takes 30 to 60 us: a small job is done by the calling thread before they are there. A pass of a solve takes
// about 0.2 ns an entry (float32, AVX2), and beside its entries as long as 1000 of them.
int worth_threads(int threads, int64_t problems, int64_t entries, int64_t passes) {
  return problems * (entries + 1000) * passes < 1000000 ? 1 : threads;
}
// Iterations are counted as far as most problems need them, and the preparation of a problem as 8 more.
int64_t expected_passes(int max_iters) { return 8 + (max_iters < 30 ? max_iters : 30); }

// Entries of a problem from which a team of threads gains more by sharing it than it loses by waiting for each other.
constexpr int64_t LONG = 1 << 17;

// A result this large comes fresh from the system at every call (glibc keeps no larger pieces), and the page faults of its
// first writing cost several times the writing. Huge pages take one fault in 512 of them.
template <class T> void fresh_result([[maybe_unused]] T* result, [[maybe_unused]] int64_t entries) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(1) << 21, bytes = uintptr_t(entries) * sizeof(T);
  if (result == nullptr || bytes < 16 * page) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(result) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(result) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

// ---- dense problems ------------------------------------------------------------------------------------------------------

template <class T> void cpu_sinkhorn(const SinkhornTask<T>& task, int threads) {
  const int64_t entries = task.rows * task.cols;
  threads = worth_threads(threads, task.problems, entries, expected_passes(task.max_iters));
  spread(task.problems, threads, kernels<T>().sinkhorn_scratch(task), entries >= LONG,
         [&](int64_t p, char* scratch, Team* team) { kernels<T>().sinkhorn(task, p, scratch, team); });
}

// ---- token cost and transport attention -----------------------------------------------------------------------------------

// Work of a sample in entries of a cost: 32 products of features take about as long as one of them.
template <class T> int64_t cost_entries(const CostTask<T>& task) {
  return task.rows * task.cols * (task.heads + task.dim / 32);
}

template <class T> void cpu_token_cost(const CostTask<T>& task, int threads) {
  const int64_t entries = cost_entries(task);
  threads = worth_threads(threads, task.samples, entries, 4);
  fresh_result(task.cost, task.samples * task.heads * task.rows * task.cols);
  spread(task.samples, threads, kernels<T>().token_cost_scratch(task), entries >= LONG,
         [&](int64_t sample, char* scratch, Team* team) { kernels<T>().token_cost(task, sample, scratch, team); });
}

template <class T> void cpu_token_cost_gradient(const CostGradientTask<T>& task, int threads) {
  const CostTask<T>& shape = task.cost;
  const int64_t entries = cost_entries(shape);
  threads = worth_threads(threads, shape.samples, entries, 8);
  fresh_result(task.attention, shape.samples * shape.heads * shape.rows * shape.cols);
  fresh_result(task.video, shape.samples * shape.cols * shape.dim);
  spread(shape.samples, threads, kernels<T>().cost_gradient_scratch(shape), entries >= LONG,
         [&](int64_t sample, char* scratch, Team* team) { kernels<T>().cost_gradient(task, sample, scratch, team); });
}

template <class T> void cpu_transport_attention(const AttentionTask<T>& task, int threads) {
  const CostTask<T>& shape = task.cost;
  const int64_t heads = shape.samples * shape.heads, entries = shape.rows * shape.cols;
  threads = worth_threads(threads, heads, entries, 8 + expected_passes(task.max_iters));
  for (T* result : {task.refined, task.plan}) fresh_result(result, heads * entries);
  const AttentionBytes bytes = kernels<T>().attention_bytes(task);
  Scratch shared(bytes.shared * size_t(shape.samples));
  const auto of_sample = [&](int64_t sample) { return shared.data() + bytes.shared * size_t(sample); };
  spread(shape.samples, threads, bytes.sample, cost_entries(shape) >= LONG, [&](int64_t sample, char* scratch, Team* team) {
    kernels<T>().attention_sample(task, sample, of_sample(sample), scratch, team);
  });
  spread(heads, threads, bytes.head, entries >= LONG, [&](int64_t head, char* scratch, Team* team) {
    kernels<T>().attention(task, head, of_sample(head / shape.heads), scratch, team);
  });
}

template <class T> void cpu_fusion_gradient(const FusionGradientTask<T>& task, int threads) {
  const int64_t rows = task.samples * task.heads * task.rows, step = (int64_t(1) << 16) / task.cols + 1;
  threads = worth_threads(threads, rows, task.cols, 1);
  fresh_result(task.result, rows * task.cols);
  spread((rows + step - 1) / step, threads, 0, false, [&](int64_t piece, char*, Team*) {
    const int64_t first = piece * step, last = first + step < rows ? first + step : rows;
    kernels<T>().fusion_gradient(task, first, last);
  });
}

// ---- plan and gradients of solved problems ----------------------------------------------------------------------------------

namespace {

// passes: as for `worth_threads`.
template <class T, class Task, class Run>
void spread_solved(const Task& task, size_t scratch_bytes, int threads, int64_t passes, Run run) {
  const Solved<T>& problem = task.problem;
  threads = worth_threads(threads, problem.problems, problem.rows * problem.cols, passes);
  spread(problem.problems, threads, scratch_bytes, problem.rows * problem.cols >= LONG,
         [&](int64_t p, char* scratch, Team* team) { run(task, p, scratch, team); });
}

}  // namespace

template <class T> void cpu_plan(const PlanTask<T>& task, int threads) {
  spread_solved<T>(task, kernels<T>().plan_scratch(task.problem), threads, 8, kernels<T>().plan);
}
template <class T> void cpu_plan_sums(const PlanSumsTask<T>& task, int threads) {
  spread_solved<T>(task, kernels<T>().plan_scratch(task.problem), threads, 8, kernels<T>().plan_sums);
}
template <class T> void cpu_plan_backward(const PlanBackwardTask<T>& task, int threads) {
  spread_solved<T>(task, kernels<T>().plan_scratch(task.problem), threads, 10, kernels<T>().plan_backward);
}
template <class T> void cpu_implicit(const ImplicitTask<T>& task, int threads) {
  const int64_t rows = task.problem.rows, cols = task.problem.cols;
  const int64_t passes = 16 + (rows < cols ? rows : cols) / 8;  // the system of the shorter side takes most of them
  spread_solved<T>(task, kernels<T>().implicit_scratch(task), threads, passes, kernels<T>().implicit);
}
template <class T> void cpu_unrolled(const UnrolledTask<T>& task, int threads) {
  spread_solved<T>(task, kernels<T>().unrolled_scratch(task), threads, 20 * task.most_iters, kernels<T>().unrolled);
}

// ---- point clouds ---------------------------------------------------------------------------------------------------------

namespace {

// A problem of fewer products than this is not worth a team.
constexpr int64_t LONG_PRODUCT = 1 << 22;

template <class T> using PointsRun = void (*)(const PointsTask<T>&, int64_t problem, char* scratch, Team*);
template <class T> void run_points(const PointsTask<T>& task, PointsRun<T> run) {
  const bool split = task.rows * (task.y ? task.cols : task.rows) * (task.dim + 16) >= LONG_PRODUCT;
  spread(task.problems, task.threads, kernels<T>().points_scratch(task), split,
         [&](int64_t p, char* scratch, Team* team) { run(task, p, scratch, team); });
}

}  // namespace

template <class T> void cpu_points_solve(const PointsTask<T>& task) { run_points(task, kernels<T>().points_solve); }
template <class T> void cpu_points_self(const PointsTask<T>& task) { run_points(task, kernels<T>().points_self); }
template <class T> void cpu_points_transform(const PointsTask<T>& task) { run_points(task, kernels<T>().points_transform); }
template <class T> void cpu_points_product(const PointsProductTask<T>& task) {
  const bool split = task.rows * task.cols * (task.dim + task.width + task.factors + 16) >= LONG_PRODUCT;
  spread(task.problems, task.threads, kernels<T>().points_product_scratch(task), split,
         [&](int64_t p, char* scratch, Team* team) { kernels<T>().points_product(task, p, scratch, team); });
}

#define PK_INSTANTIATE(T)                                                 \
  template void cpu_sinkhorn(const SinkhornTask<T>&, int);                \
  template void cpu_token_cost(const CostTask<T>&, int);                  \
  template void cpu_transport_attention(const AttentionTask<T>&, int);    \
  template void cpu_token_cost_gradient(const CostGradientTask<T>&, int); \
  template void cpu_fusion_gradient(const FusionGradientTask<T>&, int);   \
  template void cpu_plan(const PlanTask<T>&, int);                        \
  template void cpu_plan_sums(const PlanSumsTask<T>&, int);               \
  template void cpu_plan_backward(const PlanBackwardTask<T>&, int);       \
  template void cpu_implicit(const ImplicitTask<T>&, int);                \
  template void cpu_unrolled(const UnrolledTask<T>&, int);                \
  template void cpu_points_solve(const PointsTask<T>&);                   \
  template void cpu_points_self(const PointsTask<T>&);                    \
  template void cpu_points_transform(const PointsTask<T>&);               \
  template void cpu_points_product(const PointsProductTask<T>&);
PK_INSTANTIATE(float)
PK_INSTANTIATE(double)

}  // namespace pk
