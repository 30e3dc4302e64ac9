"""Benchmarks of `pisces_kernels` against its peers; see README.md."""
