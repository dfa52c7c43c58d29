"""Routing biases that every engine reads alike.

A router chooses by score plus bias, and only differences decide: one constant added to all biases of a layer changes no
choice, and gate weights never hold the bias (V3 report, eq. 16). But some engines take the experts of groups that are
out by setting their biased score to 0.0 instead of -inf, which is lower than all others only while none is negative.

Letters: E experts.
"""

from torch import Tensor


def shifted(bias_E: Tensor) -> Tensor:
    """The biases plus the smallest constant that makes none of them negative: the least becomes exactly 0."""
    return bias_E - bias_E.min()


def for_export(bias_E: Tensor, shift: bool | None = None) -> Tensor:
    """The biases in float32 as a checkpoint is to have them: `shifted`, unless told only where one is negative."""
    bias_E = bias_E.float()
    return shifted(bias_E) if shift or (shift is None and bool((bias_E < 0).any())) else bias_E
