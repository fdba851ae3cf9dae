"""Verification policies: what counts as an acceptable draft token, one module per rule."""

from vllm_aasd.verification.batch import PolicyBatch
from vllm_aasd.verification.conditional import ConditionalVerification
from vllm_aasd.verification.strict import StrictVerification

__all__ = ["ConditionalVerification", "PolicyBatch", "StrictVerification"]
