// Laws of the compiled CPU kernels without Python: for compilers, sanitizers and processors that the Python tests do not reach.
//
// For every instruction set that can run here: solutions satisfy their fixed-point equations (recomputed in long double),
// float agrees with double, and one, two and three threads give the same bits. Prints a line a check; exits 1 if one fails.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/api.h"

namespace {

int failures = 0;

void check(const std::string& what, bool passed, double value) {
  std::printf("%s %s (%.3g)\n", passed ? "ok  " : "FAIL", what.c_str(), value);
  if (!passed) ++failures;
}

class Random {  // a 64-bit linear congruential generator: the same numbers everywhere
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 1) {}
  double uniform() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return double(state_ >> 11) / 9007199254740992.0;
  }

 private:
  uint64_t state_;
};

struct Shape {
  int64_t problems, rows, cols;
  double epsilon, tau, mass;  // mass 0: none
  bool anderson;
  std::string name() const {
    std::ostringstream text;
    text << problems << "x" << rows << "x" << cols << " eps " << epsilon << " tau " << tau << " mass " << mass
         << (anderson ? " anderson" : "");
    return text.str();
  }
};

template <class T> struct Solved {
  std::vector<T> f, g, residual;
  std::vector<int32_t> n_iters;
};

template <class T> struct Problem {
  std::vector<T> cost, a, b;
  std::vector<double> epsilon, mass;
  Shape shape;

  explicit Problem(const Shape& s) : shape(s) {
    Random random(uint64_t(s.rows * 31 + s.cols));
    for (int64_t k = 0; k < s.problems * s.rows * s.cols; ++k) cost.push_back(T(float(random.uniform())));
    fill(a, s.rows, random), fill(b, s.cols, random);
    epsilon.assign(size_t(s.problems), s.epsilon), mass.assign(size_t(s.problems), s.mass);
  }
  void fill(std::vector<T>& weights, int64_t count, Random& random) const {
    for (int64_t p = 0; p < shape.problems; ++p) {
      double total = 0;
      std::vector<double> raw;
      for (int64_t k = 0; k < count; ++k) raw.push_back(0.5 + random.uniform()), total += raw.back();
      for (double w : raw) weights.push_back(T(w / total));
    }
  }
  Solved<T> solve(int threads) const {
    Solved<T> out;
    out.f.resize(a.size()), out.g.resize(b.size());
    out.residual.resize(size_t(shape.problems)), out.n_iters.resize(size_t(shape.problems));
    pk::SinkhornTask<T> task{};
    task.cost = cost.data(), task.a = a.data(), task.b = b.data(), task.epsilon = epsilon.data();
    task.mass = shape.mass > 0 ? mass.data() : nullptr;
    task.f = out.f.data(), task.g = out.g.data(), task.n_iters = out.n_iters.data(), task.residual = out.residual.data();
    task.problems = shape.problems, task.rows = shape.rows, task.cols = shape.cols;
    task.tau_a = task.tau_b = shape.tau, task.tol = sizeof(T) == 4 ? 1e-5 : 1e-11, task.max_iters = 5000;
    task.anderson = shape.anderson;
    pk::cpu_sinkhorn(task, threads);
    return out;
  }
  // Largest violation, in units of epsilon, of f = -epsilon tau log sum_j b exp((g - C) / epsilon), or with a mass of the
  // marginals' bounds and total.
  double violation(const Solved<T>& s) const {
    using Long = long double;
    double worst = 0;
    for (int64_t p = 0; p < shape.problems; ++p) {
      const T *f = &s.f[size_t(p * shape.rows)], *g = &s.g[size_t(p * shape.cols)], *c = &cost[size_t(p * shape.rows * shape.cols)];
      const T *wa = &a[size_t(p * shape.rows)], *wb = &b[size_t(p * shape.cols)];
      std::vector<Long> row(size_t(shape.rows), 0), col(size_t(shape.cols), 0);
      Long total = 0;
      for (int64_t i = 0; i < shape.rows; ++i)
        for (int64_t j = 0; j < shape.cols; ++j) {
          const Long density = std::exp((Long(f[i]) + g[j] - c[i * shape.cols + j]) / Long(shape.epsilon));
          row[size_t(i)] += density * wb[j], col[size_t(j)] += density * wa[i], total += density * wa[i] * wb[j];
        }
      const Long rest = shape.tau == 1.0 ? 0 : (1 - Long(shape.tau)) / Long(shape.tau) / Long(shape.epsilon);
      const auto see = [&](Long sum, Long potential) {
        const Long log_sum = std::log(sum);
        if (shape.mass > 0) worst = std::fmax(worst, double(log_sum));  // at most the marginal
        else worst = std::fmax(worst, double(std::fabs(log_sum + rest * potential)));
      };
      for (int64_t i = 0; i < shape.rows; ++i) see(row[size_t(i)], f[i]);
      for (int64_t j = 0; j < shape.cols; ++j) see(col[size_t(j)], g[j]);
      if (shape.mass > 0) worst = std::fmax(worst, double(std::fabs(std::log(total / shape.mass))));
    }
    return worst;
  }
};

