// What the launchers share: the device guard, and errors as messages.
#pragma once
#include "../api.h"
#include "device.cuh"

namespace pk {

// Run `body`, which returns a cudaError_t, with `device` current; null or a message.
template <class Body> const char* on_device(int device, Body&& body) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = body();
    if (error == cudaSuccess) error = cudaGetLastError();
    if (before != device) {
      const cudaError_t restored = cudaSetDevice(before);
      if (error == cudaSuccess) error = restored;
    }
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pk
