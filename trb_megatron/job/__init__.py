"""The job as processes: failed ranks, shared failures, requests to stop, non-finite numbers."""
