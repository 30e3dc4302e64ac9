// The plan, its sums and their gradient, emulated, against the CPU kernels in double.
#include "check.h"

using namespace pk;
using namespace pk::test;

namespace {

struct Case {
  int64_t problems, rows, cols;
  double epsilon;
  bool masks;
  Storage storage;
};

struct Data {
  std::vector<float> cost, f, g, a, b, grad_plan, grad_rows, grad_cols, grad_energy;
  std::vector<double> epsilon;
  std::vector<uint8_t> row_mask, col_mask;
  Data(const Case& c, Random& random) {
    const int64_t P = c.problems, N = c.rows, M = c.cols;
    cost = rounded(random.uniform<float>(P * N * M), c.storage);
    f = random.uniform<float>(P * N, 0, 0.5), g = random.uniform<float>(P * M, 0, 0.5);
    a = random.uniform<float>(P * N, 0, 2 / double(N)), b = random.uniform<float>(P * M, 0, 2 / double(M));
    grad_plan = random.uniform<float>(P * N * M, -1, 1), grad_rows = random.uniform<float>(P * N, -1, 1);
    grad_cols = random.uniform<float>(P * M, -1, 1), grad_energy = random.uniform<float>(P, -1, 1);
    epsilon.assign(size_t(P), c.epsilon);
    for (int64_t i = 0; i < P * N; ++i) row_mask.push_back(random.uniform() < 0.8);
    for (int64_t j = 0; j < P * M; ++j) col_mask.push_back(random.uniform() < 0.8);
    a[0] = 0, b[0] = 0;
  }
};

template <class T> std::vector<T> as(const std::vector<float>& x) { return {x.begin(), x.end()}; }

// Inputs as T, and what the three operations return.
template <class T> struct Run {
  std::vector<T> cost, f, g, a, b, grad_plan, grad_rows, grad_cols, grad_energy;
  std::vector<T> plan, log_plan, rows, cols, energy, to_cost, to_f, to_g, to_a, to_b;
  std::vector<double> to_epsilon;
  Solved<T> solved{};
  Run(const Case& c, const Data& data)
      : cost(as<T>(data.cost)), f(as<T>(data.f)), g(as<T>(data.g)), a(as<T>(data.a)), b(as<T>(data.b)),
        grad_plan(as<T>(data.grad_plan)), grad_rows(as<T>(data.grad_rows)), grad_cols(as<T>(data.grad_cols)),
        grad_energy(as<T>(data.grad_energy)), plan(cost.size(), T(NAN)), log_plan(plan), rows(a.size(), T(NAN)), cols(b.size(), T(NAN)),
        energy(data.epsilon.size(), T(NAN)), to_cost(plan), to_f(rows), to_g(cols), to_a(rows), to_b(cols),
        to_epsilon(data.epsilon.size(), NAN) {
    solved.cost = cost.data(), solved.f = f.data(), solved.g = g.data(), solved.a = a.data(), solved.b = b.data();
    solved.epsilon = data.epsilon.data(), solved.problems = c.problems, solved.rows = c.rows, solved.cols = c.cols;
    solved.row_mask = c.masks ? data.row_mask.data() : nullptr, solved.col_mask = c.masks ? data.col_mask.data() : nullptr;
  }
  PlanTask<T> plan_task() { return {solved, false, plan.data()}; }
  PlanTask<T> log_plan_task() { return {solved, true, log_plan.data()}; }
  PlanSumsTask<T> sums_task() { return {solved, rows.data(), cols.data(), energy.data()}; }
  PlanBackwardTask<T> backward_task(bool all) {
    PlanBackwardTask<T> task{};
    task.problem = solved, task.grad_rows = grad_rows.data();
    if (all) task.grad_plan = grad_plan.data(), task.grad_cols = grad_cols.data(), task.grad_energy = grad_energy.data();
    task.cost = to_cost.data(), task.f = to_f.data(), task.g = to_g.data(), task.a = to_a.data(), task.b = to_b.data();
    task.epsilon = to_epsilon.data();
    return task;
  }
};

void run(const Case& c, Random& random, bool all) {
  const Data data(c, random);
  Run<double> exact(c, data);
  cpu_plan(exact.plan_task(), 1), cpu_plan(exact.log_plan_task(), 1), cpu_plan_sums(exact.sums_task(), 1), cpu_plan_backward(exact.backward_task(all), 1);
  Run<float> ours(c, data);
  for (size_t k = 0; k < ours.cost.size() && c.masks; ++k) {  // what is masked may hold anything
    const size_t row = k / size_t(c.cols), p = row / size_t(c.rows);
    if (!data.row_mask[row] || !data.col_mask[p * size_t(c.cols) + k % size_t(c.cols)]) ours.cost[k] = ours.grad_plan[k] = NAN;
  }
  const std::vector<uint16_t> half = packed(ours.cost, c.storage);
  if (c.storage != Storage::float32) ours.solved.cost = reinterpret_cast<const float*>(half.data());
  CudaCall call{c.storage, 0, 0, nullptr};
  check(cuda_plan(ours.plan_task(), call) == nullptr, "plan: no message");
  check(cuda_plan(ours.log_plan_task(), call) == nullptr, "log-plan: no message");
  const PlanSumsTask<float> sums = ours.sums_task();
  const Workspace for_sums(cuda_plan_sums_workspace(sums, call));
  call.workspace = for_sums.get();
  check(cuda_plan_sums(sums, call) == nullptr, "sums: no message");
  const PlanBackwardTask<float> backward = ours.backward_task(all);
  const Workspace for_backward(cuda_plan_backward_workspace(backward, call));
  call.workspace = for_backward.get();
  check(cuda_plan_backward(backward, call) == nullptr, "backward: no message");
  const std::string name = std::to_string(c.problems) + " x " + std::to_string(c.rows) + " x " + std::to_string(c.cols) + " eps " +
                           std::to_string(c.epsilon) + (c.masks ? " masks" : "") + " storage " + std::to_string(int(c.storage)) + ": ";
  const double digits = 2e-6 / c.epsilon;  // rounding of the potentials is multiplied by 1 / epsilon
  const auto same = [&](const char* what, double away) { check(away < digits, name + what, away); };
  same("plan", relative(ours.plan, exact.plan));
  const auto finite = [](auto logs) {
    for (auto& x : logs) x = x < -1e30 ? 1e6f : x;  // as far from everything else as from -inf
    return logs;
  };
  same("log-plan", difference(finite(ours.log_plan), finite(exact.log_plan)));
  same("sums over columns", relative(ours.rows, exact.rows)), same("sums over rows", relative(ours.cols, exact.cols));
  same("energy", relative(ours.energy, exact.energy));
  same("to cost", relative(ours.to_cost, exact.to_cost));
  same("to f", relative(ours.to_f, exact.to_f)), same("to g", relative(ours.to_g, exact.to_g));
  same("to a", relative(ours.to_a, exact.to_a)), same("to b", relative(ours.to_b, exact.to_b));
  double scale = 0;  // terms of both signs are added up
  for (double x : exact.to_cost) scale += std::abs(x);
  same("to epsilon", difference(ours.to_epsilon, exact.to_epsilon) / (scale / c.epsilon + 1e-30));
}

}  // namespace

int main(int argc, char** argv) {
  Random random(seed_of(argc, argv));
  const auto odd = [&](int64_t low, int64_t high) { return low + random.below(high - low + 1); };
  using S = Storage;
  run({2, odd(65, 95), odd(129, 300), 0.1, true, S::float32}, random, true);  // rows never fill their tiles of 32
  run({1, odd(1, 40), odd(1, 150), 0.05, false, S::bfloat16}, random, true);
  run({3, odd(1, 40), odd(1, 40), 0.05, true, S::float16}, random, false);
  run({1, 1, 1, 1.0, false, S::float32}, random, true);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
