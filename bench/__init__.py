"""Benchmarks that a user can run; each measures the peer beside us in the same run."""
