"""On-policy distillation with Trust-Region behavior Blending on Megatron-Core."""

__version__ = "0.1.0"
