"""Skeletons of kpx's own patterns, traced beforehand: tracing them all takes longer than looking for them.

`python -m kpx.passes.skeletons` writes `skeletons.json.gz` beside this file. It holds for one version of JAX and for the sources
that it was written from; for others it is not read, and skeletons are traced when they are first needed.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import json
import pathlib
import sys
from typing import Any

import jax

from kpx.ir import module, pattern, rewrite
from kpx.ir.pattern import Graph, Node
from kpx.kernels import patterns as registry
from kpx.kernels.patterns import Pattern
from kpx.passes import canonicalize, precision

FILE = pathlib.Path(__file__).with_name("skeletons.json.gz")


def known(of: Pattern, group: int, on_cpu: bool) -> Graph | None:
    """The skeleton of a group of a pattern's spellings, for the CPU or for others, where it has been traced beforehand."""
    if not of.checked or (found := _read()["skeletons"].get(_key(of, group, on_cpu))) is None:
        return None
    inputs, outputs, nodes = found
    return Graph(tuple(inputs), tuple(outputs), tuple(Node(name, "", tuple(a), tuple(r)) for name, a, r in nodes), ())


def kernels(of: Pattern) -> list[str] | None:
    """The names of the kernels that a pattern's replacement calls, where it has been traced beforehand."""
    return _read()["kernels"].get(of.name) if of.checked else None


def _key(of: Pattern, group: int, on_cpu: bool) -> str:
    return f"{of.alike or of.name}/{group}{'/cpu' if on_cpu else ''}"


@functools.cache
def _read() -> dict[str, Any]:
    if FILE.exists():
        found = json.loads(gzip.decompress(FILE.read_bytes()))
        if found["written from"] == written_from():
            return found
    return {"skeletons": {}, "kernels": {}}


def written_from() -> str:
    """The version of JAX, and a digest of the sources that decide what skeletons are."""
    here = [pathlib.Path(m.__file__ or "") for m in (module, pattern, rewrite, precision)]
    folders = [pathlib.Path(m.__file__ or "").parent for m in (registry, canonicalize)]
    files = [*here, FILE.with_name("fusion.py"), *(f for folder in folders for f in sorted(folder.glob("*.py")))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"jax {jax.__version__}, sources {digest[:16]}"


def write() -> None:
    """Traces every pattern of kpx's own, with its gradients, and writes the file."""
    from kpx.kernels import own  # noqa: F401  (registers them)
    from kpx.passes import fusion

    made: dict[str, Any] = {}
    mine = [p for p in registry.patterns() if p.checked]
    for each in (p for base in mine for p in (base, *registry.with_gradient(base))):
        for group, on_cpu in itertools.product(range(len(each.searches)), (False, True)):
            if on_cpu and not fusion.is_of_use(each.gradient_of or each, "cpu"):
                continue
            if (key := _key(each, group, on_cpu)) not in made:
                graph = pattern.stripped(fusion.traced_skeleton(each, group, on_cpu))
                nodes = [[n.name, n.operands, n.results] for n in graph.nodes]
                made[key] = [graph.inputs, graph.outputs, nodes]
    names = {p.name: fusion.kernels_of(p) for p in mine}
    text = json.dumps({"written from": written_from(), "kernels": names, "skeletons": made}, separators=(",", ":"))
    FILE.write_bytes(gzip.compress(text.encode(), mtime=0))


def are_of_these_sources() -> bool:
    """Whether the file was written from these sources; of another JAX's file nothing can be said."""
    written = json.loads(gzip.decompress(FILE.read_bytes()))["written from"]
    return not written.startswith(f"jax {jax.__version__},") or written == written_from()


if __name__ == "__main__":
    if "--check" not in sys.argv:
        write()
    elif not are_of_these_sources():
        sys.exit("skeletons.json.gz is of other sources: run `make skeletons` and commit it")
