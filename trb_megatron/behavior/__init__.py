"""The behavior policies: the distributions that rollouts are sampled from.

`solve_behavior` is a public interface and needs torch alone.
"""

from trb_megatron.behavior.solver import Behavior, solve_behavior

__all__ = ["Behavior", "solve_behavior"]
