"""Tensor kernels of AASD: verify, align and draft, each with a plain twin of the same name."""
