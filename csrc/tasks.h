// From Python's description of a task (addresses and sizes) to the structs of api.h.
#pragma once
#include <pybind11/pybind11.h>

#include "api.h"

namespace {

namespace py = pybind11;

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// The fields of a task in its order, from a tuple: half the time of a dict by name, which small problems notice.
class Fields {
 public:
  explicit Fields(const py::tuple& values) : values_(values) {}
  template <class X> void read(X& field) { field = values_[next_++].cast<X>(); }
  template <class X> void read(X*& field) { field = at<X>(values_[next_++].cast<uintptr_t>()); }
  template <class First, class Second, class... Rest> void read(First& first, Second& second, Rest&... rest) {
    read(first), read(second, rest...);
  }

 private:
  const py::tuple& values_;
  size_t next_ = 0;
};

template <class T> pk::SinkhornTask<T> sinkhorn_task(const py::tuple& values) {
  pk::SinkhornTask<T> task{};
  Fields(values).read(task.cost, task.a, task.b, task.epsilon, task.mass, task.row_mask, task.col_mask, task.f_init,
                      task.g_init, task.f, task.g, task.n_iters, task.residual, task.problems, task.rows, task.cols,
                      task.tau_a, task.tau_b, task.tol, task.max_iters, task.anderson);
  return task;
}

// The fields of a task by name, from a dict.
class Named {
 public:
  explicit Named(const py::dict& values) : values_(values) {}
  template <class X> void read(const char* name, X& field) const { field = values_[name].cast<X>(); }
  template <class X> void read(const char* name, X*& field) const { field = at<X>(values_[name].cast<uintptr_t>()); }
  template <class X, class... Rest> void read(const char* name, X& field, const char* next, Rest&&... rest) const {
    read(name, field), read(next, rest...);
  }

 private:
  const py::dict& values_;
};

template <class T> void read(const Named& from, pk::CostTask<T>& task) {
  from.read("text", task.text, "video", task.video, "attention", task.attention, "frame", task.frame);
  from.read("positions", task.positions, "row_mask", task.row_mask, "col_mask", task.col_mask, "cost", task.cost);
  from.read("samples", task.samples, "heads", task.heads, "rows", task.rows, "cols", task.cols, "dim", task.dim);
  from.read("gamma", task.gamma, "place_weight", task.place_weight, "normalize", task.normalize);
}
template <class T> void read(const Named& from, pk::CostGradientTask<T>& task) {
  read(from, task.cost);
  from.read("grad", task.grad, "grad_text", task.text, "grad_video", task.video, "grad_attention", task.attention);
  from.read("grad_cosine", task.cosine);
}
template <class T> void read(const Named& from, pk::AttentionTask<T>& task) {
  read(from, task.cost);
  from.read("epsilon", task.epsilon, "tau", task.tau, "mass", task.mass, "tol", task.tol, "max_iters", task.max_iters);
  from.read("refined", task.refined, "plan", task.plan);
}
template <class T> void read(const Named& from, pk::FusionGradientTask<T>& task) {
  from.read("grad", task.grad, "attention", task.attention, "refined", task.refined, "row_mask", task.row_mask);
  from.read("samples", task.samples, "heads", task.heads, "rows", task.rows, "cols", task.cols, "result", task.result);
}

template <class T> void read(const Named& from, pk::Solved<T>& problem) {
  from.read("cost", problem.cost, "f", problem.f, "g", problem.g, "a", problem.a, "b", problem.b);
  from.read("epsilon", problem.epsilon, "row_mask", problem.row_mask, "col_mask", problem.col_mask);
  from.read("problems", problem.problems, "rows", problem.rows, "cols", problem.cols);
}
template <class T> void read(const Named& from, pk::PlanTask<T>& task) {
  read(from, task.problem);
  from.read("logarithm", task.logarithm, "plan", task.plan);
}
template <class T> void read(const Named& from, pk::PlanSumsTask<T>& task) {
  read(from, task.problem);
  from.read("row_sums", task.rows, "col_sums", task.cols, "energy", task.energy);
}
template <class T> void read(const Named& from, pk::PlanBackwardTask<T>& task) {
  read(from, task.problem);
  from.read("grad_plan", task.grad_plan, "grad_rows", task.grad_rows, "grad_cols", task.grad_cols);
  from.read("grad_energy", task.grad_energy, "to_cost", task.cost, "to_f", task.f, "to_g", task.g);
  from.read("to_a", task.a, "to_b", task.b, "to_epsilon", task.epsilon);
}
template <class T> void read(const Named& from, pk::ImplicitTask<T>& task) {
  read(from, task.problem);
  from.read("tau_a", task.tau_a, "tau_b", task.tau_b, "exact_mass", task.exact_mass);
  from.read("grad_f", task.grad_f, "grad_g", task.grad_g, "to_cost", task.cost, "to_a", task.a, "to_b", task.b);
  from.read("to_epsilon", task.epsilon, "to_mass", task.mass, "sound", task.sound);
}
template <class T> void read(const Named& from, pk::UnrolledTask<T>& task) {
  read(from, task.problem);
  from.read("mass", task.mass, "n_iters", task.n_iters, "most_iters", task.most_iters);
  from.read("tau_a", task.tau_a, "tau_b", task.tau_b, "grad_f", task.grad_f, "grad_g", task.grad_g);
  from.read("to_cost", task.cost, "to_a", task.a, "to_b", task.b, "to_f", task.f, "to_g", task.g);
  from.read("to_epsilon", task.epsilon, "to_mass", task.to_mass, "sound", task.sound);
}

template <class T> void read(const Named& from, pk::PointsTask<T>& task) {
  from.read("x", task.x, "y", task.y, "a", task.a, "b", task.b, "epsilon", task.epsilon, "mass", task.mass);
  from.read("row_mask", task.row_mask, "col_mask", task.col_mask, "f_init", task.f_init, "g_init", task.g_init);
  from.read("f", task.f, "g", task.g, "n_iters", task.n_iters, "residual", task.residual);
  from.read("problems", task.problems, "rows", task.rows, "cols", task.cols, "dim", task.dim, "threads", task.threads);
  from.read("tau_a", task.tau_a, "tau_b", task.tau_b, "tol", task.tol, "max_iters", task.max_iters);
  int precision = 0;
  from.read("squared", task.squared, "anderson", task.anderson, "precision", precision);
  task.precision = pk::Precision(precision);
}
template <class T> void read(const Named& from, pk::PointsProductTask<T>& task) {
  from.read("x", task.x, "y", task.y, "row", task.row, "col", task.col, "epsilon", task.epsilon);
  from.read("right", task.right, "left", task.left, "right_factor", task.right_factor, "out", task.out);
  from.read("problems", task.problems, "rows", task.rows, "cols", task.cols, "dim", task.dim, "threads", task.threads);
  from.read("width", task.width, "factors", task.factors, "squared", task.squared);
}

}  // namespace
