// Gradient of the potentials at the fixed point: the longer side is eliminated, the system of the shorter one factorised.
//
// With the densities E_ij = exp((f_i + g_j - C_ij) / epsilon), s_i = sum_j E_ij b_j and t_j = sum_i a_i E_ij the two softmax
// matrices are R_ij = E_ij b_j / s_i and Q_ij = a_i E_ij / t_j, and what has to be solved is
//
//   x + Q tau_b y = grad_f,   y + R^T tau_a x = grad_g.
//
// Without y:  x_i - a_i sum_k H_ik (tau_a_k / s_k) x_k = h_i  with  H_ik = sum_j E_ij E_kj tau_b_j b_j / t_j. H is symmetric, and
// x_i = z_i sqrt(a_i s_i / tau_a_i) leaves the symmetric I - D H D with D_i = sqrt(a_i tau_a_i / s_i). Its entries off the
// diagonal are negative and its columns have known sums: the diagonal follows from the others without cancellation,
// however close to singular the system is.
#pragma once
#include "cholesky.h"
#include "density.h"

namespace {

template <class T, class W> struct Implicit {
  static constexpr int TALL = 4, WIDE = 3;        // tile of H
  static constexpr int64_t GROUP = TALL * WIDE;   // rows of one chunk of H
  static constexpr int64_t STRIP = 1024;          // columns that are added up in W
  static constexpr double MOST_CANCELLED = 50;    // inverse of the smallest pivot with which float is enough

  ImplicitTask<T> task;  // of problem p, rows the shorter side
  int64_t p;
  Team* team;
  Density<T, W> d;
  int64_t height, stride;  // rows of E and H with padding; numbers from one row of H to the next, whole vectors
  W* E;                    // [height, padded]; rows from n on are 0
  double* H;               // [height, stride], lower triangle
  double *s, *tau_a, *grad_f[2], *v[2], *z, *rest;  // v = tau_a x. The second right-hand side is the mass's border
  double *t, *tau_b, *grad_g[2], *u[2];             // u = tau_b y
  int32_t* free_row;  // rows whose x is unknown and has influence
  int64_t n_free;
  W *row_factor, *col_factor, *col_other;
  W *sums[RowParts::MOST], *cost_row[RowParts::MOST], *result_row[RowParts::MOST];
  double totals[RowParts::MOST];

  void layout(Arena& arena, int64_t N, int64_t M) {
    d.layout(arena, N, M);
    height = round_up(N, GROUP), stride = round_up(height, LANES<double>);
    const int64_t padded = round_up(M, LANES<W>);
    E = arena.take<W>(height * padded), H = arena.take<double>(height * stride);
    double** of_rows[] = {&s, &tau_a, &grad_f[0], &grad_f[1], &v[0], &v[1], &z, &rest};
    for (double** x : of_rows) *x = arena.take<double>(height);
    double** of_cols[] = {&t, &tau_b, &grad_g[0], &grad_g[1], &u[0], &u[1]};
    for (double** x : of_cols) *x = arena.take<double>(padded);
    free_row = arena.take<int32_t>(N), row_factor = arena.take<W>(height);
    col_factor = arena.take<W>(padded), col_other = arena.take<W>(padded);
    const RowParts chunks(N, M);
    for (int64_t c = 0; c < chunks.count; ++c)
      sums[c] = arena.take<W>(padded), cost_row[c] = arena.take<W>(padded), result_row[c] = arena.take<W>(padded);
  }

  // ---- products with E -------------------------------------------------------------------------------------------------

  double row_product(int64_t i, const W* factor) const { return double(dot(E + i * d.padded, factor, d.padded)); }
  // sum_i factor_i E_ij, added to `sum`, for rows [first, end).
  void add_rows(int64_t first, int64_t end, W* sum) const {
    for (int64_t i = first; i < end; i += 4) {
      const W* e[4];
      Vec<W> x[4];
      for (int r = 0; r < 4; ++r) {  // rows past the end count as row i times 0
        const bool there = i + r < end;
        e[r] = E + (there ? i + r : i) * d.padded, x[r] = splat<W>(there ? row_factor[i + r] : W(0));
      }
      for (int64_t j = 0; j < d.padded; j += LANES<W>)
        store<W>(sum + j, load<W>(sum + j) + ((x[0] * load<W>(e[0] + j) + x[1] * load<W>(e[1] + j)) +
                                              (x[2] * load<W>(e[2] + j) + x[3] * load<W>(e[3] + j))));
    }
  }
  // sum_i row_factor_i E_ij into `total`.
  void col_products(double* total) {
    const RowParts chunks(d.n, d.m);
    for_chunks(team, chunks.count, [&](int64_t c) {
      memset(sums[c], 0, size_t(d.padded) * sizeof(W));
      add_rows(chunks.begin(c), chunks.begin(c + 1), sums[c]);
    });
    add_sums(total);
  }
  void add_sums(double* total) const {
    const RowParts chunks(d.n, d.m);
    for (int64_t j = 0; j < d.padded; ++j) {
      total[j] = double(sums[0][j]);
      for (int64_t c = 1; c < chunks.count; ++c) total[j] += double(sums[c][j]);
    }
  }

  // ---- the system ------------------------------------------------------------------------------------------------------

  // E, s and t. False if W cannot hold them.
  bool build() {
    using R = Traits<W>;
    const RowParts chunks(d.n, d.m);
    for_chunks(team, chunks.count, [&](int64_t c) {
      memset(sums[c], 0, size_t(d.padded) * sizeof(W));
      for (int64_t i = chunks.begin(c); i < chunks.begin(c + 1); ++i) {
        W* e_row = E + i * d.padded;
        d.read_cost(i, cost_row[c]);
        const Vec<W> weight = splat<W>(d.a[i]);
        Vec<W> sum{};
        d.each(i, cost_row[c], [&](int64_t j, Vec<W>, Vec<W> e) {
          store<W>(e_row + j, e);
          sum += e * load<W>(d.b + j);
          store<W>(sums[c] + j, load<W>(sums[c] + j) + weight * e);
        });
        s[i] = double(sum_lanes<W>(sum));
      }
    });
    memset(E + d.n * d.padded, 0, size_t((height - d.n) * d.padded) * sizeof(W));
    add_sums(t);
    bool in_range = true;
    for (int64_t i = 0; i < d.n; ++i) in_range = in_range && s[i] >= double(R::SUM_LOW) && s[i] <= double(R::SUM_HIGH);
    for (int64_t j = 0; j < d.m; ++j) in_range = in_range && t[j] >= double(R::SUM_LOW) && t[j] <= double(R::SUM_HIGH);
    for (int64_t j = d.m; j < d.padded; ++j) t[j] = 1, tau_b[j] = 0, grad_g[0][j] = grad_g[1][j] = 0;
    return in_range;
  }

  void tile(int64_t i, int64_t k, int64_t first, int64_t end) {
    Vec<W> sum[TALL][WIDE] = {};
    const W *ei = E + i * d.padded, *ek = E + k * d.padded;
    for (int64_t j = first; j < end; j += LANES<W>) {
      const Vec<W> weight = load<W>(col_factor + j);
      Vec<W> right[WIDE];
#pragma GCC unroll 4
      for (int c = 0; c < WIDE; ++c) right[c] = weight * load<W>(ek + c * d.padded + j);
#pragma GCC unroll 4
      for (int r = 0; r < TALL; ++r) {
        const Vec<W> left = load<W>(ei + r * d.padded + j);
#pragma GCC unroll 4
        for (int c = 0; c < WIDE; ++c) sum[r][c] += left * right[c];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < TALL; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < WIDE; ++c) H[(i + r) * stride + k + c] += double(sum_lanes<W>(sum[r][c]));
  }
  void form() {
    for (int64_t j = 0; j < d.padded; ++j) col_factor[j] = W(tau_b[j] * double(d.b[j]) / t[j]);
    const int64_t groups = round_up(d.n, GROUP) / GROUP;
    for_chunks(team, groups, [&](int64_t group) {
      const int64_t begin = group * GROUP, last = begin + GROUP;
      for (int64_t i = begin; i < last; ++i) memset(H + i * stride, 0, size_t(last) * sizeof(double));
      for (int64_t first = 0; first < d.padded; first += STRIP) {
        const int64_t end = first + STRIP < d.padded ? first + STRIP : d.padded;
        for (int64_t i = begin; i < last; i += TALL)
          for (int64_t k = 0; k < last; k += WIDE) tile(i, k, first, end);
      }
    });
  }
  // I - D H D over the free rows, factorised. balanced: its null vector sqrt(a s) is lifted, which moves the solution only
  // along a direction in which the gradient does not change. False if the plan nearly falls apart into blocks: the solution is
  // then as large as the inverse of what they exchange, and the terms of the gradient cancel.
  bool factorise(bool balanced) {
    n_free = 0;
    for (int64_t i = 0; i < d.n; ++i) {
      rest[i] = 0;
      if (d.a[i] > 0 && tau_a[i] > 0) free_row[n_free++] = int32_t(i);
    }
    double norm = 0;
    for (int64_t i = 0; i < d.n; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < i; ++k) {
        sum += double(d.a[k]) * H[i * stride + k];
        rest[k] += double(d.a[i]) * H[i * stride + k];
      }
      rest[i] += sum, norm += double(d.a[i]) * s[i];
    }
    // Part of a column's sum that does not stay on the side: 1 - tau_a sum_j R tau_b.
    for (int64_t j = 0; j < d.padded; ++j) col_other[j] = W((1 - tau_b[j]) * double(d.b[j]));
    double *scale = z, *null = v[0];  // D and the null vector, over the free rows
    for (int64_t row = 0; row < n_free; ++row) {
      const int64_t i = free_row[row];
      scale[row] = __builtin_sqrt(double(d.a[i]) * tau_a[i] / s[i]);
      null[row] = balanced ? __builtin_sqrt(double(d.a[i]) * s[i] / norm) : 0.0;
    }
    for (int64_t row = 0; row < n_free; ++row) {
      const int64_t i = free_row[row];
      const double lost = task.exact_mass ? row_product(i, col_other) / s[i] : 1 - task.tau_b;
      for (int64_t col = 0; col < row; ++col)
        H[row * stride + col] = null[row] * null[col] - scale[row] * scale[col] * H[i * stride + free_row[col]];
      H[row * stride + row] = (1 - tau_a[i]) + tau_a[i] * (lost + rest[i] / s[i]) + null[row] * null[row];
    }
    cholesky(H, n_free, stride);
    bool together = true;
    for (int64_t row = 0; row < n_free; ++row) {
      const double inverse_root = H[row * stride + row];  // of the pivot; 0 for a pivot of 0
      together = together && inverse_root > 0 && inverse_root * inverse_root < MOST_CANCELLED;
    }
    return together;
  }
  void solve(int k, bool balanced) {
    // Rows without weight have x = grad_f, which the columns see.
    bool any_known = false;
    double sum = 0, norm = 0;
    for (int64_t i = 0; i < d.n; ++i) {
      v[k][i] = d.a[i] > 0 ? 0.0 : tau_a[i] * grad_f[k][i];
      any_known = any_known || v[k][i] != 0, sum += v[k][i];
      row_factor[i] = W(v[k][i] / s[i]);
    }
    if (any_known) col_products(u[k]);
    else memset(u[k], 0, size_t(d.padded) * sizeof(double));
    for (int64_t j = 0; j < d.padded; ++j)
      col_factor[j] = W(tau_b[j] * (grad_g[k][j] - double(d.b[j]) * u[k][j]) / t[j]);
    for (int64_t row = 0; row < n_free; ++row) {
      const int64_t i = free_row[row];
      const double right = grad_f[k][i] - double(d.a[i]) * row_product(i, col_factor);
      z[row] = right * __builtin_sqrt(tau_a[i] / (double(d.a[i]) * s[i]));
    }
    cholesky_solve(H, n_free, stride, z);
    for (int64_t row = 0; row < n_free; ++row) {
      const int64_t i = free_row[row];
      v[k][i] = z[row] * __builtin_sqrt(double(d.a[i]) * s[i] * tau_a[i]);
      sum += v[k][i], norm += double(d.a[i]) * s[i];
    }
    for (int64_t i = 0; i < d.n; ++i) {
      if (balanced) v[k][i] -= double(d.a[i]) * s[i] * (sum / norm);  // rounding may have grown along the null vector
      row_factor[i] = W(v[k][i] / s[i]);
    }
    col_products(u[k]);
    for (int64_t j = 0; j < d.padded; ++j) u[k][j] = tau_b[j] * (grad_g[k][j] - double(d.b[j]) * u[k][j]);
    if (!balanced) return;
    // Of all solutions the one with sum v = sum u: it treats rows and columns alike, whichever are more.
    double excess = 0, total = 0;
    for (int64_t i = 0; i < d.n; ++i) excess += v[k][i], total += double(d.a[i]) * s[i];
    for (int64_t j = 0; j < d.m; ++j) excess -= u[k][j], total += double(d.b[j]) * t[j];
    excess /= total;
    for (int64_t i = 0; i < d.n; ++i) v[k][i] -= excess * double(d.a[i]) * s[i];
    for (int64_t j = 0; j < d.m; ++j) u[k][j] += excess * double(d.b[j]) * t[j];
  }

  // ---- one problem -----------------------------------------------------------------------------------------------------

  // Exact mass: tau is 0 where the cap on the marginal is slack, which is where the potential is the largest one. Potentials
  // are a cap and half the level, added with the rounding of T.
  static void find_full(const W* potential, int64_t size, double* tau) {
    double top = -__builtin_inf(), largest = 0;
    for (int64_t i = 0; i < size; ++i)
      top = larger(double(potential[i]), top), largest = larger(magnitude(double(potential[i])), largest);
    const double rounding = (sizeof(T) == sizeof(float) ? 0x1p-21 : 0x1p-50) * largest;
    for (int64_t i = 0; i < size; ++i) tau[i] = double(potential[i]) < top - rounding;
  }
  void zero_results() {
    const int64_t N = task.problem.rows, M = task.problem.cols;
    memset(task.a + p * N, 0, size_t(N) * sizeof(T)), memset(task.b + p * M, 0, size_t(M) * sizeof(T));
    task.epsilon[p] = task.mass[p] = 0;
  }
  // Rows of the gradient of the cost that are masked are cleared here, masked columns when a row is written: the gradient may
  // take the place of the cost.
  void zero_masked_rows() {
    const int64_t N = task.problem.rows, M = task.problem.cols;
    for (int64_t i = 0, kept = 0; i < N; ++i) {
      if (kept < d.n && d.row_index[kept] == i) ++kept;
      else memset(task.cost + (p * N + i) * M, 0, size_t(M) * sizeof(T));
    }
  }
  // False if W cannot hold the sums of the plan, or not the terms of the gradient; only rows that are masked are written then.
  bool run() {
    const int64_t N = task.problem.rows, M = task.problem.cols;
    d.begin(task.problem, p);
    gather_values(grad_f[0], task.grad_f + p * N, d.row_index, d.n);
    gather_values(grad_g[0], task.grad_g + p * M, d.col_index, d.m);
    bool asked = false;  // autograd hands zeros on from what does not depend on the potentials
    for (int64_t i = 0; i < d.n; ++i) asked = asked || grad_f[0][i] != 0;
    for (int64_t j = 0; j < d.m; ++j) asked = asked || grad_g[0][j] != 0;
    if (!asked || d.total_a == 0 || d.total_b == 0) {
      zero_results(), memset(task.cost + p * N * M, 0, size_t(N * M) * sizeof(T));
      return true;
    }
    if (!build()) return false;
    zero_results(), zero_masked_rows();
    for (int64_t i = 0; i < d.n; ++i) tau_a[i] = task.tau_a;
    for (int64_t j = 0; j < d.m; ++j) tau_b[j] = task.tau_b;
    if (task.exact_mass) find_full(d.f, d.n, tau_a), find_full(d.g, d.m, tau_b);

    double half = 0, drift = 0, total = 0;
    for (int64_t i = 0; i < d.n; ++i) {
      half += grad_f[0][i] / 2, drift += grad_f[0][i];
      grad_f[1][i] = double(d.a[i]) * s[i], total += grad_f[1][i];
    }
    for (int64_t j = 0; j < d.m; ++j) {
      half += grad_g[0][j] / 2, drift -= grad_g[0][j];
      grad_g[1][j] = double(d.b[j]) * t[j];
    }
    const bool balanced = !task.exact_mass && task.tau_a == 1.0 && task.tau_b == 1.0;
    drift = balanced ? drift / (d.total_a + d.total_b) : 0.0;  // undo the choice sum a f = sum b g
    for (int64_t i = 0; i < d.n; ++i) grad_f[0][i] -= drift * double(d.a[i]);
    for (int64_t j = 0; j < d.m; ++j) grad_g[0][j] += drift * double(d.b[j]);

    form();
    if (!factorise(balanced) && sizeof(W) == sizeof(float)) return false;
    solve(0, balanced);
    double omega = 0;
    if (task.exact_mass) {  // border of the system: sum v + sum u + mass omega = half the sum of both gradients
      solve(1, false);
      for (int64_t i = 0; i < d.n; ++i) half -= v[0][i], total -= v[1][i];
      for (int64_t j = 0; j < d.m; ++j) half -= u[0][j], total -= u[1][j];
      omega = total == 0 ? half : half / total;
      for (int64_t i = 0; i < d.n; ++i) v[0][i] -= omega * v[1][i];
      for (int64_t j = 0; j < d.m; ++j) u[0][j] -= omega * u[1][j];
      task.mass[p] = d.eps * omega;
    }
    write(omega, drift);
    return true;
  }

  // grad_cost = R v + Q u + omega plan, and the sums of it that the other gradients are.
  void write(double omega, double drift) {
    const int64_t N = task.problem.rows, M = task.problem.cols;
    double by_eps = 0;
    for (int64_t i = 0; i < d.n; ++i) {
      by_eps -= v[0][i] * log_of(s[i]);
      row_factor[i] = W(v[0][i] / s[i] + omega * double(d.a[i]));
    }
    Vec<double> logs{};
    for (int64_t j = 0; j < d.padded; j += LANES<double>) logs += load<double>(u[0] + j) * vlog<double>(load<double>(t + j));
    by_eps -= sum_lanes<double>(logs);
    for (int64_t j = 0; j < d.padded; ++j) {
      col_factor[j] = W(u[0][j] / t[j]), col_other[j] = W(u[0][j] / t[j] + omega * double(d.b[j]));
    }
    const RowParts chunks(d.n, d.m);
    for_chunks(team, chunks.count, [&](int64_t c) {
      memset(sums[c], 0, size_t(d.padded) * sizeof(W));
      totals[c] = 0;
      for (int64_t i = chunks.begin(c); i < chunks.begin(c + 1); ++i) {
        d.read_cost(i, cost_row[c]);
        const W* e_row = E + i * d.padded;
        const Vec<W> from_row = splat<W>(row_factor[i]), weight = splat<W>(d.a[i]);
        Vec<W> by_a{}, products{};
        d.each_exponent(i, cost_row[c], [&](int64_t j, Vec<W> x) {
          const Vec<W> e = load<W>(e_row + j), grad = e * (from_row * load<W>(d.b + j) + weight * load<W>(col_factor + j));
          by_a += e * load<W>(col_other + j), products += grad * x;
          store<W>(sums[c] + j, load<W>(sums[c] + j) + e * from_row);
          store<W>(result_row[c] + j, grad);
        });
        const int64_t row = d.row_index[i];
        if (d.col_index != nullptr) memset(task.cost + (p * N + row) * M, 0, size_t(M) * sizeof(T));
        d.write(task.cost + p * N * M, i, result_row[c]);
        task.a[p * N + row] = T(-d.eps * double(sum_lanes<W>(by_a)) - drift * double(d.f[i]));
        totals[c] += double(sum_lanes<W>(products));
      }
    });
    add_sums(t);
    for (int64_t j = 0; j < d.m; ++j)
      task.b[p * M + (d.col_index ? d.col_index[j] : j)] = T(-d.eps * t[j] + drift * double(d.g[j]));
    for (int64_t c = 0; c < chunks.count; ++c) by_eps += totals[c];
    task.epsilon[p] = by_eps;
  }
};

// [rows, cols] -> [cols, rows]
template <class T> void transpose(const T* from, T* to, int64_t rows, int64_t cols) {
  constexpr int64_t SIDE = 16;
  for (int64_t i = 0; i < rows; i += SIDE)
    for (int64_t j = 0; j < cols; j += SIDE)
      for (int64_t x = i; x < i + SIDE && x < rows; ++x)
        for (int64_t y = j; y < j + SIDE && y < cols; ++y) to[y * rows + x] = from[x * cols + y];
}

template <class T> size_t implicit_scratch(const ImplicitTask<T>& task) {
  const int64_t rows = task.problem.rows, cols = task.problem.cols;
  const int64_t shorter = rows < cols ? rows : cols, longer = rows < cols ? cols : rows;
  Arena turned{nullptr};
  if (rows > cols) turned.take<T>(rows * cols);
  Arena narrow = turned, wide = turned;  // T pads its rows further than double does: either may be the larger one
  Implicit<T, T>().layout(narrow, shorter, longer);
  Implicit<T, double>().layout(wide, shorter, longer);
  return narrow.used > wide.used ? narrow.used : wide.used;
}

template <class T, class W> bool implicit_in(const ImplicitTask<T>& task, int64_t p, Arena arena, Team* team) {
  Implicit<T, W> work;
  work.layout(arena, task.problem.rows, task.problem.cols);
  work.task = task, work.p = p, work.team = team;
  return work.run();
}

template <class T> void implicit_one(const ImplicitTask<T>& task, int64_t p, char* memory, Team* team) {
  Arena arena{memory};
  ImplicitTask<T> local = task;
  const int64_t N = task.problem.rows, M = task.problem.cols;
  const bool turn = N > M;  // then the columns are eliminated, in a transposed copy
  T* turned = nullptr;
  if (turn) {
    const Solved<T>& given = task.problem;
    turned = arena.take<T>(N * M);
    transpose(given.cost + p * N * M, turned, N, M);
    local.problem = {turned, given.g + p * M, given.f + p * N, given.b + p * M, given.a + p * N, given.epsilon + p,
                     given.col_mask ? given.col_mask + p * M : nullptr, given.row_mask ? given.row_mask + p * N : nullptr,
                     1, M, N};
    local.tau_a = task.tau_b, local.tau_b = task.tau_a;
    local.grad_f = task.grad_g + p * M, local.grad_g = task.grad_f + p * N;
    local.cost = turned, local.a = task.b + p * M, local.b = task.a + p * N;
    local.epsilon = task.epsilon + p, local.mass = task.mass + p;
  }
  const int64_t q = turn ? 0 : p;
  bool sound = implicit_in<T, T>(local, q, arena, team);
  if constexpr (sizeof(T) == sizeof(float)) sound = sound || implicit_in<T, double>(local, q, arena, team);
  task.sound[p] = sound;
  if (turn && sound) transpose(turned, task.cost + p * N * M, M, N);
}

}  // namespace
