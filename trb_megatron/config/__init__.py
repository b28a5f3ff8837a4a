"""The configuration: every option, reading it, and what may change when a run resumes."""
