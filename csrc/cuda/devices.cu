// Which CUDA devices there are.
#include "host.h"

namespace pk {

CudaStatus cuda_devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);  // no driver or no device is an answer, not a failure
  if (error != cudaSuccess) return {0, cudaGetErrorString(error)};
  return {count, count == 0 ? "the driver reports none" : ""};
}

}  // namespace pk
