"""Fused operations: one file an op, each with a reference that runs anywhere."""
