"""The losses: rules on given logits, and the same rules straight from hidden states.

`LOSSES` is a public interface and needs torch alone.
"""

from trb_megatron.loss.losses import LOSSES, LossOutput

__all__ = ["LOSSES", "LossOutput"]
