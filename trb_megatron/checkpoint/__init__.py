"""Training checkpoints: saving, loading, checksums, and loading that runs no foreign code."""
