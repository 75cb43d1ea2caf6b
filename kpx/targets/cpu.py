"""The CPU: XLA's options for it."""

from __future__ import annotations


def compiler_options() -> dict[str, str]:
    """XLA:CPU options that every executable is compiled with."""
    return {}
