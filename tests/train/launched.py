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
        command_for(*arguments, **options), env=environment(), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, (done.stdout[-1500:], done.stderr[-3000:])
    return losses_of(done.stdout), done


def losses_of(output):
    """Of each step the last loss that was told, by lines of JSON."""
    return {line["step"]: line["loss"] for line in _lines(output) if "step" in line}


def losses_of_each(plans, **options):
    """Of each plan, trained one after another in the same processes, the losses by step."""
    _, done = launched(json.dumps(plans), "", **options)
    found, of_one = [], {}
    for line in _lines(done.stdout):
        if "step" in line:
            of_one[line["step"]] = line["loss"]
        elif "ended" in line:
            found.append((line["mesh"], of_one))
            of_one = {}
    return found


def _lines(output):
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]