template <class T> bool same_bits(const std::vector<T>& x, const std::vector<T>& y) {
  return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
}

template <class T> Solved<T> check_solve(const Shape& shape, const std::string& where, double tolerance) {
  const Problem<T> problem(shape);
  const Solved<T> one = problem.solve(1);
  const double violation = problem.violation(one);
  const std::string what = where + (sizeof(T) == 4 ? " float " : " double ") + shape.name();
  check(what + ": fixed point", violation < tolerance, violation);
  for (int threads : {2, 3}) {
    const Solved<T> more = problem.solve(threads);
    const bool same = same_bits(one.f, more.f) && same_bits(one.g, more.g) && one.n_iters == more.n_iters;
    check(what + ": threads", same, threads);
  }
  return one;
}

// A sample of two heads: every cost lies in [0, 1] and reaches both, refined attention sums to one in every row, and its
// gradient along a constant is nothing, whatever the number of threads.
void check_attention(const std::string& where) {
  const int64_t rows = 7, cols = 61, heads = 2, dim = 33;
  Random random(5);
  const auto fill = [&](int64_t count, double low, double high) {
    std::vector<float> values;
    for (int64_t k = 0; k < count; ++k) values.push_back(float(low + (high - low) * random.uniform()));
    return values;
  };
  const auto text = fill(rows * dim, -1, 1), video = fill(cols * dim, -1, 1), positions = fill(2 * cols, 0, 1);
  const auto attention = fill(heads * rows * cols, 0, 2.0 / double(cols));
  std::vector<float> frame, cost(attention.size()), refined(cost.size()), ones(cost.size(), 1.0f), gradient(cost.size());
  for (int64_t j = 0; j < cols; ++j) frame.push_back(float(j / 16));
  pk::AttentionTask<float> task{};
  pk::CostTask<float>& shape = task.cost;
  shape.text = text.data(), shape.video = video.data(), shape.attention = attention.data(), shape.frame = frame.data();
  shape.positions = positions.data(), shape.gamma = 0.2f, shape.place_weight = 0.14f, shape.normalize = true;
  shape.samples = 1, shape.heads = heads, shape.rows = rows, shape.cols = cols, shape.dim = dim, shape.cost = cost.data();
  task.epsilon = 0.05, task.tau = 0.9, task.tol = 1e-3, task.max_iters = 200, task.refined = refined.data();
  pk::FusionGradientTask<float> back{ones.data(), attention.data(), refined.data(), nullptr, 1, heads, rows, cols, gradient.data()};
  for (int threads : {1, 2}) {
    pk::cpu_token_cost(shape, threads);
    for (int64_t h = 0; h < heads; ++h) {
      float low = 2, high = -1;
      for (int64_t k = 0; k < rows * cols; ++k) {
        const float c = cost[size_t(h * rows * cols + k)];
        low = std::fmin(low, c), high = std::fmax(high, c);
      }
      check(where + " token cost range", low == 0.0f && high == 1.0f, double(high - low));
    }
    pk::cpu_transport_attention(task, threads);
    pk::cpu_fusion_gradient(back, threads);
    double worst = 0, slope = 0;
    for (int64_t i = 0; i < heads * rows; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < cols; ++j) sum += double(refined[size_t(i * cols + j)]);
      worst = std::fmax(worst, std::fabs(sum - 1));
    }
    for (float g : gradient) slope = std::fmax(slope, std::fabs(double(g)));
    check(where + " attention rows sum to one", worst < 1e-5, worst);
    check(where + " gradient along a constant", slope < 1e-3, slope);
  }
}

