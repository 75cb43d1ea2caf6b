"""Processes that train as one, started as users do, and the losses that they tell."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 20


def command_for(plan, folder, *further, processes=2, devices=1, steps=STEPS, options=()):
    given = [sys.executable, "-m", "kpx", "launch", "--processes", str(processes), "--devices", str(devices), *options]
    return [*given, str(ROOT / "tests" / "train" / "script.py"), plan, str(folder), str(steps), *further]


def environment():
    paths = [str(ROOT), *(p for p in sys.path if p)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def launched(*arguments, **options):
    done = subprocess.run(
        command_for(*arguments, **options), env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, (done.stdout[-1500:], done.stderr[-3000:])
    return losses_of(done.stdout), done


def losses_of(output):
    """Of each step the last loss that was told, by lines of JSON; and the last line's."""
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line["step"]: line["loss"] for line in lines if "step" in line}
