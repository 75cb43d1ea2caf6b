"""Eight threads call four shapes of one model while a ninth compiles new ones: `python -m bench.threads [--seconds 60]`.

Every value is compared with eager PyTorch's, computed beforehand. `--grad` calls with gradients.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import sys
import threading
import time
import warnings

import torch

import kpx

_WIDTH = 64
_CALLERS = 8


def run(seconds: float, grad: bool) -> tuple[collections.Counter, list[str]]:
    """Call and compile for a time; return how many calls and programs there were, and what went wrong."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(_WIDTH, 256), torch.nn.GELU(), torch.nn.Linear(256, 8)).eval()
    inputs = {n: torch.randn(n, _WIDTH) for n in range(1, 2000)}
    with torch.no_grad():
        wanted = {n: model(inputs[n]) for n in range(1, 5)}
    counts: collections.Counter = collections.Counter()
    errors: list[str] = []
    end = time.monotonic() + seconds
    optimized = kpx.optimize(model)

    def call(first: int, shapes: range) -> None:
        n = first
        while time.monotonic() < end and len(errors) < 20:
            batch = shapes[n % len(shapes)]
            n += 1
            try:
                with contextlib.nullcontext() if grad else torch.no_grad():
                    got = optimized(inputs[batch])
                    want = wanted[batch] if batch in wanted else model(inputs[batch])
                if not torch.allclose(got.detach(), want.detach(), atol=1e-4):
                    errors.append(f"batch {batch}: a wrong value")
            except Exception as error:  # whatever a thread raises is what is counted
                errors.append(f"batch {batch}: {type(error).__name__}: {str(error)[:300]}")
            counts["compiling" if batch > 4 else "calls"] += 1

    works = [threading.Thread(target=call, args=(i, range(1, 5))) for i in range(_CALLERS)]
    works.append(threading.Thread(target=call, args=(0, range(5, 2000))))
    for work in works:
        work.start()
    for work in works:
        work.join()
    return counts, errors


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.threads", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--grad", action="store_true")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    counts, errors = run(options.seconds, options.grad)
    for error, times in collections.Counter(errors).most_common(10):
        print(f"{times} times: {error}")
    print(
        f"{_CALLERS} threads made {counts['calls']} calls of four shapes while another called {counts['compiling']} "
        f"new ones, in {options.seconds:.0f} s: {len(errors)} errors or wrong values"
    )
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
