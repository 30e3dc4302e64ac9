// Python bindings: addresses and sizes in, launchers out. No framework is known here; the Python adapters check shapes.
#include <stdexcept>
#include <string>
#include <tuple>

#include "tasks.h"

namespace {

// An operation whose task comes as a dict.
template <class Task> void bind_task(py::module_& m, const std::string& name, void (*run)(const Task&, int)) {
  m.def(name.c_str(), [run](const py::dict& values, int threads) {
    Task task{};
    read(Named(values), task);
    py::gil_scoped_release release;
    run(task, threads);
  });
}
template <class Task> void bind_task(py::module_& m, const std::string& name, void (*run)(const Task&)) {
  m.def(name.c_str(), [run](const py::dict& values, int) {  // their threads are in the task
    Task task{};
    read(Named(values), task);
    py::gil_scoped_release release;
    run(task);
  });
}

template <class T> void bind_cpu(py::module_& m, const std::string& suffix) {
  m.def(("cpu_sinkhorn_" + suffix).c_str(), [](const py::tuple& values, int threads) {
    const auto task = sinkhorn_task<T>(values);
    py::gil_scoped_release release;
    pk::cpu_sinkhorn(task, threads);
  });
  bind_task(m, "cpu_token_cost_" + suffix, pk::cpu_token_cost<T>);
  bind_task(m, "cpu_token_cost_gradient_" + suffix, pk::cpu_token_cost_gradient<T>);
  bind_task(m, "cpu_transport_attention_" + suffix, pk::cpu_transport_attention<T>);
  bind_task(m, "cpu_fusion_gradient_" + suffix, pk::cpu_fusion_gradient<T>);
  bind_task(m, "cpu_plan_" + suffix, pk::cpu_plan<T>);
  bind_task(m, "cpu_plan_sums_" + suffix, pk::cpu_plan_sums<T>);
  bind_task(m, "cpu_plan_backward_" + suffix, pk::cpu_plan_backward<T>);
  bind_task(m, "cpu_implicit_" + suffix, pk::cpu_implicit<T>);
  bind_task(m, "cpu_unrolled_" + suffix, pk::cpu_unrolled<T>);
  bind_task(m, "cpu_points_solve_" + suffix, pk::cpu_points_solve<T>);
  bind_task(m, "cpu_points_self_" + suffix, pk::cpu_points_self<T>);
  bind_task(m, "cpu_points_transform_" + suffix, pk::cpu_points_transform<T>);
  bind_task(m, "cpu_points_product_" + suffix, pk::cpu_points_product<T>);
}

#ifdef PK_HAVE_CUDA
// Where a CUDA launcher runs: (storage of the tensors that may be 16 bits wide, device, stream), and a function that
// allocates its workspace: bytes -> address. It is called before the launch, if there is something to allocate.
using Place = std::tuple<int, int, uintptr_t>;

template <class Task> void read_any(const py::dict& values, Task& task) { read(Named(values), task); }
void read_any(const py::tuple& values, pk::SinkhornTask<float>& task) { task = sinkhorn_task<float>(values); }

template <class Values, class Task>
void bind_launcher(py::module_& m, const char* name, const char* who, const char* (*launch)(const Task&, const pk::CudaCall&),
                   size_t (*workspace)(const Task&, const pk::CudaCall&) = nullptr) {
  const auto run = [=](const Values& values, const Place& place, const py::function& allocate) {
    Task task{};
    read_any(values, task);
    pk::CudaCall call{pk::Storage(std::get<0>(place)), std::get<1>(place), std::get<2>(place), nullptr};
    const size_t bytes = workspace ? workspace(task, call) : 0;
    if (bytes > 0) call.workspace = at<void>(allocate(bytes).template cast<uintptr_t>());
    const char* problem;
    {
      py::gil_scoped_release release;
      problem = launch(task, call);
    }
    if (problem != nullptr) throw std::runtime_error(std::string(who) + ": backend 'cuda': " + problem);
  };
  m.def(name, run);
}

void bind_cuda(py::module_& m) {
  bind_launcher<py::tuple>(m, "cuda_sinkhorn", "sinkhorn", pk::cuda_sinkhorn, pk::cuda_sinkhorn_workspace);
  bind_launcher<py::dict>(m, "cuda_token_cost", "token_cost", pk::cuda_token_cost, pk::cuda_token_cost_workspace);
  bind_launcher<py::dict>(m, "cuda_token_cost_gradient", "token_cost", pk::cuda_token_cost_gradient,
                          pk::cuda_token_cost_gradient_workspace);
  bind_launcher<py::dict>(m, "cuda_transport_attention", "transport_attention", pk::cuda_transport_attention,
                          pk::cuda_transport_attention_workspace);
  bind_launcher<py::dict>(m, "cuda_fusion_gradient", "transport_attention", pk::cuda_fusion_gradient);
  bind_launcher<py::dict>(m, "cuda_plan", "sinkhorn", pk::cuda_plan);
  bind_launcher<py::dict>(m, "cuda_plan_sums", "sinkhorn", pk::cuda_plan_sums, pk::cuda_plan_sums_workspace);
  bind_launcher<py::dict>(m, "cuda_plan_backward", "sinkhorn", pk::cuda_plan_backward, pk::cuda_plan_backward_workspace);
  bind_launcher<py::dict>(m, "cuda_implicit", "sinkhorn", pk::cuda_implicit, pk::cuda_implicit_workspace);
  bind_launcher<py::dict>(m, "cuda_points_solve", "sinkhorn_points", pk::cuda_points_solve, pk::cuda_points_workspace);
  bind_launcher<py::dict>(m, "cuda_points_self", "sinkhorn_divergence", pk::cuda_points_self, pk::cuda_points_workspace);
  bind_launcher<py::dict>(m, "cuda_points_transform", "sinkhorn_points", pk::cuda_points_transform, pk::cuda_points_workspace);
  bind_launcher<py::dict>(m, "cuda_points_product", "sinkhorn_points", pk::cuda_points_product);
}
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = PK_COMPILER;
  info["instruction_sets"] = py::str(pk::cpu_instruction_sets()).attr("split")();
  info["instruction_set"] = pk::cpu_in_use();
#ifdef PK_HAVE_CUDA
  info["cuda"] = true;
  info["cuda_version"] = PK_CUDA_VERSION;
  info["cuda_architectures"] = PK_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

#ifndef PK_MODULE
#define PK_MODULE _C
#endif
PYBIND11_MODULE(PK_MODULE, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of pisces_kernels; use the functions of the package instead.";
  m.def("build_info", &build_info);
  m.def("use_instruction_set", [](const py::object& name) -> std::string {
    const std::string text = name.is_none() ? "" : name.cast<std::string>();
    const char* used = pk::cpu_use(name.is_none() ? nullptr : text.c_str());
    if (used == nullptr) throw py::value_error("this machine or build has no instruction set '" + text + "'");
    return used;
  });
  bind_cpu<float>(m, "f32");
  bind_cpu<double>(m, "f64");
#ifdef PK_HAVE_CUDA
  bind_cuda(m);
  m.def("cuda_devices", [] {
    const pk::CudaStatus status = pk::cuda_devices();
    return py::make_tuple(status.devices, status.message);
  });
#else
  m.def("cuda_devices", [] { return py::make_tuple(0, "built without CUDA"); });
#endif
}
