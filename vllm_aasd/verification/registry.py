"""All verification policies, by name: a new one is a module of its own, an entry here, and a branch in the kernels."""

from vllm_aasd.verification.budget import BudgetVerification
from vllm_aasd.verification.conditional import ConditionalVerification
from vllm_aasd.verification.fly import FlyVerification
from vllm_aasd.verification.policy import Policy
from vllm_aasd.verification.strict import StrictVerification
from vllm_aasd.verification.typical import TypicalVerification

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        StrictVerification,
        ConditionalVerification,
        TypicalVerification,
        FlyVerification,
        BudgetVerification,
    )
}
