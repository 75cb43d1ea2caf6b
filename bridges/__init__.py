"""Front ends: how a model of each framework becomes a JAX function."""
