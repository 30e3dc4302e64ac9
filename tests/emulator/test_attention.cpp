// Token cost, transport attention and the gradient of its fusion, emulated, against the CPU kernels in double.
#include "check.h"

#include <sstream>

using namespace pk;
using namespace pk::test;

namespace {

struct Case {
  int64_t samples, heads, rows, cols, dim;
  double epsilon, tau;
  bool masks;
  Storage storage;
  int max_iters = 40;
  double mass = 0;  // 0: not given
};

struct Inputs {  // the features and the attention as their storage has them
  std::vector<float> text, video, attention, frame, positions;
  std::vector<uint8_t> row_mask, col_mask;
};

Inputs draw(const Case& c, Random& random) {
  Inputs in;
  in.text = rounded(random.uniform<float>(c.samples * c.rows * c.dim, -1, 1), c.storage);
  in.video = rounded(random.uniform<float>(c.samples * c.cols * c.dim, -1, 1), c.storage);
  in.attention = random.uniform<float>(c.samples * c.heads * c.rows * c.cols);
  for (float& w : in.attention) w = w * w * 2 / float(c.cols);
  in.attention = rounded(in.attention, c.storage);
  in.positions = random.uniform<float>(c.samples * c.cols * 2);
  for (int64_t j = 0; j < c.samples * c.cols; ++j) {
    in.frame.push_back(j % c.cols == 0 ? -1.0f : float(j % c.cols / 7));
    in.col_mask.push_back(random.uniform() < 0.8 || j % c.cols == 0);
  }
  for (int64_t i = 0; i < c.samples * c.rows; ++i) in.row_mask.push_back(random.uniform() < 0.7 || i % c.rows == 0);
  if (c.samples > 1)  // one sample in which nothing is selected
    for (int64_t i = 0; i < c.rows; ++i) in.row_mask[size_t(i)] = 0;
  return in;
}

// Pointers of a task to arrays of T.
template <class T> struct Arrays {
  std::vector<T> text, video, attention, frame, positions, cost;
  CostTask<T> task{};
  Arrays(const Case& c, const Inputs& in, bool col_masks)
      : text(in.text.begin(), in.text.end()), video(in.video.begin(), in.video.end()),
        attention(in.attention.begin(), in.attention.end()), frame(in.frame.begin(), in.frame.end()),
        positions(in.positions.begin(), in.positions.end()), cost(in.attention.size(), T(NAN)) {
    task.text = text.data(), task.video = video.data(), task.attention = attention.data(), task.frame = frame.data();
    task.positions = positions.data(), task.cost = cost.data();
    task.row_mask = c.masks ? in.row_mask.data() : nullptr, task.col_mask = col_masks ? in.col_mask.data() : nullptr;
    task.samples = c.samples, task.heads = c.heads, task.rows = c.rows, task.cols = c.cols, task.dim = c.dim;
    task.gamma = T(0.2), task.place_weight = T(0.2 / std::sqrt(2.0)), task.normalize = true;
  }
};
struct Packed {  // 16-bit copies in the place of the float arrays
  std::vector<uint16_t> text, video, attention;
  Packed(CostTask<float>& task, const Inputs& in, Storage storage) {
    if (storage == Storage::float32) return;
    text = packed(in.text, storage), video = packed(in.video, storage), attention = packed(in.attention, storage);
    task.text = reinterpret_cast<const float*>(text.data()), task.video = reinterpret_cast<const float*>(video.data());
    task.attention = reinterpret_cast<const float*>(attention.data());
  }
};

std::string name_of(const Case& c) {
  std::ostringstream name;
  name << c.samples << " x " << c.heads << " x " << c.rows << " x " << c.cols << " x " << c.dim << " eps " << c.epsilon << " tau "
       << c.tau << (c.masks ? " masks" : "") << " storage " << int(c.storage) << " iterations " << c.max_iters << " mass " << c.mass;
  return name.str();
}

void poison(const Case& c, Inputs& in) {  // what is masked may hold anything
  if (!c.masks) return;
  for (size_t i = 0; i < in.row_mask.size(); ++i)
    for (int64_t d = 0; d < c.dim && !in.row_mask[i]; ++d) in.text[i * size_t(c.dim) + size_t(d)] = NAN;
  for (size_t j = 0; j < in.col_mask.size(); ++j)
    if (!in.col_mask[j]) in.frame[j] = NAN, in.positions[2 * j] = INFINITY;
}

void cost_alone(const Case& c, Random& random, bool normalize) {
  Inputs in = draw(c, random);
  Arrays<double> exact(c, in, c.masks);
  exact.task.normalize = normalize;
  cpu_token_cost(exact.task, 1);
  poison(c, in);
  Arrays<float> arrays(c, in, c.masks);
  arrays.task.normalize = normalize;
  const Packed half(arrays.task, in, c.storage);
  CudaCall call{c.storage, 0, 0, nullptr};
  const Workspace workspace(cuda_token_cost_workspace(arrays.task, call));
  call.workspace = workspace.get();
  check(cuda_token_cost(arrays.task, call) == nullptr, name_of(c) + ": no message");
  const double away = difference(arrays.cost, exact.cost);
  check(away < 1e-5, name_of(c) + ": token cost", away);
  if (!normalize) return;
  int64_t tops = 0;
  for (float x : arrays.cost) tops += x == 1.0f;
  check(tops > 0 || c.rows * c.cols == 1, name_of(c) + ": the largest entry is exactly 1");
}

// Gradient of the features from that of the cosines: (grad - unit <grad, unit>) / norm with grad_i = sum_j to_cosine_ij unit_j.
std::vector<double> by_features(const Case& c, const std::vector<float>& to_cosine, const std::vector<float>& own,
                                const std::vector<float>& other, bool of_text) {
  const int64_t N = of_text ? c.rows : c.cols, M = of_text ? c.cols : c.rows, D = c.dim;
  const auto norm_of = [&](const std::vector<float>& features, int64_t row) {
    double squared = 0;
    for (int64_t d = 0; d < D; ++d) squared += double(features[size_t(row * D + d)]) * double(features[size_t(row * D + d)]);
    return std::max(std::sqrt(squared), 1e-12);
  };
  std::vector<double> result(own.size());
  for (int64_t row = 0; row < c.samples * N; ++row) {
    std::vector<double> grad(size_t(D), 0.0);
    for (int64_t j = 0; j < M; ++j) {
      const int64_t other_row = row / N * M + j, i = row % N;
      const double weight = double(to_cosine[size_t(row / N * N * M + (of_text ? i * M + j : j * N + i))]) / norm_of(other, other_row);
      for (int64_t d = 0; d < D; ++d) grad[size_t(d)] += weight * double(other[size_t(other_row * D + d)]);
    }
    const double norm = norm_of(own, row);
    double along = 0;
    for (int64_t d = 0; d < D; ++d) along += grad[size_t(d)] * double(own[size_t(row * D + d)]) / norm;
    for (int64_t d = 0; d < D; ++d)
      result[size_t(row * D + d)] = (grad[size_t(d)] - along * double(own[size_t(row * D + d)]) / norm) / norm;
  }
  return result;
}

void cost_gradient(const Case& c, Random& random, bool normalize) {
  Inputs in = draw(c, random);
  Arrays<double> exact(c, in, c.masks);
  exact.task.normalize = normalize;
  cpu_token_cost(exact.task, 1);
  const std::vector<float> grad = random.uniform<float>(int64_t(in.attention.size()), -1, 1);
  const std::vector<double> wide = widened(grad);
  std::vector<double> text(in.text.size()), video(in.video.size()), to_attention(in.attention.size());
  cpu_token_cost_gradient(CostGradientTask<double>{exact.task, wide.data(), to_attention.data(), text.data(), video.data(), nullptr}, 1);
  const Inputs sound = in;
  poison(c, in);
  Arrays<float> arrays(c, in, c.masks);
  arrays.task.normalize = normalize, arrays.cost.assign(exact.cost.begin(), exact.cost.end());
  const Packed half(arrays.task, in, c.storage);
  std::vector<float> found(in.attention.size(), NAN), to_cosine(size_t(c.samples * c.rows * c.cols), NAN);
  const CostGradientTask<float> task{arrays.task, grad.data(), found.data(), nullptr, nullptr, to_cosine.data()};
  CudaCall call{c.storage, 0, 0, nullptr};
  const Workspace workspace(cuda_token_cost_gradient_workspace(task, call));
  call.workspace = workspace.get();
  check(cuda_token_cost_gradient(task, call) == nullptr, name_of(c) + ": no message");
  const auto compare = [&](const auto& got, const std::vector<double>& want, const char* what) {
    double largest = 1;
    for (double x : want) largest = std::max(largest, std::abs(x));
    const double away = difference(got, want) / largest;
    check(away < 2e-5, name_of(c) + ": gradient by " + what, away);
  };
  compare(found, to_attention, "attention");
  compare(by_features(c, to_cosine, sound.text, sound.video, true), text, "text");
  compare(by_features(c, to_cosine, sound.video, sound.text, false), video, "video");
}

void attention(const Case& c, Random& random, bool with_plan) {
  const Inputs in = draw(c, random);
  Arrays<double> exact(c, in, false);
  Arrays<float> arrays(c, in, false);
  const Packed half(arrays.task, in, c.storage);
  const size_t entries = in.attention.size();
  std::vector<double> exact_refined(entries), exact_plan(entries);
  AttentionTask<double> want{exact.task, c.epsilon, c.tau, c.mass, 0, c.max_iters, exact_refined.data(), exact_plan.data()};
  cpu_transport_attention(want, 1);
  std::vector<float> refined(entries, NAN), plan(entries, NAN);
  std::vector<uint16_t> half_refined(entries);
  AttentionTask<float> task{arrays.task, c.epsilon, c.tau, c.mass, 0, c.max_iters, refined.data(), with_plan ? plan.data() : nullptr};
  if (c.storage != Storage::float32) task.refined = reinterpret_cast<float*>(half_refined.data());
  CudaCall call{c.storage, 0, 0, nullptr};
  const Workspace workspace(cuda_transport_attention_workspace(task, call));
  call.workspace = workspace.get();
  check(cuda_transport_attention(task, call) == nullptr, name_of(c) + ": no message");
  if (c.storage != Storage::float32) refined = unpacked(half_refined, c.storage);
  double tv = 0, plan_tv = 0;  // total variation of the worst row
  for (size_t row = 0; row < entries / size_t(c.cols); ++row) {
    double away = 0, of_plan = 0, total = 0;
    for (size_t j = row * size_t(c.cols); j < (row + 1) * size_t(c.cols); ++j) {
      away += std::abs(double(refined[j]) - exact_refined[j]) / 2, total += exact_plan[j];
      of_plan += std::abs(double(plan[j]) - exact_plan[j]) / 2;
    }
    tv = std::isnan(away) ? INFINITY : std::max(tv, away);
    if (with_plan) plan_tv = std::isnan(of_plan) ? INFINITY : std::max(plan_tv, of_plan / std::max(total, 1e-30));
  }
  // a row of bfloat16 probabilities has the rounding of each
  check(tv < (c.storage == Storage::float32 ? 2e-4 : 4e-3), name_of(c) + ": refined attention", tv);
  if (with_plan) check(plan_tv < 2e-4, name_of(c) + ": plan", plan_tv);
}

void gradient(const Case& c, Random& random) {
  const Inputs in = draw(c, random);
  const size_t entries = in.attention.size();
  const std::vector<float> grad = random.uniform<float>(int64_t(entries), -1, 1);
  std::vector<float> refined = random.uniform<float>(int64_t(entries), 0, 2 / double(c.cols)), result(entries, NAN);
  const std::vector<double> wide[] = {widened(grad), widened(in.attention), widened(refined)};
  std::vector<double> exact(entries);
  const uint8_t* const mask = c.masks ? in.row_mask.data() : nullptr;
  cpu_fusion_gradient(FusionGradientTask<double>{wide[0].data(), wide[1].data(), wide[2].data(), mask, c.samples, c.heads, c.rows, c.cols,
                                                 exact.data()}, 1);
  const FusionGradientTask<float> task{grad.data(), in.attention.data(), refined.data(), mask, c.samples, c.heads, c.rows, c.cols,
                                       result.data()};
  check(cuda_fusion_gradient(task, CudaCall{Storage::float32, 0, 0, nullptr}) == nullptr, name_of(c) + ": no message");
  double away = 0;
  for (size_t k = 0; k < entries; ++k) away = std::max(away, std::abs(double(result[k]) - exact[k]) / (1 + std::abs(exact[k])));
  check(away < 1e-4, name_of(c) + ": gradient of the fusion", away);
}

void report_what_is_not_finite(Random& random) {
  const Case c{1, 2, 5, 40, 8, 0.05, 0.9, false, Storage::float32};
  Inputs in = draw(c, random);
  in.attention[3] = NAN;  // head 0
  Arrays<float> arrays(c, in, false);
  std::vector<float> refined(in.attention.size());
  const AttentionTask<float> task{arrays.task, c.epsilon, c.tau, 0, 0, c.max_iters, refined.data(), nullptr};
  CudaCall call{c.storage, 0, 0, nullptr};
  const Workspace workspace(cuda_transport_attention_workspace(task, call));
  call.workspace = workspace.get();
  check(cuda_transport_attention(task, call) == nullptr, "not finite: no message");
  bool all_nan = true, finite = true;
  for (size_t k = 0; k < refined.size() / 2; ++k) all_nan = all_nan && std::isnan(refined[k]);
  for (size_t k = refined.size() / 2; k < refined.size(); ++k) finite = finite && std::isfinite(refined[k]);
  check(all_nan, "a head with a NaN is NaN"), check(finite, "the others are not");
}

}  // namespace

