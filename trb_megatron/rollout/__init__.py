"""Rollouts: the engine that samples responses, its scheduler, drafts and cache size."""
