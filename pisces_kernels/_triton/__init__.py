"""Kernels in Triton, for NVIDIA and AMD devices without a CUDA compiler: adapters with the names of `_compiled`."""
