// Problems between point clouds, emulated, against the CPU kernels in double: log-sums, solves, a cloud against itself.
#include "check.h"

using namespace pk;
using namespace pk::test;

namespace {

struct Case {
  int64_t problems, rows, cols, dim;
  double epsilon, tau_a, tau_b;
  bool squared, masks, warm_f, warm_g;
  Precision precision;
  double tol = 0;
  int max_iters = 8;
};

double digits_of(Precision precision) {  // of a potential, in units of the largest cost
  return precision == Precision::float32 ? 1e-5 : precision == Precision::tf32 ? 2e-3 : 2e-2;
}

template <class T> struct Clouds {
  std::vector<T> x, y, a, b, f_init, g_init, f, g, residual;
  std::vector<double> epsilon;
  std::vector<int32_t> n_iters;
  std::vector<uint8_t> row_mask, col_mask;

  PointsTask<T> task(const Case& c) {
    PointsTask<T> task{};
    f.assign(size_t(c.problems * c.rows), T(NAN)), g.assign(size_t(c.problems * c.cols), T(NAN));
    n_iters.assign(size_t(c.problems), -1), residual.assign(size_t(c.problems), T(NAN));
    task.x = x.data(), task.y = y.data(), task.a = a.data(), task.b = b.data(), task.epsilon = epsilon.data();
    task.row_mask = c.masks ? row_mask.data() : nullptr, task.col_mask = c.masks ? col_mask.data() : nullptr;
    task.f_init = c.warm_f ? f_init.data() : nullptr, task.g_init = c.warm_g ? g_init.data() : nullptr;
    task.f = f.data(), task.g = g.data(), task.n_iters = n_iters.data(), task.residual = residual.data();
    task.problems = c.problems, task.rows = c.rows, task.cols = c.cols, task.dim = c.dim, task.threads = 1;
    task.tau_a = c.tau_a, task.tau_b = c.tau_b, task.tol = c.tol, task.max_iters = c.max_iters, task.squared = c.squared;
    task.precision = c.precision;
    return task;
  }
};

Clouds<float> draw(const Case& c, Random& random) {
  Clouds<float> in;
  in.x = random.uniform<float>(c.problems * c.rows * c.dim, -1, 1), in.y = random.uniform<float>(c.problems * c.cols * c.dim, -1, 1);
  for (std::vector<float>* points : {&in.x, &in.y})
    for (size_t i = 0; i < points->size() / size_t(c.dim); ++i) {  // cosine: of length 1. Squared distance: costs of some units
      double squared = 0;
      for (size_t d = 0; d < size_t(c.dim); ++d) squared += double((*points)[i * size_t(c.dim) + d]) * double((*points)[i * size_t(c.dim) + d]);
      const double scale = 1 / std::sqrt(c.squared ? double(c.dim) / 3 : squared);
      for (size_t d = 0; d < size_t(c.dim); ++d) (*points)[i * size_t(c.dim) + d] *= float(scale);
    }
  in.a = random.uniform<float>(c.problems * c.rows, 0.5, 1.5), in.b = random.uniform<float>(c.problems * c.cols, 0.5, 1.5);
  in.f_init = random.uniform<float>(c.problems * c.rows, -0.1, 0.1), in.g_init = random.uniform<float>(c.problems * c.cols, -0.1, 0.1);
  in.epsilon.assign(size_t(c.problems), c.epsilon);
  for (int64_t i = 0; i < c.problems * c.rows; ++i) in.row_mask.push_back(random.uniform() < 0.8 || i % c.rows == 0);
  for (int64_t j = 0; j < c.problems * c.cols; ++j) in.col_mask.push_back(random.uniform() < 0.8 || j % c.cols == 0);
  if (c.rows > 2) in.a[1] = 0;  // an entry without weight still has a potential
  for (int64_t p = 0; p < c.problems; ++p) {  // equal totals: what a balanced problem needs
    double rows = 0, cols = 0;
    for (int64_t i = p * c.rows; i < (p + 1) * c.rows; ++i) rows += !c.masks || in.row_mask[size_t(i)] ? in.a[size_t(i)] : 0;
    for (int64_t j = p * c.cols; j < (p + 1) * c.cols; ++j) cols += !c.masks || in.col_mask[size_t(j)] ? in.b[size_t(j)] : 0;
    for (int64_t i = p * c.rows; i < (p + 1) * c.rows; ++i) in.a[size_t(i)] = float(in.a[size_t(i)] / rows);
    for (int64_t j = p * c.cols; j < (p + 1) * c.cols; ++j) in.b[size_t(j)] = float(in.b[size_t(j)] / cols);
  }
  return in;
}
Clouds<double> in_double(const Clouds<float>& in) {
  Clouds<double> out;
  out.x = widened(in.x), out.y = widened(in.y), out.a = widened(in.a), out.b = widened(in.b), out.f_init = widened(in.f_init);
  out.g_init = widened(in.g_init), out.epsilon = in.epsilon, out.row_mask = in.row_mask, out.col_mask = in.col_mask;
  return out;
}

std::string name_of(const Case& c, const char* what) {
  char text[200];
  std::snprintf(text, sizeof text, "%s %d x %d x %d x %d eps %g tau %g, %g%s%s%s%s precision %d", what, int(c.problems), int(c.rows),
                int(c.cols), int(c.dim), c.epsilon, c.tau_a, c.tau_b, c.squared ? "" : " cosine", c.masks ? " masks" : "",
                c.warm_f ? " f" : "", c.warm_g ? " g" : "", int(c.precision));
  return text;
}
const char* with_workspace(const PointsTask<float>& task, const char* (*run)(const PointsTask<float>&, const CudaCall&)) {
  CudaCall call{Storage::float32, 0, 0, nullptr};
  const Workspace workspace(cuda_points_workspace(task, call));
  call.workspace = workspace.get();
  return run(task, call);
}

void solve(const Case& c, Random& random) {
  Clouds<float> in = draw(c, random);
  Clouds<double> exact = in_double(in);
  for (size_t i = 0; i < in.row_mask.size() && c.masks; ++i)  // what is masked may hold anything
    if (!in.row_mask[i]) in.x[i * size_t(c.dim)] = in.f_init[i] = NAN;
  cpu_points_solve(exact.task(c));
  const std::string name = name_of(c, "solve");
  check(with_workspace(in.task(c), cuda_points_solve) == nullptr, name + ": no message");
  const double away = std::max(difference(in.f, exact.f), difference(in.g, exact.g));
  check(away < 4 * digits_of(c.precision), name + ": potentials", away);
  if (c.tol == 0) check(in.n_iters == exact.n_iters, name + ": iterations");
  for (size_t p = 0; p < in.residual.size() && c.tol > 0; ++p) check(in.residual[p] < c.tol && in.n_iters[p] < c.max_iters, name + ": converged", in.residual[p]);
}

void self(const Case& c, Random& random, float last_weight = 1) {
  Clouds<float> in = draw(c, random);
  in.a[size_t(c.rows - 1)] *= last_weight;
  Clouds<double> exact = in_double(in);
  PointsTask<double> want = exact.task(c);
  want.y = want.b = nullptr, want.col_mask = nullptr, want.f_init = want.g_init = nullptr, want.g = nullptr, want.cols = c.rows;
  cpu_points_self(want);
  PointsTask<float> task = in.task(c);
  task.y = task.b = nullptr, task.col_mask = nullptr, task.f_init = task.g_init = nullptr, task.g = nullptr, task.cols = c.rows;
  const std::string name = name_of(c, "self");
  check(with_workspace(task, cuda_points_self) == nullptr, name + ": no message");
  const double away = difference(in.f, exact.f);
  check(away < 4 * digits_of(c.precision), name + ": potential", away);
  if (c.tol == 0) check(in.n_iters == exact.n_iters, name + ": iterations");
}

void transform(const Case& c, Random& random) {
  Clouds<float> in = draw(c, random);
  for (float& x : in.b) x = x > 0 ? std::log(x) : -INFINITY;
  if (c.cols > 3) in.b[3] = -INFINITY;
  Clouds<double> exact = in_double(in);
  const auto as_transform = [](auto task) {
    task.a = nullptr, task.g = nullptr, task.n_iters = nullptr, task.residual = nullptr, task.f_init = nullptr;
    task.row_mask = task.col_mask = nullptr;
    return task;
  };
  cpu_points_transform(as_transform(exact.task(c)));
  const std::string name = name_of(c, "log-sum");
  check(with_workspace(as_transform(in.task(c)), cuda_points_transform) == nullptr, name + ": no message");
  const double away = difference(in.f, exact.f);
  check(away < 4 * digits_of(c.precision), name + ": potential", away);
}

void product(const Case& c, int64_t width, int64_t factors, Random& random) {
  const Clouds<float> in = draw(c, random);
  const int64_t P = c.problems;
  const std::vector<float> row = random.uniform<float>(P * c.rows, -1, 1), col = random.uniform<float>(P * c.cols, -1, 1);
  const std::vector<float> right = random.uniform<float>(P * c.cols * width, -1, 1), left = random.uniform<float>(P * c.rows * factors, -1, 1);
  const std::vector<float> right_factor = random.uniform<float>(P * c.cols * factors, -1, 1);
  std::vector<float> out(size_t(P * c.rows * width), NAN);
  const std::vector<double> wide[] = {widened(in.x), widened(in.y), widened(row), widened(col), widened(right), widened(left), widened(right_factor)};
  std::vector<double> exact(out.size());
  const PointsProductTask<float> task{in.x.data(), in.y.data(), row.data(), col.data(), in.epsilon.data(), right.data(),
                                      factors ? left.data() : nullptr, factors ? right_factor.data() : nullptr, out.data(), P, c.rows,
                                      c.cols, c.dim, width, factors, 1, c.squared};
  const PointsProductTask<double> want{wide[0].data(), wide[1].data(), wide[2].data(), wide[3].data(), in.epsilon.data(), wide[4].data(),
                                       factors ? wide[5].data() : nullptr, factors ? wide[6].data() : nullptr, exact.data(), P, c.rows,
                                       c.cols, c.dim, width, factors, 1, c.squared};
  cpu_points_product(want);
  check(cuda_points_product(task, CudaCall{Storage::float32, 0, 0, nullptr}) == nullptr, name_of(c, "product") + ": no message");
  double largest = 0;
  for (double x : exact) largest = std::max(largest, std::abs(x));
  const double away = difference(out, exact) / largest;
  check(away < 1e-5, name_of(c, "product"), away);
}

void report_what_is_not_finite(Random& random) {
  const Case c{3, 5, 9, 4, 0.1, 1, 1, true, false, false, false, Precision::float32};
  Clouds<float> in = draw(c, random);
  in.x[2] = INFINITY;                                               // problem 0
  for (int64_t i = 0; i < c.rows; ++i) in.a[size_t(c.rows + i)] = 0;  // problem 1: nothing to transport
  check(with_workspace(in.task(c), cuda_points_solve) == nullptr, "not finite: no message");
  check(std::isnan(in.f[0]) && std::isnan(in.residual[0]) && in.n_iters[0] == 0, "an infinite point gives NaN");
  check(in.f[size_t(c.rows)] == 0 && in.residual[1] == 0 && in.n_iters[1] == 0, "no weight gives zeros");
  check(std::isfinite(in.f[size_t(2 * c.rows)]) && in.n_iters[2] == c.max_iters, "the others are solved");
}

}  // namespace

