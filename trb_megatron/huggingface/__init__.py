"""Hugging Face folders: configuration, tokenizer, tensors, and where each belongs in Megatron."""
