"""Adapters of the compiled kernels: contiguous tensors, their addresses, and where they run."""
