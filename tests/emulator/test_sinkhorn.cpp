// The dense CUDA solve, emulated, against the CPU kernel in double: teams of every kind, masks, warm starts, small epsilon.
#include "check.h"

#include <sstream>

using namespace pk;
using namespace pk::test;

namespace {

struct Case {
  int64_t problems, rows, cols;
  double epsilon, tau_a, tau_b;
  bool masks, warm_f, warm_g;
  double offset;  // added to a cost in [0, 1]
  Storage storage;
  double tol = 0;
  int max_iters = 40;
  double mass = 0;  // share of the smaller total; 0: not given
};

template <class T> struct Inputs {
  std::vector<T> cost, a, b, f_init, g_init, f, g, residual;
  std::vector<double> epsilon, mass;
  std::vector<int32_t> n_iters;
  std::vector<uint8_t> row_mask, col_mask;

  SinkhornTask<T> task(const Case& c) {
    SinkhornTask<T> task{};
    f.assign(size_t(c.problems * c.rows), T(NAN)), g.assign(size_t(c.problems * c.cols), T(NAN));
    n_iters.assign(size_t(c.problems), -1), residual.assign(size_t(c.problems), T(NAN));
    task.cost = cost.data(), task.a = a.data(), task.b = b.data(), task.epsilon = epsilon.data();
    task.mass = mass.empty() ? nullptr : mass.data();
    task.row_mask = c.masks ? row_mask.data() : nullptr, task.col_mask = c.masks ? col_mask.data() : nullptr;
    task.f_init = c.warm_f ? f_init.data() : nullptr, task.g_init = c.warm_g ? g_init.data() : nullptr;
    task.f = f.data(), task.g = g.data(), task.n_iters = n_iters.data(), task.residual = residual.data();
    task.problems = c.problems, task.rows = c.rows, task.cols = c.cols;
    task.tau_a = c.tau_a, task.tau_b = c.tau_b, task.tol = c.tol, task.max_iters = c.max_iters;
    return task;
  }
};

// Weights of equal totals on both sides: what a balanced problem needs.
void even_out(const Case& c, Inputs<float>& in) {
  for (int64_t p = 0; p < c.problems; ++p) {
    double rows = 0, cols = 0;
    for (int64_t i = 0; i < c.rows; ++i) rows += !c.masks || in.row_mask[size_t(p * c.rows + i)] ? in.a[size_t(p * c.rows + i)] : 0;
    for (int64_t j = 0; j < c.cols; ++j) cols += !c.masks || in.col_mask[size_t(p * c.cols + j)] ? in.b[size_t(p * c.cols + j)] : 0;
    for (int64_t j = 0; j < c.cols; ++j)
      if (cols > 0) in.b[size_t(p * c.cols + j)] *= float(rows / cols);
  }
}

Inputs<float> draw(const Case& c, Random& random) {
  Inputs<float> in;
  in.cost = random.uniform<float>(c.problems * c.rows * c.cols, c.offset, c.offset + 1);
  in.cost = rounded(in.cost, c.storage);
  in.a = random.uniform<float>(c.problems * c.rows, 0.5 / double(c.rows), 1.5 / double(c.rows));
  in.b = random.uniform<float>(c.problems * c.cols, 0.5 / double(c.cols), 1.5 / double(c.cols));
  in.f_init = random.uniform<float>(c.problems * c.rows, -0.1, 0.1), in.g_init = random.uniform<float>(c.problems * c.cols, -0.1, 0.1);
  in.epsilon.assign(size_t(c.problems), c.epsilon);
  for (int64_t i = 0; i < c.problems * c.rows; ++i) in.row_mask.push_back(random.uniform() < 0.8 || i % c.rows == 0);
  for (int64_t j = 0; j < c.problems * c.cols; ++j) in.col_mask.push_back(random.uniform() < 0.8 || j % c.cols == 0);
  if (c.rows > 2) in.a[1] = 0;  // an entry without weight still has a potential
  if (c.cols > 2) in.b[2] = 0;
  even_out(c, in);
  for (int64_t p = 0; p < c.problems && c.mass > 0; ++p) {
    double total = 0;
    for (int64_t i = 0; i < c.rows; ++i) total += !c.masks || in.row_mask[size_t(p * c.rows + i)] ? in.a[size_t(p * c.rows + i)] : 0;
    in.mass.push_back(c.mass * total);
  }
  return in;
}

void run(const Case& c, Random& random) {
  Inputs<float> in = draw(c, random);
  Inputs<double> exact;
  exact.cost = widened(in.cost), exact.a = widened(in.a), exact.b = widened(in.b), exact.f_init = widened(in.f_init);
  exact.g_init = widened(in.g_init), exact.epsilon = in.epsilon, exact.mass = in.mass, exact.row_mask = in.row_mask, exact.col_mask = in.col_mask;
  for (size_t k = 0; k < in.cost.size() && c.masks; ++k) {  // what is masked may hold anything
    const size_t row = k / size_t(c.cols), p = row / size_t(c.rows);
    if (!in.row_mask[row] || !in.col_mask[p * size_t(c.cols) + k % size_t(c.cols)]) in.cost[k] = NAN;
  }
  SinkhornTask<float> task = in.task(c);
  const std::vector<uint16_t> half = c.storage == Storage::float32 ? std::vector<uint16_t>() : packed(in.cost, c.storage);
  if (!half.empty()) task.cost = reinterpret_cast<const float*>(half.data());
  CudaCall call{c.storage, 0, 0, nullptr};
  const Workspace workspace(cuda_sinkhorn_workspace(task, call));
  call.workspace = workspace.get();
  const char* message = cuda_sinkhorn(task, call);
  cpu_sinkhorn(exact.task(c), 1);
  std::ostringstream name;
  name << c.problems << " x " << c.rows << " x " << c.cols << " eps " << c.epsilon << " tau " << c.tau_a << ", " << c.tau_b
       << (c.masks ? " masks" : "") << (c.warm_f ? " f" : "") << (c.warm_g ? " g" : "") << " offset " << c.offset << " storage "
       << int(c.storage) << " mass " << c.mass;
  check(message == nullptr, name.str() + ": no message");
  // float carries a cost of this size with so many digits
  const double digits = 1e-5 + 1e-6 * std::abs(c.offset);
  const double away = std::max(difference(in.f, exact.f), difference(in.g, exact.g));
  check(away < digits, name.str() + ": potentials", away);
  if (c.tol == 0) check(in.n_iters == exact.n_iters, name.str() + ": iterations");
  for (size_t p = 0; p < in.residual.size() && c.tol > 0; ++p) check(in.residual[p] < c.tol, name.str() + ": converged", in.residual[p]);
}

void refuse_what_is_not_finite(Random& random) {
  const Case c{3, 5, 9, 0.05, 1, 1, false, false, false, 0, Storage::float32};
  Inputs<float> in = draw(c, random);
  in.cost[7] = INFINITY;                                        // problem 0
  for (int64_t i = 0; i < c.rows; ++i) in.a[size_t(c.rows + i)] = 0;  // problem 1: nothing to transport
  SinkhornTask<float> task = in.task(c);
  const CudaCall call{c.storage, 0, 0, nullptr};
  check(cuda_sinkhorn(task, call) == nullptr, "not finite: no message");
  check(std::isnan(in.f[0]) && std::isnan(in.residual[0]) && in.n_iters[0] == 0, "an infinite cost gives NaN");
  check(in.f[size_t(c.rows)] == 0 && in.residual[1] == 0 && in.n_iters[1] == 0, "no weight gives zeros");
  check(std::isfinite(in.f[size_t(2 * c.rows)]) && in.n_iters[2] > 0, "the others are solved");
}

}  // namespace

