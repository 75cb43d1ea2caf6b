"""Lowering rules by family. Importing this package registers them."""

from kpx.bridges.torch.aten import elementwise, indexing, nn, reduce, shape  # noqa: F401
