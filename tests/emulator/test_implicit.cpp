// The gradient of the potentials at the fixed point, emulated, against the CPU kernel in double.
#include "check.h"

using namespace pk;
using namespace pk::test;

namespace {

struct Case {
  int64_t problems, rows, cols;
  double epsilon, tau_a, tau_b;
  bool masks;
};

template <class T> struct Results {
  std::vector<T> cost, a, b;
  std::vector<double> epsilon, mass;
  std::vector<uint8_t> sound;
  Results(int64_t P, int64_t N, int64_t M)
      : cost(size_t(P * N * M), T(NAN)), a(size_t(P * N), T(NAN)), b(size_t(P * M), T(NAN)), epsilon(size_t(P), NAN),
        mass(size_t(P), NAN), sound(size_t(P), 9) {}
};

template <class T> ImplicitTask<T> task_of(const Case& c, const Solved<T>& solved, const std::vector<T>& grad_f,
                                           const std::vector<T>& grad_g, Results<T>& to) {
  ImplicitTask<T> task{};
  task.problem = solved, task.tau_a = c.tau_a, task.tau_b = c.tau_b, task.grad_f = grad_f.data(), task.grad_g = grad_g.data();
  task.cost = to.cost.data(), task.a = to.a.data(), task.b = to.b.data(), task.epsilon = to.epsilon.data(), task.mass = to.mass.data();
  task.sound = to.sound.data();
  return task;
}

void run(const Case& c, Random& random) {
  const int64_t P = c.problems, N = c.rows, M = c.cols;
  std::vector<double> cost = widened(random.uniform<float>(P * N * M)), a = widened(random.uniform<float>(P * N, 0.5, 1.5));
  std::vector<double> b = widened(random.uniform<float>(P * M, 0.5, 1.5)), f(a.size()), g(b.size());
  std::vector<uint8_t> row_mask, col_mask;
  for (int64_t i = 0; i < P * N; ++i) row_mask.push_back(i % N == 0 || random.uniform() < 0.8);
  for (int64_t j = 0; j < P * M; ++j) col_mask.push_back(j % M == 0 || random.uniform() < 0.8);
  if (N > 2) a[1] = 0;  // an entry without weight still has a potential
  if (M > 2) b[2] = 0;
  for (int64_t p = 0; p < P; ++p) {  // equal totals: what a balanced problem needs
    double of_rows = 0, of_cols = 0;
    for (int64_t i = p * N; i < (p + 1) * N; ++i) of_rows += !c.masks || row_mask[size_t(i)] ? a[size_t(i)] : 0;
    for (int64_t j = p * M; j < (p + 1) * M; ++j) of_cols += !c.masks || col_mask[size_t(j)] ? b[size_t(j)] : 0;
    for (int64_t i = p * N; i < (p + 1) * N; ++i) a[size_t(i)] = double(float(a[size_t(i)] / of_rows));
    for (int64_t j = p * M; j < (p + 1) * M; ++j) b[size_t(j)] = double(float(b[size_t(j)] / of_cols));
  }
  const std::vector<double> epsilon(size_t(P), c.epsilon);
  std::vector<int32_t> n_iters(static_cast<size_t>(P));
  std::vector<double> residual(static_cast<size_t>(P));
  SinkhornTask<double> solve{};
  solve.cost = cost.data(), solve.a = a.data(), solve.b = b.data(), solve.epsilon = epsilon.data(), solve.f = f.data();
  solve.g = g.data(), solve.n_iters = n_iters.data(), solve.residual = residual.data(), solve.problems = P, solve.rows = N;
  solve.cols = M, solve.tau_a = c.tau_a, solve.tau_b = c.tau_b, solve.tol = 1e-12, solve.max_iters = 5000;
  solve.row_mask = c.masks ? row_mask.data() : nullptr, solve.col_mask = c.masks ? col_mask.data() : nullptr;
  cpu_sinkhorn(solve, 1);
  const std::vector<float> grad_f = random.uniform<float>(P * N, -1, 1), grad_g = random.uniform<float>(P * M, -1, 1);

  Solved<double> wide{};
  wide.cost = cost.data(), wide.f = f.data(), wide.g = g.data(), wide.a = a.data(), wide.b = b.data(), wide.epsilon = epsilon.data();
  wide.row_mask = solve.row_mask, wide.col_mask = solve.col_mask, wide.problems = P, wide.rows = N, wide.cols = M;
  Results<double> exact(P, N, M);
  cpu_implicit(task_of(c, wide, widened(grad_f), widened(grad_g), exact), 1);

  std::vector<float> arrays[] = {{cost.begin(), cost.end()}, {f.begin(), f.end()}, {g.begin(), g.end()}, {a.begin(), a.end()}, {b.begin(), b.end()}};
  for (size_t k = 0; k < cost.size() && c.masks; ++k) {  // what is masked may hold anything
    const size_t row = k / size_t(M), p = row / size_t(N);
    if (!row_mask[row] || !col_mask[p * size_t(M) + k % size_t(M)]) arrays[0][k] = NAN;
  }
  Solved<float> narrow{};
  narrow.cost = arrays[0].data(), narrow.f = arrays[1].data(), narrow.g = arrays[2].data(), narrow.a = arrays[3].data();
  narrow.b = arrays[4].data(), narrow.epsilon = epsilon.data(), narrow.row_mask = wide.row_mask, narrow.col_mask = wide.col_mask;
  narrow.problems = P, narrow.rows = N, narrow.cols = M;
  Results<float> ours(P, N, M);
  const ImplicitTask<float> task = task_of(c, narrow, grad_f, grad_g, ours);
  CudaCall call{Storage::float32, 0, 0, nullptr};
  const Workspace workspace(cuda_implicit_workspace(task, call));
  call.workspace = workspace.get();
  const std::string name = std::to_string(P) + " x " + std::to_string(N) + " x " + std::to_string(M) + " eps " + std::to_string(c.epsilon) +
                           " tau " + std::to_string(c.tau_a) + ", " + std::to_string(c.tau_b) + (c.masks ? " masks: " : ": ");
  check(cuda_implicit(task, call) == nullptr, name + "no message");
  // Rounding of the float potentials is multiplied by 1 / epsilon, and by how close the system is to singular.
  const double digits = 2e-5 + 1e-6 / c.epsilon;
  const auto same = [&](const char* what, double away) { check(away < digits, name + what, away); };
  same("to cost", relative(ours.cost, exact.cost)), same("to a", relative(ours.a, exact.a)), same("to b", relative(ours.b, exact.b));
  double scale = 0;  // terms of both signs are added up
  for (double x : exact.cost) scale += std::abs(x);
  same("to epsilon", difference(ours.epsilon, exact.epsilon) / (scale / c.epsilon + 1e-30));
  for (uint8_t sound : ours.sound) check(sound == 1, name + "sound");
}

}  // namespace

int main(int argc, char** argv) {
  Random random(seed_of(argc, argv));
  const auto odd = [&](int64_t low, int64_t high) { return low + random.below(high - low + 1); };
  run({2, odd(5, 30), odd(40, 120), 0.1, 0.9, 0.9, true}, random);
  run({1, odd(5, 30), odd(40, 120), 0.1, 1, 1, true}, random);
  run({1, odd(40, 70), odd(5, 30), 0.1, 1, 0.8, true}, random);
  run({1, odd(40, 70), odd(5, 30), 0.2, 1, 1, false}, random);
  run({1, odd(60, 70), odd(71, 90), 0.1, 0.9, 0.7, false}, random);
  run({1, 1, odd(1, 20), 0.1, 0.9, 0.9, false}, random);
  run({1, odd(2, 9), odd(2, 9), 0.01, 0.9, 0.9, false}, random);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
