"""How long an exchange between devices takes: a model of links, not a measurement.

Rings over the links that its devices share, at full bandwidth, with no latency and nothing else on the links. A torus
lets each axis of a mesh use one of its dimensions in both directions; an exchange of a whole slice uses all of them.
"""

from __future__ import annotations

from kpx.hardware.target import Target
from kpx.ir.hlo_cost import Collective

# How often a device sends or receives the array, in units of (n - 1) / n of it.
_PASSES = {"all-reduce": 2.0}


def seconds(sent: Collective, target: Target) -> float:
    """The time of one exchange, by its bytes and the narrowest link on its way."""
    n = len(sent.group)
    if n < 2 or target.spec is None:
        return 0.0
    if sent.kind in ("collective-permute", "collective-broadcast"):
        return sent.bytes / bandwidth(sent, target)
    return _PASSES.get(sent.kind, 1.0) * sent.bytes * (n - 1) / n / bandwidth(sent, target)


def bandwidth(sent: Collective, target: Target) -> float:
    """Bytes/s that a device has for an exchange."""
    chip = target.spec
    if chip is None:
        raise ValueError(f"{target} has no links in the spec table")
    together = target.device_count // target.slices if target.platform == "tpu" else target.shape[-1]
    if len({member // together for member in sent.group}) > 1:
        return chip.network
    if chip.links.kind == "switch":
        return chip.links.bandwidth
    dimensions = chip.links.dimensions if len(sent.group) == together else 1
    return 2 * dimensions * chip.links.bandwidth