// The implicit gradient of sum(f): along a constant added to the cost it is d sum(f) / dc, the same for any number of threads.
void check_implicit(const std::string& where) {
  const Shape shape{1, 130, 1111, 0.05, 0.95, 0, false};
  const Problem<double> problem(shape);
  const Solved<double> solved = problem.solve(1);
  const size_t entries = problem.cost.size();
  std::vector<double> grad_f(problem.a.size(), 1.0), grad_g(problem.b.size(), 0.0), to_a(problem.a.size()), to_b(problem.b.size());
  std::vector<double> to_epsilon(1), to_mass(1), results[3];
  uint8_t sound = 0;
  for (int threads : {1, 2, 3}) {
    std::vector<double>& to_cost = results[threads - 1];
    to_cost.resize(entries);
    pk::ImplicitTask<double> task{};
    task.problem = {problem.cost.data(), solved.f.data(), solved.g.data(), problem.a.data(), problem.b.data(),
                    problem.epsilon.data(), nullptr, nullptr, 1, shape.rows, shape.cols};
    task.tau_a = task.tau_b = shape.tau, task.grad_f = grad_f.data(), task.grad_g = grad_g.data();
    task.cost = to_cost.data(), task.a = to_a.data(), task.b = to_b.data();
    task.epsilon = to_epsilon.data(), task.mass = to_mass.data(), task.sound = &sound;
    pk::cpu_implicit(task, threads);
  }
  double total = 0;
  for (double g : results[0]) total += g;
  // f = tau (c - mean of g) and g = tau (c - mean of f) for a shift c of the cost: both move by tau c / (1 + tau).
  const double expected = double(shape.rows) * shape.tau / (1 + shape.tau);
  check(where + " implicit gradient along a constant", sound == 1 && std::fabs(total / expected - 1) < 1e-8, total / expected);
  check(where + " implicit gradient: threads", same_bits(results[0], results[1]) && same_bits(results[0], results[2]), 3);
}

// Point clouds: the streamed solve and the dense one of the same cost have the same potentials.
void check_points(const std::string& where) {
  const int64_t rows = 43, cols = 71, dim = 5;
  Random random(9);
  std::vector<double> x, y, cost, a(size_t(rows), 1.0 / double(rows)), b(size_t(cols), 1.0 / double(cols)), epsilon{0.1};
  for (int64_t k = 0; k < rows * dim; ++k) x.push_back(random.uniform() - 0.5);
  for (int64_t k = 0; k < cols * dim; ++k) y.push_back(random.uniform() - 0.5);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < dim; ++k) sum += std::pow(x[size_t(i * dim + k)] - y[size_t(j * dim + k)], 2);
      cost.push_back(sum);
    }
  std::vector<double> f[2], g[2], residual(1);
  std::vector<int32_t> n_iters(1);
  for (int way = 0; way < 2; ++way) f[way].resize(size_t(rows)), g[way].resize(size_t(cols));
  pk::SinkhornTask<double> dense{};
  dense.cost = cost.data(), dense.a = a.data(), dense.b = b.data(), dense.epsilon = epsilon.data();
  dense.f = f[0].data(), dense.g = g[0].data(), dense.n_iters = n_iters.data(), dense.residual = residual.data();
  dense.problems = 1, dense.rows = rows, dense.cols = cols, dense.tau_a = dense.tau_b = 1, dense.tol = 1e-12, dense.max_iters = 5000;
  pk::cpu_sinkhorn(dense, 1);
  pk::PointsTask<double> points{};
  points.x = x.data(), points.y = y.data(), points.a = a.data(), points.b = b.data(), points.epsilon = epsilon.data();
  points.f = f[1].data(), points.g = g[1].data(), points.n_iters = n_iters.data(), points.residual = residual.data();
  points.problems = 1, points.rows = rows, points.cols = cols, points.dim = dim, points.tau_a = points.tau_b = 1;
  points.tol = 1e-12, points.max_iters = 5000, points.threads = 2, points.squared = true;
  pk::cpu_points_solve(points);
  double worst = 0;
  for (size_t i = 0; i < f[0].size(); ++i) worst = std::fmax(worst, std::fabs(f[0][i] - f[1][i]));
  for (size_t j = 0; j < g[0].size(); ++j) worst = std::fmax(worst, std::fabs(g[0][j] - g[1][j]));
  check(where + " points as dense", worst < 1e-10, worst);
}

}  // namespace

int main() {
  const std::vector<Shape> shapes = {
      {3, 5, 7, 0.1, 1.0, 0, false},    {5, 40, 257, 0.05, 0.9, 0, false}, {2, 33, 65, 0.01, 1.0, 0, true},
      {3, 20, 31, 0.05, 1.0, 0.7, false}, {2, 9, 300, 0.002, 0.8, 0, false}, {1, 130, 1111, 0.05, 0.95, 0, false},
  };
  std::istringstream names(pk::cpu_instruction_sets());
  for (std::string name; names >> name;) {
    if (pk::cpu_use(name.c_str()) == nullptr) check(name + " can be chosen", false, 0);
    for (const Shape& shape : shapes) {
      const auto single = check_solve<float>(shape, name, 2e-4 * 0.05 / shape.epsilon + 2e-5 / (1.001 - shape.tau));
      const auto exact = check_solve<double>(shape, name, 2e-8);
      double worst = 0;
      for (size_t k = 0; k < exact.f.size(); ++k) worst = std::fmax(worst, std::fabs(double(single.f[k]) - exact.f[k]));
      check(name + " float against double " + shape.name(), worst < 2e-3 * shape.epsilon / (1.002 - shape.tau), worst);
    }
    check_attention(name), check_implicit(name), check_points(name);
  }
  std::printf("%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
