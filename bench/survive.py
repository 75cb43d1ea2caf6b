"""Processes that die: does the loss curve stay what it was? And how does the local example scale?

`python -m bench.survive [--json FILE] [--repetitions 20] [--processes 4]`

Each repetition kills one process (SIGKILL) at a step, both drawn with a seed, while a small Llama trains; the job starts again from
its last checkpoint, and every loss is compared with those of an undisturbed run. Scaling: steps a second of 1, 2 and 4 processes
over the same batches, as ratios; they share this machine's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.sharding import environment
from kpx.train.distributed import ATTEMPT, NUMBER

STEPS, SAVE_EVERY = 20, 4


def child(folder: str, plan: dict[str, int], death: str) -> None:
    """What is launched: trains, and kills itself at a step of the first attempt."""
    from kpx.train import Trainer, initialize

    initialize()
    import optax

    from bench import train_llama

    process, step = (int(n) for n in death.split(":"))

    def batches() -> Iterator[Any]:
        for number, batch in enumerate(train_llama.batches(), 1):
            if number == step and os.environ.get(NUMBER) == str(process) and os.environ.get(ATTEMPT) == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    made, _ = train_llama.torch_model()
    options = {"checkpoints": folder or None, "save_every": SAVE_EVERY, "log_every": 1}
    trainer = Trainer(made, optax.adamw(1e-3), plan=plan, clip=1.0, **options)
    trainer.fit(batches(), STEPS)
    trainer.close()


def launched(processes: int, folder: str = "", death: str = "-1:-1") -> tuple[dict[int, float], list[float], int]:
    """Losses by step, seconds of each step, and how often it started."""
    command = [sys.executable, "-m", "kpx", "launch", "--processes", str(processes), "--", "-m", "bench.survive"]
    command += ["--child", folder, "--plan", json.dumps({"fsdp": processes}), f"--death={death}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"A run failed:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    steps = [line for line in lines if "step" in line]
    attempts = max(line["attempt"] for line in lines if "attempt" in line)
    return {s["step"]: s["loss"] for s in steps}, [s["seconds"] for s in steps], attempts + 1


def run(repetitions: int, processes: int) -> dict[str, Any]:
    """All repetitions, and the scaling."""
    undisturbed, _, _ = launched(processes)
    rows = []
    for seed in range(repetitions):
        rng = np.random.default_rng(seed)
        death = f"{rng.integers(processes)}:{rng.integers(2, STEPS + 1)}"
        with tempfile.TemporaryDirectory() as folder:
            losses, _, starts = launched(processes, folder, death)
        far = max(abs(losses[n] - undisturbed[n]) for n in undisturbed)
        rows.append({"seed": seed, "killed": death, "starts": starts, "farthest loss": far})
        print(f"repetition {seed}: process and step {death}, {starts} starts, losses within {far:.1e}", file=sys.stderr)
    scaling = {str(n): statistics.median(launched(n)[1][2:]) for n in (1, 2, 4)}
    return {
        **environment(),
        "repetitions": rows,
        "scaling": {n: scaling["1"] / taken for n, taken in scaling.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--death", default="-1:-1", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(given.child, given.plan, given.death)
        return 0
    found = run(given.repetitions, given.processes)
    worst = max((row["farthest loss"] for row in found["repetitions"]), default=0.0)
    print(f"{len(found['repetitions'])} repetitions; the farthest loss is {worst:.1e} from the undisturbed run's.")
    print(
        "Steps a second over one process's: " + ", ".join(f"{n} processes {r:.2f}" for n, r in found["scaling"].items())
    )
    if given.json:
        with open(given.json, "w") as file:
            json.dump(found, file, indent=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
