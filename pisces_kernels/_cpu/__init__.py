"""Adapters of the compiled CPU kernels: contiguous tensors, their addresses, and PyTorch's thread count."""