int main(int argc, char** argv) {
  Random random(seed_of(argc, argv));
  const auto odd = [&](int64_t low, int64_t high) { return low + random.below(high - low + 1); };
  using S = Storage;
  cost_alone({2, 2, odd(3, 20), odd(30, 90), odd(3, 40), 0, 0, true, S::float32}, random, true);
  cost_alone({1, 2, odd(60, 70), odd(30, 90), odd(3, 40), 0, 0, false, S::bfloat16}, random, false);
  cost_alone({1, 1, 3, odd(1030, 1060), 5, 0, 0, true, S::float16}, random, true);
  cost_gradient({2, 3, odd(3, 20), odd(30, 90), odd(3, 40), 0, 0, true, S::float32}, random, true);
  cost_gradient({1, 2, odd(60, 70), odd(30, 90), odd(3, 40), 0, 0, false, S::bfloat16}, random, false);
  cost_gradient({1, 2, 3, odd(1030, 1060), 5, 0, 0, true, S::float16}, random, true);
  cost_gradient({1, 1, 1, 1, 3, 0, 0, false, S::float32}, random, true);  // a range of 0
  attention({2, 2, odd(4, 20), odd(60, 150), odd(3, 40), 0.05, 0.9, true, S::float32}, random, true);
  attention({1, 1, odd(33, 40), odd(100, 300), odd(3, 40), 0.01, 0.9, true, S::float32}, random, true);
  attention({1, 1, odd(33, 40), odd(100, 200), odd(3, 40), 0.05, 0.9, false, S::bfloat16}, random, true);
  attention({1, 1, odd(41, 70), odd(60, 150), odd(3, 40), 0.02, 1, true, S::float16}, random, false);
  attention({1, 1, odd(4, 40), odd(60, 150), odd(3, 40), 0.002, 0.9, false, S::float32}, random, true);
  attention({1, 1, odd(4, 40), odd(60, 150), odd(3, 40), 0.001, 0.9, false, S::float32}, random, true);
  attention({1, 2, odd(4, 40), odd(60, 150), odd(3, 40), 0.002, 0.5, false, S::float32, 1}, random, true);
  attention({1, 2, odd(4, 20), odd(60, 150), 8, 0.01, 0.9, true, S::float32, 20, 0.5}, random, true);
  attention({1, 1, 1, odd(1, 40), 4, 0.05, 0.9, false, S::float32}, random, true);
  gradient({2, 2, odd(1, 20), odd(1, 150), 1, 0, 0, true, S::float32}, random);
  report_what_is_not_finite(random);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
