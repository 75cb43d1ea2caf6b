"""Lowering rules by family. Importing this package registers them."""

from kpx.bridges.torch.aten import (  # noqa: F401
    backward,
    complex,
    elementwise,
    fft,
    grouped,
    histogram,
    indexing,
    interpolate,
    linalg,
    nn,
    pooling,
    prims,
    random,
    reduce,
    scatter,
    shape,
    sort,
    special,
)
