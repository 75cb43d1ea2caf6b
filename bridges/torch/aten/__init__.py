"""Lowering rules by family. Importing this package registers them."""

from kpx.bridges.torch.aten import (  # noqa: F401
    backward,
    complex,
    control,
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
    quantized,
    random,
    reduce,
    scatter,
    shape,
    sort,
    special,
)
