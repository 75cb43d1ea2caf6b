"""TPUs: which slices there are, and what libtpu must be told to compile for one that is not here."""

from __future__ import annotations

import itertools
import math
import re

from kpx.errors import TargetError
from kpx.hardware.chips import Chip

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_CUBES = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


def topologies(chip: Chip) -> list[tuple[int, ...]]:
    """The slices of a chip's pod, in chips, the smallest first.

    Three-dimensional ones are made of cubes of 4 x 4 x 4, or are a part of one (Google Cloud's documentation).
    """
    if chip.links.dimensions == 2:
        return list(_FLAT)
    sides = [range(4, side + 1, 4) for side in chip.compiler["largest"]]
    cubes = [s for s in itertools.product(*sides) if s == tuple(sorted(s))]
    return sorted([*_SMALL_CUBES, *cubes], key=lambda s: (math.prod(s), s))


def parse_topology(text: str, chip: Chip, given: str) -> tuple[tuple[int, ...], int]:
    """The shape of a slice and the number of slices: of `4x4`, `16x16*2`, or nothing (one chip).

    Raises:
        TargetError: there is no such slice.
    """
    known = topologies(chip)
    if not given:
        return known[0], 1
    parts = re.fullmatch(r"(\d+(?:x\d+)*)(?:\*(\d+))?", given)
    shape = tuple(map(int, parts[1].split("x"))) if parts else ()
    slices = int(parts[2] or 1) if parts else 0
    # libtpu wants the sides of a three-dimensional slice in order; 2x2x1 is the smallest of several chips.
    ordered = shape if shape in known else tuple(sorted(shape))
    if ordered not in known or slices < 1:
        size = math.prod(shape)
        near = sorted(known, key=lambda s: abs(math.log(math.prod(s) / max(size, 1))))[:6]
        listed = ", ".join("x".join(map(str, s)) for s in sorted(near, key=math.prod))
        raise TargetError(
            f"`target={text!r}`: {chip.name} has no slice `{given}`. Near it in size are {listed}; the largest is "
            f"{'x'.join(map(str, known[-1]))}. `*2` after a slice makes it two slices."
        )
    return ordered, slices


def topology(chip: Chip, shape: tuple[int, ...], slices: int) -> tuple[str, dict]:
    """A slice as libtpu names it, and the options that go with the name."""
    options: dict = {}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if slices > 1:
        options["num_slices"] = slices
    return f"{chip.compiler['topology']}:{'x'.join(map(str, shape))}", options


# What a libtpu with no TPU beside it must be told, so that it neither asks the network nor refuses a second process.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