int main(int argc, char** argv) {
  Random random(seed_of(argc, argv));
  const auto odd = [&](int64_t low, int64_t high) { return low + random.below(high - low + 1); };
  using S = Storage;
  run({2, odd(1, 16), odd(60, 200), 0.05, 0.9, 0.9, false, false, false, 0, S::float32}, random);
  run({1, odd(17, 32), odd(60, 200), 0.01, 1, 1, true, false, false, 0, S::float32}, random);
  run({1, odd(33, 40), odd(200, 420), 0.005, 0.9, 0.9, true, false, false, 0, S::bfloat16}, random);
  run({1, odd(41, 70), odd(60, 150), 0.02, 1, 0.7, true, false, false, 0, S::float16}, random);
  run({1, odd(41, 70), odd(300, 420), 0.05, 0.9, 0.9, false, false, false, 0, S::float32, 0, 12}, random);
  run({1, odd(8, 40), odd(60, 150), 0.001, 0.9, 0.9, false, false, false, 0, S::float32}, random);
  run({1, odd(8, 40), odd(60, 150), 0.002, 1, 1, true, true, false, 0, S::float32}, random);
  run({1, odd(8, 40), odd(60, 150), 0.05, 1, 1, false, true, true, 3, S::float32}, random);
  run({1, odd(8, 40), odd(60, 150), 0.05, 0.5, 0.9, false, false, true, -40, S::float32}, random);
  run({2, 1, odd(1, 40), 0.05, 1, 1, false, false, false, 0, S::float32}, random);
  run({2, odd(1, 40), 1, 0.05, 0.9, 0.9, false, false, false, 0, S::float32}, random);
  run({1, 11, 90, 0.05, 0.9, 0.9, true, false, false, 0, S::float32, 1e-4, 400}, random);
  run({1, 20, 60, 0.05, 1, 1, false, false, false, 0, S::float32, 0, 130}, random);
  run({2, odd(8, 40), odd(60, 150), 0.05, 1, 1, true, false, false, 0, S::float32, 0, 30, 0.6}, random);
  run({1, odd(8, 40), odd(60, 150), 0.01, 1, 1, false, true, true, 0, S::float32, 0, 30, 0.9}, random);
  run({1, odd(41, 60), odd(60, 90), 0.05, 1, 1, false, true, false, 0, S::bfloat16, 0, 20, 0.3}, random);
  refuse_what_is_not_finite(random);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
