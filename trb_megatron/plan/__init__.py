"""The plan of a run: which rank holds what, how many bytes that takes, and the start-up report."""