int main(int argc, char** argv) {
  const char* device = getenv("PK_DEVICE");
  if (device != nullptr && std::string(device).rfind("tiny", 0) == 0) setenv("PK_DEVICE", "small", 1);  // a tile wants more than tiny
  Random random(seed_of(argc, argv));
  const auto odd = [&](int64_t low, int64_t high) { return low + random.below(high - low + 1); };
  using P = Precision;
  for (const P precision : {P::float32, P::tf32, P::bf16}) {
    transform({1, odd(3, 150), odd(3, 200), odd(3, 80), 0.1, 1, 1, true, false, false, true, precision}, random);
    solve({1, odd(3, 140), odd(130, 200), odd(3, 70), 0.2, 0.9, 0.8, precision != P::tf32, true, false, false, precision, 0, 4}, random);
  }
  transform({1, odd(3, 40), odd(3, 90), odd(200, 700), 0.1, 1, 1, true, false, false, true, P::float32}, random);
  solve({2, odd(3, 40), odd(3, 40), odd(3, 20), 0.05, 1, 1, true, true, false, false, P::float32}, random);
  solve({1, odd(3, 40), odd(3, 40), odd(3, 20), 0.002, 0.9, 0.9, false, false, true, false, P::float32}, random);
  solve({2, odd(9, 40), odd(9, 40), odd(3, 9), 0.001, 0.5, 0.5, true, false, false, false, P::float32, 0, 5}, random);  // far moves
  solve({1, odd(3, 40), odd(3, 40), odd(3, 20), 0.05, 1, 0.9, true, false, true, true, P::float32}, random);
  solve({2, odd(9, 40), odd(9, 40), odd(3, 20), 0.2, 0.9, 0.9, true, false, false, false, P::float32, 1e-3, 200}, random);
  self({2, odd(3, 140), 1, odd(3, 40), 0.1, 0.9, 0.9, true, true, false, false, P::float32}, random);
  self({2, odd(9, 20), 1, 9, 0.002, 1, 1, true, false, false, false, P::float32, 0, 3}, random, 1e-36f);  // one moves far
  self({1, odd(3, 40), 1, odd(3, 40), 0.05, 1, 1, false, false, false, false, P::bf16}, random);
  product({2, odd(3, 90), odd(3, 90), odd(3, 40), 0.5, 1, 1, true, false, false, false, P::float32}, odd(1, 140), 0, random);
  product({1, odd(3, 40), odd(60, 90), odd(3, 40), 0.5, 1, 1, false, false, false, false, P::float32}, odd(1, 8), odd(1, 20), random);
  report_what_is_not_finite(random);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
