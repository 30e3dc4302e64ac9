// Python bindings: addresses and sizes in, launchers out. No framework is known here; the Python adapters check shapes.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "api.h"

namespace py = pybind11;

namespace {

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

template <class T> pk::SinkhornTask<T> sinkhorn_task(const py::dict& d) {
  const auto address = [&](const char* key) { return d[key].cast<uintptr_t>(); };
  pk::SinkhornTask<T> task{};
  task.cost = at<T>(address("cost")), task.a = at<T>(address("a")), task.b = at<T>(address("b"));
  task.epsilon = at<double>(address("epsilon")), task.mass = at<double>(address("mass"));
  task.row_mask = at<uint8_t>(address("row_mask")), task.col_mask = at<uint8_t>(address("col_mask"));
  task.f_init = at<T>(address("f_init")), task.g_init = at<T>(address("g_init"));
  task.f = at<T>(address("f")), task.g = at<T>(address("g"));
  task.n_iters = at<int32_t>(address("n_iters")), task.residual = at<T>(address("residual"));
  task.problems = d["problems"].cast<int64_t>();
  task.rows = d["rows"].cast<int64_t>(), task.cols = d["cols"].cast<int64_t>();
  task.tau_a = d["tau_a"].cast<double>(), task.tau_b = d["tau_b"].cast<double>(), task.tol = d["tol"].cast<double>();
  task.max_iters = d["max_iters"].cast<int>(), task.anderson = d["anderson"].cast<bool>();
  return task;
}

template <class T> pk::CostTask<T> cost_task(const py::dict& d) {
  const auto address = [&](const char* key) { return d[key].cast<uintptr_t>(); };
  pk::CostTask<T> task{};
  task.similarity = at<T>(address("similarity")), task.attention = at<T>(address("attention"));
  task.frame = at<T>(address("frame")), task.place_y = at<T>(address("place_y")), task.place_x = at<T>(address("place_x"));
  task.time_weight = at<T>(address("time_weight"));
  task.row_mask = at<uint8_t>(address("row_mask")), task.col_mask = at<uint8_t>(address("col_mask"));
  task.samples = d["samples"].cast<int64_t>(), task.heads = d["heads"].cast<int64_t>();
  task.rows = d["rows"].cast<int64_t>(), task.cols = d["cols"].cast<int64_t>();
  task.place_weight = T(d["place_weight"].cast<double>());
  task.normalize = d["normalize"].cast<bool>();
  task.cost = at<T>(address("cost"));
  return task;
}

template <class T> pk::AttentionTask<T> attention_task(const py::dict& d) {
  pk::AttentionTask<T> task{};
  task.cost = cost_task<T>(d);
  task.epsilon = d["epsilon"].cast<double>(), task.tau = d["tau"].cast<double>(), task.mass = d["mass"].cast<double>();
  task.tol = d["tol"].cast<double>(), task.max_iters = d["max_iters"].cast<int>();
  task.refined = at<T>(d["refined"].cast<uintptr_t>()), task.plan = at<T>(d["plan"].cast<uintptr_t>());
  return task;
}

template <class T> void bind_cpu(py::module_& m, const std::string& suffix) {
  m.def(("cpu_sinkhorn_" + suffix).c_str(), [](const py::dict& d, int threads) {
    const auto task = sinkhorn_task<T>(d);
    py::gil_scoped_release release;
    pk::cpu_sinkhorn(task, threads);
  });
  m.def(("cpu_token_cost_" + suffix).c_str(), [](const py::dict& d, int threads) {
    const auto task = cost_task<T>(d);
    py::gil_scoped_release release;
    pk::cpu_token_cost(task, threads);
  });
  m.def(("cpu_transport_attention_" + suffix).c_str(), [](const py::dict& d, int threads) {
    const auto task = attention_task<T>(d);
    py::gil_scoped_release release;
    pk::cpu_transport_attention(task, threads);
  });
}

#ifdef PK_HAVE_CUDA
template <class T> void bind_cuda(py::module_& m, const std::string& suffix) {
  m.def(("cuda_sinkhorn_workspace_" + suffix).c_str(),
        [](const py::dict& d) { return pk::cuda_sinkhorn_workspace(sinkhorn_task<T>(d)); });
  m.def(("cuda_sinkhorn_" + suffix).c_str(), [](const py::dict& d, uintptr_t workspace, int device, uintptr_t stream) {
    const auto task = sinkhorn_task<T>(d);
    const char* problem;
    {
      py::gil_scoped_release release;
      problem = pk::cuda_sinkhorn(task, at<T>(workspace), device, stream);
    }
    if (problem != nullptr) throw std::runtime_error(std::string("pisces_kernels CUDA sinkhorn: ") + problem);
  });
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

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
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
  bind_cuda<float>(m, "f32");
  bind_cuda<double>(m, "f64");
  m.def("cuda_devices", [] {
    const pk::CudaStatus status = pk::cuda_devices();
    return py::make_tuple(status.devices, status.message);
  });
#else
  m.def("cuda_devices", [] { return py::make_tuple(0, "built without CUDA"); });
#endif
}
