"""torch-mlir's end-to-end suite through kpx: which programs are right, wrong, or refused, and why.

`python -m bench.torch_mlir PATH [--json FILE] [--only PATTERN] [--workers 2] [--seconds 300]`

PATH is a checkout of github.com/llvm/torch-mlir; nothing of it is built, or copied. Each case runs in eager PyTorch and by
`kpx.optimize(module)`, all its calls in order; outputs, and inputs that the program wrote, must agree in structure, shape, dtype and
values. Random cases are compared by the distribution of eager's own draws. Cases run in worker processes: one that dies costs one
case. `--json` is written as cases end; a second run with the same file goes on where the first ended.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

_CHUNK = 40  # cases that a worker runs before another takes over, so that memory stays small
_START_SECONDS = 300
_MEANINGS = {
    "right": "as eager PyTorch", "broken": "as eager PyTorch, with graph breaks", "wrong": "another result",
    "refused": "a KpxError", "crash": "another exception", "died": "the process ended", "timeout": "over the time limit",
    "eager fails": "eager PyTorch raises: not counted",
}  # fmt: skip


# In a worker ------------------------------------------------------------------------------------


def work(checkout: str) -> None:
    """Run the cases named on standard input, one a line; print a line of JSON for each."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no reply
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from bench import torch_mlir_case

    cases = torch_mlir_case.load(checkout)
    print(json.dumps(sorted(cases)), file=replies, flush=True)
    for line in sys.stdin:
        reply = json.dumps(dataclasses.asdict(torch_mlir_case.run(cases[line.strip()])))
        for path in (str(pathlib.Path(checkout).resolve()), checkout.rstrip("/")):
            reply = reply.replace(path, "torch-mlir")
        print(reply, file=replies, flush=True)


class _Worker:
    """A process that runs cases; started anew after one that died or took too long."""

    def __init__(self, checkout: str):
        command = [sys.executable, "-m", "bench.torch_mlir", checkout, "--work"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, bufsize=0, **pipes)
        self._buffer = b""
        self.names: list[str] = self._reply(_START_SECONDS)
        if not self.names:
            raise RuntimeError(f"A worker could not import the suite: {self.end()}")

    def run(self, name: str, seconds: float) -> dict[str, Any] | None:
        """Return the verdict; None where the process ended. Raises TimeoutError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{name}\n".encode())
        except BrokenPipeError:
            return None
        return self._reply(seconds)

    def _reply(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise TimeoutError
            if not (read := os.read(self._process.stdout.fileno(), 1 << 16)):
                return None
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def end(self) -> str:
        """End the process; return its exit status and what it wrote last."""
        if self._process.poll() is None:
            self._process.kill()
        status = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip()[-300:]
        self._errors.close()
        return f"exit status {status}: {last}"


# In the parent ----------------------------------------------------------------------------------


class Results:
    """Verdicts by case, saved as they come."""

    def __init__(self, path: str | None, total: int):
        self._path, self._total, self._lock = path, total, threading.Lock()
        self.cases: dict[str, dict[str, Any]] = {}
        if path and pathlib.Path(path).exists():
            self.cases = json.loads(pathlib.Path(path).read_text())["cases"]

    def add(self, name: str, verdict: dict[str, Any]) -> None:
        with self._lock:
            self.cases[name] = verdict
            shown = "" if verdict["verdict"] == "right" else f": {verdict['reason'][:120]}"
            print(
                f"{len(self.cases):5}/{self._total} {verdict['verdict']:11} {name}{shown}", file=sys.stderr, flush=True
            )
            if len(self.cases) % 20 == 0:
                self.save()

    def save(self) -> None:
        if self._path:
            from kpx.observe.demo import versions

            counts = collections.Counter(v["verdict"] for v in self.cases.values())
            record = {"versions": versions(), "summary": dict(counts), "cases": dict(sorted(self.cases.items()))}
            pathlib.Path(self._path).write_text(json.dumps(record, indent=1) + "\n")


def run_chunk(checkout: str, names: Iterable[str], seconds: float, results: Results) -> None:
    """Run cases in one worker, and in another after each death."""
    worker: _Worker | None = None
    for name in names:
        worker = worker or _Worker(checkout)
        start = time.monotonic()
        try:
            verdict = worker.run(name, seconds)
        except TimeoutError:
            verdict = {"verdict": "timeout", "reason": f"over {seconds:g} s", "strides": "", "breaks": []}
            worker.end()
            worker = None
        if verdict is None:
            assert worker is not None
            verdict = {"verdict": "died", "reason": worker.end(), "strides": "", "breaks": []}
            worker = None
        results.add(name, verdict | {"seconds": round(time.monotonic() - start, 2)})
    if worker is not None:
        worker.end()


def reason_of(verdict: dict[str, Any]) -> str:
    """Return a short reason that equal failures share: ops without a rule, Dynamo's reason of a break, or the message."""
    text = verdict["reason"]
    if ops := re.findall(r"^  ([\w:.]+): used by", text, re.M):
        return "no lowering rule: " + ", ".join(sorted(set(ops)))
    if verdict["verdict"] == "broken" and (reasons := re.findall(r"^    (\S.*)", text, re.M)):
        return "; ".join(sorted(set(reasons)))[:110]
    text = re.sub(r" in `[^`]*`| \[[\w.]+:\d+\]$", "", text)
    text = re.sub(r"`[A-Z]\w*`", "a model", text)  # the names of modules are those of cases
    return re.sub(r"\s+", " ", text)[:110]


