"""`python -m kpx launch`: a script's processes, on this machine, under SLURM, or as a Kubernetes JobSet.

Here, a process that dies ends the others within seconds, and the job starts again from its last checkpoint; elsewhere the
cluster does the same, by what the manifest asks of it.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kpx.errors import ConfigError
from kpx.hardware.target import Target
from kpx.train.distributed import ATTEMPT, COORDINATOR, COUNT, DEVICES, JOB, NUMBER
from kpx.train.health import HUNG

CLUSTERS = ("local", "slurm", "jobset")
_PORT = 8476
_GRACE_SECONDS = 60.0  # for a checkpoint after the signal to stop


@dataclass(frozen=True)
class Job:
    """What is launched.

    Attributes:
        command: a script and its arguments.
        processes: how many; of a target, one a host.
        devices: CPU devices of each process, where they are local.
        restarts: how often the job may start again.
        least: the fewest processes that it may go on with; as many as `processes` where it is not elastic.
    """

    command: tuple[str, ...]
    processes: int
    devices: int
    restarts: int
    least: int


def local(job: Job, tell: Callable[[str], None]) -> int:
    """Runs a job's processes on this machine; gives the exit code.

    The first process's output is passed on, the others' is kept and shown where one of them fails.
    """
    processes, identity = job.processes, uuid.uuid4().hex
    stop: list[int] = []
    before = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(job.restarts + 1):
            failed = _attempt(job, processes, identity, attempt, stop, tell)
            if failed is None:
                return 0
            if stop:
                return 128 + stop[0]
            if attempt == job.restarts:
                tell(f"It failed {attempt + 1} times, which is all that --restarts {job.restarts} allows.")
                return failed if failed > 0 else 128 - failed
            if processes > job.least:
                processes -= 1
            tell(
                f"Starting again with {processes} processes, from the last checkpoint (restart {attempt + 1} of {job.restarts})."
            )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 1


def _attempt(job: Job, processes: int, identity: str, attempt: int, stop: list[int], tell) -> int | None:
    """Runs the processes once; gives the exit code of the first that failed, or None."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        logs = [pathlib.Path(folder) / f"{n}.log" for n in range(processes)]
        running = []
        for n in range(processes):
            told = {COORDINATOR: address, COUNT: str(processes), NUMBER: str(n), JOB: identity, ATTEMPT: str(attempt)}
            environment = {**os.environ, **told, DEVICES: str(job.devices), "JAX_PLATFORMS": "cpu"}
            environment.setdefault("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
            with open(logs[n], "wb") as log:
                output = {} if n == 0 else {"stdout": log, "stderr": subprocess.STDOUT}
                running.append(subprocess.Popen(_python(job.command), env=environment, **output))
        try:
            return _watched(running, logs, stop, tell)
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _watched(running: Sequence[subprocess.Popen], logs: Sequence[pathlib.Path], stop: list[int], tell) -> int | None:
    signalled, until = False, float("inf")
    while True:
        codes = [process.poll() for process in running]
        if all(code == 0 for code in codes):
            return None
        failed = next((n for n, code in enumerate(codes) if code), None)
        if failed is not None and not signalled:
            others = len(running) - 1
            tell(
                f"Process {failed} {_how(codes[failed] or 0)}; the {others} others are stopped."
                if others
                else f"It {_how(codes[failed] or 0)}."
            )
            if failed and (text := logs[failed].read_text(errors="replace").strip()):
                tell("\n".join(text.splitlines()[-20:]))
            return codes[failed]
        if stop and not signalled:
            tell(f"Told to stop: the processes have {_GRACE_SECONDS:.0f} s for a checkpoint.")
            signalled, until = True, time.monotonic() + _GRACE_SECONDS
            for process in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
        if signalled and (time.monotonic() > until or all(code is not None for code in codes)):
            return next((code for code in codes if code), None)
        time.sleep(0.1)


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return "hung and ended itself" if code == HUNG else f"ended with exit code {code}"


def _python(command: Sequence[str]) -> list[str]:
    return [sys.executable, *command] if command[0].endswith(".py") or command[0] == "-m" else list(command)


# Clusters --------------------------------------------------------------------------------------


def hosts(target: Target) -> tuple[int, int, int]:
    """A target's slices, the hosts of each, and the chips of each host."""
    if not target.shape:
        raise ConfigError(f"`--target {target}` has no size. Name one that has, as tpu-v5p:8x8x8 or cuda:h100:32x8.")
    if target.platform == "tpu":
        chips = 1
        for n in target.shape:
            chips *= n
        each = min(chips, 4 if len(target.shape) == 3 or chips >= 16 else 8)
        return target.slices, max(chips // each, 1), each
    return 1, target.shape[0], target.shape[1]


def sbatch(job: Job, target: Target, name: str) -> str:
    """A batch script for SLURM: one task a host, started again after a failure, told before its time is up."""
    _, count, each = hosts(target)
    command = shlex.join(_portable(job.command))
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={count}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={each}
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@{2 * _GRACE_SECONDS:.0f}
set -uo pipefail
export {JOB}="$SLURM_JOB_ID"
export {COUNT}="$SLURM_NTASKS"
export {COORDINATOR}="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{_PORT}"
for attempt in $(seq 0 {job.restarts}); do
  export {ATTEMPT}="$attempt"
  srun --kill-on-bad-exit=1 bash -c '{NUMBER}="$SLURM_PROCID" exec "$@"' kpx {command} && exit 0
  code=$?
done
exit "$code"
"""


_ACCELERATORS = {  # GKE's names
    "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice", "v7x": "tpu7x",
    "h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb", "b200": "nvidia-b200", "a100": "nvidia-a100-80gb",
}  # fmt: skip


def jobset(job: Job, target: Target, name: str, image: str) -> str:
    """A JobSet manifest: a job a slice, a pod a host; any failure starts all again, up to `restarts` times."""
    slices, each_hosts, chips = hosts(target)
    is_tpu = target.platform == "tpu"
    resource = "google.com/tpu" if is_tpu else "amd.com/gpu" if target.platform == "rocm" else "nvidia.com/gpu"
    selector = [
        f"cloud.google.com/gke-{'tpu-' if is_tpu else ''}accelerator: {_ACCELERATORS.get(target.chip or '', target.chip)}"
    ]
    if is_tpu:
        selector.append(f"cloud.google.com/gke-tpu-topology: {'x'.join(map(str, target.shape))}")
    number = f"$(({each_hosts} * JOB_INDEX + JOB_COMPLETION_INDEX))"
    command = f"{NUMBER}={number} exec {shlex.join(_portable(job.command))}"
    lines = "\n".join(f"              {line}" for line in selector)
    return f"""apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
spec:
  failurePolicy:
    maxRestarts: {job.restarts}
  replicatedJobs:
  - name: slice
    replicas: {slices}
    template:
      spec:
        parallelism: {each_hosts}
        completions: {each_hosts}
        completionMode: Indexed
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: {2 * _GRACE_SECONDS:.0f}
            nodeSelector:
{lines}
            containers:
            - name: train
              image: {image}
              command: ["bash", "-c", {_quoted(command)}]
              ports:
              - containerPort: {_PORT}
              env:
              - name: {COORDINATOR}
                value: "{name}-slice-0-0.{name}:{_PORT}"
              - name: {COUNT}
                value: "{slices * each_hosts}"
              - name: {JOB}
                value: "{name}"
              - name: JOB_INDEX
                valueFrom:
                  fieldRef:
                    fieldPath: "metadata.annotations['jobset.sigs.k8s.io/job-index']"
              - name: {ATTEMPT}
                valueFrom:
                  fieldRef:
                    fieldPath: "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
              resources:
                limits:
                  {resource}: {chips}
"""


def submitted(cluster: str, path: pathlib.Path) -> list[str] | None:
    """The command that starts a manifest, where its program is here."""
    program = {"slurm": "sbatch", "jobset": "kubectl"}[cluster]
    if shutil.which(program) is None:
        return None
    return [program, str(path)] if cluster == "slurm" else [program, "apply", "-f", str(path)]


def _portable(command: Sequence[str]) -> list[str]:
    return ["python", *command] if command[0].endswith(".py") or command[0] == "-m" else list(command)


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)
