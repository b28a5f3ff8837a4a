"""Commands that move models between Hugging Face and Megatron-Core checkpoints."""
