"""Evaluation: grading answers in worker processes, and pass@k over problem sets."""
