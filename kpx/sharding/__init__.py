"""Sharding: a training step is planned over a mesh, and compiled as it was planned."""
