"""Kernels of our own with the bits of torch's, for CPUs with AVX512-BF16."""
