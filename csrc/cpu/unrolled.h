// Gradient through the iterations that ran, by recomputing them: each keeps its potentials, none keeps a matrix.
//
// An iteration takes g to soft_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon), to f by damping or by the exact mass, to
// the columns' soft_j from f in the same way, and to the next g. With E_ij = exp((soft_i + g_j - C_ij) / epsilon) the softmax
// matrices of both halves are
//
//   R_ij = E_ij b_j,   Q_ij = a_i phi_i E_ij theta_j   with  phi_i = exp((f_i - soft_i) / epsilon),
//                                                            theta_j = exp((soft_j - g_j) / epsilon),
//
// so that an iteration costs one exponential an element in each direction.
#pragma once
#include "density.h"

namespace {

template <class T> struct Unrolled {
  using R = Traits<T>;

  const UnrolledTask<T>* task;
  int64_t p, count;  // iterations
  Team* team;
  bool exact_mass;
  double mass;
  Density<T, T> d;   // d.f holds soft of the rows, d.g the column potentials that an iteration starts from
  T *C, *cost_bar;   // [n, padded]
  T* E;              // exact mass only, [n, padded]: all rows are needed before the second half
  // After iteration k: soft of the rows and of the columns, the levels of the mass. `start` is g before the first.
  T *soft_rows, *soft_cols, *start;
  double *row_levels, *col_levels;
  double start_level;
  T *f, *phi, *theta, *col_factor;
  double *a_bar, *b_bar, *f_bar, *g_bar, *row_bar, *col_bar;
  double eps_bar, mass_bar;
  T *sums[RowParts::MOST], *row_buffer[RowParts::MOST];
  double totals[RowParts::MOST];
  State<T> saturation;  // what find_level reads

  void layout(Arena& arena, int64_t N, int64_t M, int64_t iterations, bool with_mass) {
    d.layout(arena, N, M);
    const int64_t padded = round_up(M, LANES<T>), padded_rows = round_up(N, LANES<T>);
    C = arena.take<T>(N * padded), cost_bar = arena.take<T>(N * padded), E = arena.take<T>(with_mass ? N * padded : 0);
    soft_rows = arena.take<T>(iterations * N), soft_cols = arena.take<T>((iterations + 1) * padded);
    start = arena.take<T>(padded);
    row_levels = arena.take<double>(iterations), col_levels = arena.take<double>(iterations + 1);
    f = arena.take<T>(padded_rows), phi = arena.take<T>(padded_rows);
    theta = arena.take<T>(padded), col_factor = arena.take<T>(padded);
    double** of_rows[] = {&a_bar, &f_bar, &row_bar, &saturation.rows.soft, &saturation.rows.mass_weight,
                          &saturation.rows.open};
    for (double** x : of_rows) *x = arena.take<double>(padded_rows);
    double** of_cols[] = {&b_bar, &g_bar, &col_bar, &saturation.cols.soft, &saturation.cols.mass_weight,
                          &saturation.cols.open};
    for (double** x : of_cols) *x = arena.take<double>(padded);
    const RowParts chunks(N, M);
    for (int64_t c = 0; c < chunks.count; ++c) sums[c] = arena.take<T>(padded), row_buffer[c] = arena.take<T>(padded);
  }

  T* soft_row(int64_t k) const { return soft_rows + k * d.n; }
  T* soft_col(int64_t k) const { return soft_cols + k * d.padded; }
  T potential(T soft, double damping, double level) const {
    if (!exact_mass) return T(damping * double(soft));
    const double cap = double(soft) - level;
    return T(cap < 0 ? cap : 0.0);
  }
  // Column potentials before iteration k, padding included.
  void begin_columns(int64_t k) {
    for (int64_t j = 0; j < d.m; ++j) d.g[j] = k == 0 ? start[j] : potential(soft_col(k - 1)[j], task->tau_b, col_levels[k - 1]);
  }

  // ---- forward ---------------------------------------------------------------------------------------------------------

  // Level of one side's exact mass from its soft potentials.
  double level(Side<T>& side, const T* soft, const T* weight, int64_t size) {
    side.padded = round_up(size, LANES<double>);
    for (int64_t i = 0; i < side.padded; ++i) {
      side.soft[i] = i < size ? -double(soft[i]) / d.eps : 0.0;
      side.mass_weight[i] = i < size ? double(weight[i]) : 0.0;
    }
    saturation.eps = d.eps, saturation.mass = mass;
    return saturation.level = find_level(saturation, side) * d.eps;
  }
  // Densities of row i into `e`, and their sum with the weights of the columns.
  T fill_row(int64_t i, T* e) const {
    Vec<T> sum{};
    d.each(i, C + i * d.padded, [&](int64_t j, Vec<T>, Vec<T> x) {
      store<T>(e + j, x);
      sum += x * load<T>(d.b + j);
    });
    return sum_lanes<T>(sum);
  }
  // The soft minimum's lower bound, min_j C_ij - g_j: exponents from it are at most 0.
  T lowest(int64_t i) const {
    Vec<T> low = splat<T>(T(__builtin_inf()));
    for (int64_t j = 0; j < d.padded; j += LANES<T>) low = vmin<T>(load<T>(C + i * d.padded + j) - load<T>(d.g + j), low);
    return min_lanes<T>(low);
  }
  static bool in_range(T sum) { return sum >= R::SUM_LOW && sum <= R::SUM_HIGH; }

  // soft of the columns at potentials f of the rows, without any reference.
  bool log_columns(T* soft) {
    for (int64_t j = 0; j < d.padded; j += LANES<T>) {
      Vec<T> low = splat<T>(T(__builtin_inf())), sum{};
      for (int64_t i = 0; i < d.n; ++i) low = vmin<T>(load<T>(C + i * d.padded + j) - splat<T>(f[i]), low);
      for (int64_t i = 0; i < d.n; ++i)
        sum += splat<T>(d.a[i]) * vexp<T>(((splat<T>(f[i]) + low) - load<T>(C + i * d.padded + j)) * splat<T>(d.inv_eps));
      for (int k = 0; k < LANES<T>; ++k) soft[j + k] = T(double(low[k]) - d.eps * log_of(double(sum[k])));
    }
    bool sound = true;
    for (int64_t j = 0; j < d.m; ++j) sound = sound && finite(soft[j]);
    for (int64_t j = d.m; j < d.padded; ++j) soft[j] = -T(__builtin_inf());
    return sound;
  }
  // Iteration k from the column potentials in d.g. False if something is not finite.
  bool iterate(int64_t k) {
    const RowParts chunks(d.n, d.m);
    T *rows = soft_row(k), *cols = soft_col(k);
    const auto finish_row = [&](int64_t c, int64_t i, const T* e) {  // f_i is known: add its part of the columns' sums
      phi[i] = T(exp_of((double(f[i]) - double(d.f[i])) / d.eps));
      const Vec<T> factor = splat<T>(d.a[i] * phi[i]);
      for (int64_t j = 0; j < d.padded; j += LANES<T>)
        store<T>(sums[c] + j, load<T>(sums[c] + j) + factor * load<T>(e + j));
    };
    for_chunks(team, chunks.count, [&](int64_t c) {
      memset(sums[c], 0, size_t(d.padded) * sizeof(T));
      for (int64_t i = chunks.begin(c); i < chunks.begin(c + 1); ++i) {
        T* e = exact_mass ? E + i * d.padded : row_buffer[c];
        d.f[i] = k > 0 ? soft_row(k - 1)[i] : lowest(i);
        T sum = fill_row(i, e);
        if (k > 0 && !in_range(sum)) d.f[i] = lowest(i), sum = fill_row(i, e);
        rows[i] = T(double(d.f[i]) - d.eps * log_of(double(sum)));
        if (exact_mass) continue;
        f[i] = potential(rows[i], task->tau_a, 0.0);
        finish_row(c, i, e);
      }
    });
    if (exact_mass) {
      row_levels[k] = level(saturation.rows, rows, d.a, d.n);
      for_chunks(team, chunks.count, [&](int64_t c) {
        for (int64_t i = chunks.begin(c); i < chunks.begin(c + 1); ++i) {
          f[i] = potential(rows[i], 1.0, row_levels[k]);
          finish_row(c, i, E + i * d.padded);
        }
      });
    }
    bool sound = true, plain = true;
    for (int64_t i = 0; i < d.n; ++i) sound = sound && finite(rows[i]), plain = plain && phi[i] <= R::SUM_HIGH;
    double* logs = saturation.cols.soft;  // free until the level is sought
    for (int64_t j = 0; j < d.padded; ++j) {
      T total = sums[0][j];
      for (int64_t c = 1; c < chunks.count; ++c) total += sums[c][j];
      if (j >= d.m) total = 1;
      plain = plain && in_range(total);
      logs[j] = double(total);
    }
    for (int64_t j = 0; j < d.padded; j += LANES<double>) store<double>(logs + j, vlog<double>(load<double>(logs + j)));
    for (int64_t j = 0; j < d.padded; ++j) cols[j] = T(double(d.g[j]) - d.eps * logs[j]);  // -inf in the padding
    if (!plain) sound = log_columns(cols) && sound;
    col_levels[k] = exact_mass ? level(saturation.cols, cols, d.b, d.m) : 0.0;
    return sound;
  }

  // ---- backward --------------------------------------------------------------------------------------------------------

  // Gradient with respect to soft from the one with respect to the capped potential (in place) and the level:
  // min(soft - level, 0) follows soft where the marginal is full, and the level moves with the entries that are not.
  void unsaturate(double* bar, double level_bar, const T* soft, const T* weight, double level, int64_t size, double* weight_bar) {
    double open = 0, full_bar = 0, products = 0;
    const auto fill_exponent = [&](int64_t i) { return (level - double(soft[i])) / d.eps; };
    for (int64_t i = 0; i < size; ++i) {
      const double x = fill_exponent(i);
      if (x > 0) full_bar += bar[i];
      else open += double(weight[i]) * exp_of(x), products += double(weight[i]) * exp_of(x) * x;
    }
    const double pull = level_bar - full_bar, per_mass = open > 0 ? pull * d.eps / open : 0.0;
    for (int64_t i = 0; i < size; ++i) {
      const double x = fill_exponent(i);
      weight_bar[i] -= per_mass * (x > 0 ? 1.0 : exp_of(x));
      if (!(x > 0)) bar[i] = open > 0 ? pull * double(weight[i]) * exp_of(x) / open : 0.0;
    }
    mass_bar += per_mass;
    if (open > 0) eps_bar += pull * products / open;
  }
  // Through the second half of iteration k and then the first. f_bar and g_bar: with respect to what it ended with; g_bar becomes
  // the gradient with respect to what it began with.
  void backward(int64_t k, double level_bar) {
    const RowParts chunks(d.n, d.m);
    const T *rows = soft_row(k), *cols = soft_col(k);
    begin_columns(k);
    for (int64_t j = 0; j < d.m; ++j) col_bar[j] = exact_mass ? g_bar[j] : task->tau_b * g_bar[j];
    if (exact_mass) unsaturate(col_bar, level_bar, cols, d.b, col_levels[k], d.m, b_bar);
    bool factored = true;  // else Q has its own exponentials
    for (int64_t i = 0; i < d.n; ++i) {
      d.f[i] = rows[i], f[i] = potential(rows[i], task->tau_a, row_levels[k]);
      phi[i] = T(exp_of((double(f[i]) - double(rows[i])) / d.eps));
      factored = factored && in_range(phi[i]);
    }
    double* moved = saturation.cols.soft;  // (soft_j - g_j) / epsilon
    const double inv_eps = 1 / d.eps;
    for (int64_t j = 0; j < d.padded; ++j) moved[j] = j < d.m ? (double(cols[j]) - double(d.g[j])) * inv_eps : 0.0;
    for (int64_t j = 0; j < d.padded; j += LANES<double>) {
      const Vec<double> e = vexp<double>(load<double>(moved + j));
      for (int k = 0; k < LANES<double>; ++k) theta[j + k] = T(e[k]);
    }
    for (int64_t j = 0; j < d.m; ++j) factored = factored && in_range(theta[j]);
    for (int64_t j = 0; j < d.padded; ++j) col_factor[j] = j < d.m ? T(col_bar[j]) * (factored ? theta[j] : T(1)) : T(0);

    // q_i = sum_j Q_ij col_bar_j
    const auto pull_row = [&](int64_t i, T* e) {
      fill_row(i, e);
      const double q = factored ? double(phi[i]) * double(dot(e, col_factor, d.padded)) : own_q(i, cols);
      a_bar[i] -= d.eps * q;
      row_bar[i] = f_bar[i] - double(d.a[i]) * q;
      if (!exact_mass) row_bar[i] *= task->tau_a;
    };
    // Contributions of row i to the gradient of the cost, and their sum with the exponents.
    const auto push_row = [&](int64_t c, int64_t i, const T* e) {
      const Vec<T> by_row = splat<T>(T(row_bar[i])), by_col = splat<T>(factored ? d.a[i] * phi[i] : T(0));
      T* to = cost_bar + i * d.padded;
      Vec<T> row_products{}, col_products{}, col_total{};
      d.each_exponent(i, C + i * d.padded, [&](int64_t j, Vec<T> x) {
        const Vec<T> density = load<T>(e + j), r = density * by_row, q = density * by_col * load<T>(col_factor + j);
        const Vec<T> r_weighted = r * load<T>(d.b + j);
        store<T>(sums[c] + j, load<T>(sums[c] + j) + r);
        store<T>(to + j, load<T>(to + j) + (r_weighted + q));
        row_products += r_weighted * x, col_products += q * x, col_total += q;
      });
      totals[c] += double(sum_lanes<T>(row_products)) + double(sum_lanes<T>(col_products));
      if (factored) totals[c] += double(sum_lanes<T>(col_total)) * (double(f[i]) - double(rows[i])) / d.eps;
      else totals[c] += own_push(i, cols);
    };
    for_chunks(team, chunks.count, [&](int64_t c) {
      totals[c] = 0;
      memset(sums[c], 0, size_t(d.padded) * sizeof(T));
      for (int64_t i = chunks.begin(c); i < chunks.begin(c + 1); ++i) {
        T* e = exact_mass ? E + i * d.padded : row_buffer[c];
        pull_row(i, e);
        if (!exact_mass) push_row(c, i, e);
      }
    });
    if (exact_mass) {
      unsaturate(row_bar, 0.0, rows, d.a, row_levels[k], d.n, a_bar);
      for_chunks(team, chunks.count, [&](int64_t c) {
        for (int64_t i = chunks.begin(c); i < chunks.begin(c + 1); ++i) push_row(c, i, E + i * d.padded);
      });
    }
    for (int64_t c = 0; c < chunks.count; ++c) eps_bar += totals[c];
    for (int64_t j = 0; j < d.m; ++j) {
      double total = 0;
      for (int64_t c = 0; c < chunks.count; ++c) total += double(sums[c][j]);
      if (factored) eps_bar += col_bar[j] * moved[j];  // a column of Q sums to 1
      b_bar[j] -= d.eps * total, g_bar[j] = -double(d.b[j]) * total;
    }
    for (int64_t i = 0; i < d.n; ++i) f_bar[i] = 0;
  }
  // The same for a column update whose matrix shares nothing: the exponents are (f_i + soft_j - C_ij) / epsilon.
  template <class Visit> void own(int64_t i, const T* cols, Visit&& visit) const {
    for (int64_t j = 0; j < d.padded; j += LANES<T>) {
      const Vec<T> x = ((splat<T>(f[i]) + load<T>(cols + j)) - load<T>(C + i * d.padded + j)) * splat<T>(d.inv_eps);
      const Vec<T> kept = at_least<T>(splat<T>(2 * R::EXP_LOW), x);
      visit(j, kept, density<T>(kept) * load<T>(col_factor + j));
    }
  }
  double own_q(int64_t i, const T* cols) const {
    Vec<T> sum{};
    own(i, cols, [&](int64_t, Vec<T>, Vec<T> q) { sum += q; });
    return double(sum_lanes<T>(sum));
  }
  double own_push(int64_t i, const T* cols) const {
    Vec<T> products{};
    const Vec<T> weight = splat<T>(d.a[i]);
    T* to = cost_bar + i * d.padded;
    own(i, cols, [&](int64_t j, Vec<T> x, Vec<T> q) {
      store<T>(to + j, load<T>(to + j) + weight * q);
      products += weight * q * x;
    });
    return double(sum_lanes<T>(products));
  }

  // ---- one problem -----------------------------------------------------------------------------------------------------

  bool run() {
    d.begin(task->problem, p);
    mass = exact_mass ? task->mass[p] : 0.0, count = task->n_iters[p];
    bool asked = false;  // autograd hands zeros on from what does not depend on the potentials
    const T *grad_f = task->grad_f + p * task->problem.rows, *grad_g = task->grad_g + p * task->problem.cols;
    for (int64_t i = 0; i < d.n; ++i) asked = asked || grad_f[d.row_index[i]] != 0;
    for (int64_t j = 0; j < d.m; ++j) asked = asked || grad_g[d.col_index ? d.col_index[j] : j] != 0;
    const bool alive = asked && !(d.total_a == 0 || d.total_b == 0);
    const bool given_f = task->problem.f != nullptr, given_g = task->problem.g != nullptr;
    bool sound = true;
    for (int64_t i = 0; i < d.n && alive; ++i) sound = sound && d.a[i] > 0;
    for (int64_t j = 0; j < d.m && alive; ++j) sound = sound && d.b[j] > 0;
    if (!sound) return false;
    if (alive) {
      for (int64_t i = 0; i < d.n; ++i) {
        d.read_cost(i, C + i * d.padded);
        a_bar[i] = f_bar[i] = 0, f[i] = given_f ? d.f[i] : T(0);
      }
      for (int64_t j = 0; j < d.padded; ++j) start[j] = given_g && j < d.m ? d.g[j] : T(0), b_bar[j] = g_bar[j] = 0;
      if (!prepare(given_f, given_g)) return false;
      for (int64_t k = 0; k < count; ++k) {
        begin_columns(k);
        if (!iterate(k)) return false;
      }
      differentiate(given_f, given_g);
    }
    write(alive);
    return true;
  }
  // The potentials before the first iteration.
  bool prepare(bool given_f, bool given_g) {
    for (int64_t j = 0; j < d.m; ++j) d.g[j] = start[j];
    saturation.level = 0;
    if (exact_mass) {  // each given potential's maximum is its half of the level
      T top_f = -T(__builtin_inf()), top_g = top_f;
      for (int64_t i = 0; i < d.n; ++i) top_f = larger(f[i], top_f);
      for (int64_t j = 0; j < d.m; ++j) top_g = larger(start[j], top_g);
      for (int64_t i = 0; i < d.n; ++i) f[i] -= top_f;
      for (int64_t j = 0; j < d.m; ++j) start[j] -= top_g;
      saturation.level = double(top_f) + double(top_g);
    }
    if (!given_f || given_g) return true;
    // One column update comes before the first iteration.
    T* soft = soft_col(task->most_iters);
    if (!log_columns(soft)) return false;
    start_level = exact_mass ? level(saturation.cols, soft, d.b, d.m) : 0.0;
    for (int64_t j = 0; j < d.m; ++j) start[j] = potential(soft[j], task->tau_b, start_level);
    return true;
  }
  void differentiate(bool given_f, bool given_g) {
    const int64_t N = task->problem.rows, M = task->problem.cols;
    gather_values(f_bar, task->grad_f + p * N, d.row_index, d.n), gather_values(g_bar, task->grad_g + p * M, d.col_index, d.m);
    eps_bar = mass_bar = 0;
    memset(cost_bar, 0, size_t(d.n * d.padded) * sizeof(T));
    double level_bar = 0, of_rows = 0, of_cols = 0;
    for (int64_t i = 0; i < d.n; ++i) of_rows += f_bar[i];
    for (int64_t j = 0; j < d.m; ++j) of_cols += g_bar[j];
    if (exact_mass) {
      level_bar = (of_rows + of_cols) / 2;
    } else if (task->tau_a == 1.0 && task->tau_b == 1.0 && count > 0) {  // f - shift, g + shift with sum a f = sum b g
      const T *rows = soft_row(count - 1), *cols = soft_col(count - 1);
      const double total = d.total_a + d.total_b, pull = (of_cols - of_rows) / total;
      double shift = 0;
      for (int64_t i = 0; i < d.n; ++i) shift += double(d.a[i]) * double(rows[i]) / total;
      for (int64_t j = 0; j < d.m; ++j) shift -= double(d.b[j]) * double(cols[j]) / total;
      for (int64_t i = 0; i < d.n; ++i) a_bar[i] += pull * (double(rows[i]) - shift), f_bar[i] += pull * double(d.a[i]);
      for (int64_t j = 0; j < d.m; ++j) b_bar[j] -= pull * (double(cols[j]) + shift), g_bar[j] -= pull * double(d.b[j]);
    }
    for (int64_t k = count - 1; k >= 0; --k) {
      backward(k, level_bar);
      level_bar = 0;
    }
    if (!given_f || given_g) return;
    // The column update before the first iteration.
    for (int64_t i = 0; i < d.n; ++i) f[i] = task->problem.f[p * N + d.row_index[i]];
    const T* soft = soft_col(task->most_iters);
    if (exact_mass) {
      T top = -T(__builtin_inf());
      for (int64_t i = 0; i < d.n; ++i) top = larger(f[i], top);
      for (int64_t i = 0; i < d.n; ++i) f[i] -= top;
    }
    for (int64_t j = 0; j < d.m; ++j) col_bar[j] = exact_mass ? g_bar[j] : task->tau_b * g_bar[j];
    if (exact_mass) unsaturate(col_bar, 0.0, soft, d.b, start_level, d.m, b_bar);
    for (int64_t j = 0; j < d.padded; ++j) col_factor[j] = j < d.m ? T(col_bar[j]) : T(0);
    for (int64_t i = 0; i < d.n; ++i) {
      const double q = own_q(i, soft);
      a_bar[i] -= d.eps * q, f_bar[i] = -double(d.a[i]) * q, eps_bar += own_push(i, soft);
    }
  }
  void write(bool alive) {
    const int64_t N = task->problem.rows, M = task->problem.cols;
    T *rows[] = {task->a, task->f}, *cols[] = {task->b, task->g};
    const double *row_values[] = {a_bar, f_bar}, *col_values[] = {b_bar, g_bar};
    for (int k = 0; k < 2; ++k) {
      if (rows[k]) memset(rows[k] + p * N, 0, size_t(N) * sizeof(T));
      if (cols[k]) memset(cols[k] + p * M, 0, size_t(M) * sizeof(T));
      if (alive && rows[k]) scatter_values(rows[k] + p * N, row_values[k], d.row_index, d.n);
      if (alive && cols[k]) scatter_values(cols[k] + p * M, col_values[k], d.col_index, d.m);
    }
    task->epsilon[p] = alive ? eps_bar : 0.0, task->to_mass[p] = alive ? mass_bar : 0.0;
    T* to = task->cost + p * N * M;
    if (!alive || d.n < N || d.m < M) memset(to, 0, size_t(N * M) * sizeof(T));
    for (int64_t i = 0; alive && i < d.n; ++i) d.write(to, i, cost_bar + i * d.padded);
  }
};

template <class T> size_t unrolled_scratch(const UnrolledTask<T>& task) {
  Arena count{nullptr};
  Unrolled<T> work;
  work.layout(count, task.problem.rows, task.problem.cols, task.most_iters, true);
  return count.used;
}

template <class T> void unrolled_one(const UnrolledTask<T>& task, int64_t p, char* memory, Team* team) {
  Arena arena{memory};
  Unrolled<T> work;
  work.exact_mass = task.mass != nullptr;
  work.layout(arena, task.problem.rows, task.problem.cols, task.most_iters, work.exact_mass);
  work.task = &task, work.p = p, work.team = team;
  task.sound[p] = work.run();
}

}  // namespace
