"""`kpx targets`: what can be run on and compiled for, as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kpx.hardware.detect import targets


def examine() -> list[dict[str, Any]]:
    """What `kpx.targets()` lists, as dictionaries."""
    return [dataclasses.asdict(t) for t in targets()]


def show(console: Console, found: list[dict[str, Any]]) -> None:
    """Prints what `examine` found."""
    table = Table()
    for column in ("target", "can", "device", "memory", "element types", "kernels", "compiler"):
        table.add_column(column, no_wrap=column in ("target", "can", "memory"))
    for t in found:
        memory = "?" if t["memory_bytes"] is None else f"{t['memory_bytes'] / 2**30:.0f} GiB"
        name = f"{t['devices']} x {t['name']}" if t["devices"] else t["name"]
        kernels = ", ".join(k.removeprefix("kpx.") for k in t["kernels"]) or "-"
        table.add_row(t["target"], t["can"], escape(name), memory, " ".join(t["dtypes"]), kernels, t["plugin"] or "-")
    console.print(table)
    for command in dict.fromkeys(t["install"] for t in found if t["install"]):
        console.print(f"To add a compiler: `{escape(command)}`", highlight=False)
