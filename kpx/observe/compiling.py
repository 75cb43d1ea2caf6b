"""`kpx compile`: a function compiled for targets, here or not, and what their compilers say of it."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kpx.api import compile as compile_for
from kpx.errors import InputError, KpxError
from kpx.hardware.target import Target
from kpx.observe.explain_table import size
from kpx.runtime.absent import PROGRESS

_DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32",
           "i16": "int16", "i8": "int8", "u8": "uint8", "u32": "uint32", "bool": "bool"}  # fmt: skip
_INPUT = re.compile(rf"({'|'.join(_DTYPES)})\[([\d,\s]*)\]")


def load(name: str, inputs: Sequence[str]) -> tuple[Any, tuple]:
    """A function or model and its inputs, from `package.module:name`.

    Args:
        inputs: descriptions, as `f32[8,128]`. Without any, what is named is called with nothing, and gives the
            function or model followed by its inputs.

    Raises:
        InputError: there is no such module or name, or an input's description is not one.
    """
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise InputError(f"`{name}` does not name a function. Write `package.module:function`.")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(f"`{name}` cannot be found: {error}") from None
    finally:
        sys.path.pop(0)
    if inputs:
        return found, tuple(map(parse_input, inputs))
    given = found()
    if not isinstance(given, (tuple, list)) or not given:
        raise InputError(
            f"`{name}()` gave `{type(given).__name__}`. Without `--input`, it must give a tuple: a function or model, and "
            "its inputs. Or describe the inputs: `--input f32[8,128]`."
        )
    return given[0], tuple(given[1:])


def parse_input(text: str) -> jax.ShapeDtypeStruct:
    """`bf16[8,512]` as a struct.

    Raises:
        InputError: the text has another form.
    """
    found = _INPUT.fullmatch(text.strip())
    if found is None:
        raise InputError(f"`{text}` does not describe an array. Write `f32[8,128]`; dtypes are {', '.join(_DTYPES)}.")
    shape = tuple(int(n) for n in found[2].split(",") if n.strip())
    return jax.ShapeDtypeStruct(shape, jnp.dtype(_DTYPES[found[1]]))


def run(name: str, inputs: Sequence[str], targets: Sequence[str], progress: Console) -> list[dict[str, Any]]:
    """What each target's compiler says; where one refuses, its error in the place of the rest."""
    fun, specs = load(name, inputs)
    results = []
    with telling(progress) as tell:
        for target in map(Target, targets):
            tell(target)
            try:
                results.append(_described(compile_for(fun, *specs, target=target)))
            except KpxError as error:
                results.append({"target": str(target), "error": f"{type(error).__name__}: {error}"})
    return results


@contextlib.contextmanager
def telling(progress: Console) -> Iterator[Callable[[Target], None]]:
    """Shows which target is compiled for, how long it has taken, and what its compiler holds."""
    current = ""
    with progress.status("tracing") as status:

        def begin(target: Target) -> None:
            nonlocal current
            current = f"compiling for {target}"
            status.update(current)

        def tell(seconds: float, held: int) -> None:
            status.update(f"{current}: {seconds:.0f} s, {held / 2**30:.1f} GiB")

        token = PROGRESS.set(tell)
        try:
            yield begin
        finally:
            PROGRESS.reset(token)


def _described(compiled: Any) -> dict[str, Any]:
    memory = compiled.memory
    return {
        "target": str(compiled.target),
        "devices": compiled.target.device_count,
        "memory": {name: getattr(memory, name) for name in memory.__dataclass_fields__} | {"fits": memory.fits},
        "rewrites": compiled.rewrites,
        "kernels": compiled.kernels,
        "layers": compiled.layers,
        "precisions": compiled.precisions,
        "seconds": compiled.compile_seconds,
        "remarks": list(compiled.remarks),
    }


def show(console: Console, results: list[dict[str, Any]]) -> None:
    """Prints what `run` found."""
    table = Table(title="Memory of one device, by its compiler")
    for column in ("target", "arguments", "outputs", "temporary", "peak", "of", "fits", "rewrites", "took"):
        table.add_column(column, no_wrap=column == "target")
    for result in results:
        if "error" in result:
            table.add_row(result["target"], *["-"] * 8)
            continue
        memory, fits = result["memory"], {True: "yes", False: "[red]no[/red]", None: "?"}
        sizes = [size(memory[f"{kind}_bytes"]) for kind in ("argument", "output", "temp", "peak", "device")]
        seconds = result["seconds"].get("compile")
        took = "-" if seconds is None else f"{seconds:.1f} s"
        table.add_row(result["target"], *sizes, fits[memory["fits"]], str(sum(result["rewrites"].values())), took)
    console.print(table)
    for result in results:
        for remark in result.get("remarks", ()):
            console.print(f"{result['target']}: {remark}", highlight=False, soft_wrap=True)
        if "error" in result:
            console.print(
                f"[red]{escape(result['target'])}[/red]: {escape(result['error'])}", highlight=False, soft_wrap=True
            )
