"""Verification policies: what counts as an acceptable draft token, one module per rule."""
