"""Verification rules and their parameters, and the tensors that describe the requests of a batch."""
