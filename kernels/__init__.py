"""Tensor kernels of AASD: verify, align and draft, each with a reference of the same name."""
