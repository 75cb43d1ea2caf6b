"""Launching: processes that train as one, survive what kills them, and manifests for clusters."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import kpx
from kpx.train import launch
from tests.train.launched import STEPS, command_for, environment, launched, losses_of


@pytest.fixture(scope="module")
def alone():
    """The losses of one device."""
    return launched("auto", "", processes=1)[0]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_costs_nothing_of_the_loss_curve(alone, tmp_path, seed):
    rng = np.random.default_rng(seed)
    death = f"{rng.integers(2)}:{rng.integers(2, STEPS + 1)}"
    found, done = launched('{"fsdp": 2}', tmp_path, death)
    assert "was killed by signal 9" in done.stderr
    assert "Starting again with 2 processes" in done.stderr
    np.testing.assert_allclose([found[n] for n in sorted(alone)], [alone[n] for n in sorted(alone)], atol=1e-4)


@pytest.mark.slow
def test_it_goes_on_with_fewer_processes_where_it_may(alone, tmp_path):
    found, done = launched("auto", tmp_path, "1:7", options=["--elastic", "1"])
    assert "Starting again with 1 processes" in done.stderr
    np.testing.assert_allclose([found[n] for n in sorted(alone)], [alone[n] for n in sorted(alone)], atol=1e-4)


@pytest.mark.slow
def test_told_to_stop_it_saves_and_ends(tmp_path):
    command = command_for('{"fsdp": 2}', tmp_path, steps=100_000)
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"step": 6'):
                process.send_signal(signal.SIGTERM)
                break
        output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors[-3000:]
    ended = json.loads(output.splitlines()[-2] if '"ended"' not in output.splitlines()[-1] else output.splitlines()[-1])
    assert ended["ended"] >= 6
    assert (tmp_path / str(ended["ended"])).is_dir()


def test_a_step_that_hangs_is_named_and_ends_the_process():
    source = (
        "import time\nfrom kpx.train.health import Watchdog\n"
        "dog = Watchdog(1.0)\ndog.at(7)\ntime.sleep(60)\n"
    )  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment(), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == launch.HUNG
    assert "process 0 hangs in step 7" in done.stderr
    assert "time.sleep" in done.stderr or "Thread" in done.stderr
    assert time.monotonic() - began < 60


JOB = launch.Job(("train.py", "--rate", "1e-3"), 1, 1, 5, 1)


def test_a_slurm_script_starts_a_task_a_host_and_is_bash(tmp_path):
    text = launch.sbatch(JOB, kpx.Target("cuda:h100:32x8"), "llama")
    assert "--nodes=32" in text
    assert "--gpus-per-node=8" in text
    assert "seq 0 5" in text
    (tmp_path / "job").write_text(text)
    subprocess.run(["bash", "-n", str(tmp_path / "job")], check=True)


def test_a_jobset_has_a_job_a_slice_and_a_pod_a_host():
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(launch.jobset(JOB, kpx.Target("tpu-v5e:16x16*2"), "llama", "image:1"))
    (job,) = found["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert job["replicas"] == 2
    assert job["template"]["spec"]["parallelism"] == 64
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    told = {e["name"]: e.get("value") for e in container["env"]}
    assert told["KPX_PROCESSES"] == "128"
    assert container["command"][-1].endswith("exec python train.py --rate 1e-3")


def test_a_cluster_without_a_target_is_an_error(capsys):
    from kpx.cli import main

    assert main(["launch", "--cluster", "slurm", "train.py"]) == 1
    assert "needs `--target`" in capsys.readouterr().err


@pytest.mark.slow
def test_it_goes_on_from_eight_devices_on_four_and_back(alone, tmp_path):
    found = {}
    for devices, plan, steps in ((4, '{"fsdp": 8}', 4), (2, '{"tensor": 4}', 8), (4, '{"data": 4, "fsdp": 2}', 12)):
        some, _ = launched(plan, tmp_path, processes=2, devices=devices, steps=steps)
        assert min(some) == len(found) + 1
        found |= some
    np.testing.assert_allclose([found[n] for n in sorted(found)], [alone[n] for n in sorted(found)], atol=1e-4)
    assert len(found) == 12


_DISAGREES = """
import os, sys
import numpy as np
from kpx.train import Trainer, initialize
initialize()
import jax.numpy as jnp, optax
from kpx.train.checkpoint import Checkpoints
from kpx.train.distributed import NUMBER
reads = Checkpoints._read
def read(self, step, like):  # the second process's disk is at fault
    found = reads(self, step, like)
    return (None, "planted") if os.environ[NUMBER] == "1" and step == 4 and sys.argv[2] == "6" else found
Checkpoints._read = read
def data():
    rng = np.random.default_rng(0)
    while True:
        yield rng.standard_normal((8, 16)).astype(np.float32)
trainer = Trainer(lambda p, b: jnp.mean((b @ p["w"]) ** 2), optax.adam(0.1), params={"w": jnp.ones((16, 8))}, plan={"fsdp": 2},
                  checkpoints=sys.argv[1], save_every=2, log_every=1)
trainer.fit(data(), int(sys.argv[2]))
trainer.close()
"""


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "kept"
    script.write_text(_DISAGREES)
    told = []
    for steps in (4, 6):
        command = [sys.executable, "-m", "kpx", "launch", "--processes", "2", str(script), str(folder), str(steps)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        told.append(losses_of(done.stdout))
    assert list(told[1]) == [3, 4, 5, 6]
    np.testing.assert_allclose(told[1][4], told[0][4], rtol=1e-6)
    assert "another process could not read it" in done.stderr