def report(cases: dict[str, dict[str, Any]]) -> None:
    """Print the counts, and what was not right by reason."""
    console = Console(width=160)
    counts = collections.Counter(v["verdict"] for v in cases.values())
    table = Table("verdict", "cases", "meaning", title=f"{len(cases)} cases of torch-mlir's end-to-end suite")
    for verdict, meaning in _MEANINGS.items():
        table.add_row(verdict, str(counts[verdict]), meaning)
    table.add_row("other strides", str(sum(bool(v["strides"]) for v in cases.values())), "of those that are right")
    console.print(table)
    for verdict in ("refused", "broken", "wrong", "crash", "died", "timeout", "eager fails"):
        by_reason = collections.defaultdict(list)
        for name, v in sorted(cases.items()):
            if v["verdict"] == verdict:
                by_reason[reason_of(v)].append(name)
        if by_reason:
            shown = Table(verdict, "cases", "which", title=f"{verdict}, by reason")
            for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
                shown.add_row(reason, str(len(names)), ", ".join(names[:4]) + (", ..." if len(names) > 4 else ""))
            console.print(shown, markup=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", metavar="PATH", help="a checkout of llvm/torch-mlir")
    parser.add_argument("--json", metavar="FILE", help="read and write the verdicts here")
    parser.add_argument("--only", metavar="PATTERN", help="a regular expression of cases' names; run again where known")
    parser.add_argument("--again", action="append", default=[], help="a verdict whose cases run again; may be repeated")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300.0, help="the time limit of a case")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.checkout)
        return 0
    suite = pathlib.Path(options.checkout) / "projects" / "pt1" / "python" / "torch_mlir_e2e_test"
    if not suite.is_dir():
        parser.error(
            f"`{options.checkout}` has no {suite.relative_to(options.checkout)}: name a checkout of torch-mlir."
        )
    worker = _Worker(options.checkout)
    names = worker.names
    worker.end()
    results = Results(options.json, len(names))
    if options.only:
        chosen = [n for n in names if re.search(options.only, n)]
    else:
        chosen = [n for n in names if results.cases.get(n, {"verdict": None})["verdict"] in (None, *options.again)]
    chunks = [chosen[i : i + _CHUNK] for i in range(0, len(chosen), _CHUNK)]
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        running = [pool.submit(run_chunk, options.checkout, c, options.seconds, results) for c in chunks]
        for future in running:
            future.result()
    results.save()
    report({n: results.cases[n] for n in chosen} if options.only else results.cases)
    bad = {"wrong", "crash", "died"}
    return int(any(v["verdict"] in bad for v in results.cases.values()))


if __name__ == "__main__":
    sys.exit(main())
