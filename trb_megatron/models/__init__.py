"""Student and teacher as Megatron-Core models: building, weights, forward passes, caches, FP8."""
