"""What the tests launch: a small Llama, or by a plan with experts a mixture of them, trained; dies at a step where it is told to.

Arguments: the axes of its plan as JSON, or a list of such, trained one after another; a folder of checkpoints, how many steps, and `process:step` to kill itself at, in the
first attempt.
"""

import json
import os
import signal
import sys

import numpy as np
import optax

import kpx  # noqa: F401
from kpx.train import Trainer, initialize
from kpx.train.distributed import ATTEMPT, NUMBER

initialize()

import jax  # noqa: E402

from tests.sharding import steps, test_experts  # noqa: E402


def batches(death="", experts=False):
    rng = np.random.default_rng(0)
    process, step = (int(n) for n in (death or "-1:-1").split(":"))
    number = 0
    while True:
        number += 1
        if number == step and os.environ.get(NUMBER, "0") == str(process) and os.environ.get(ATTEMPT) == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        tokens = rng.integers(0, 256, (16, 32)).astype(np.int32)
        yield rng.standard_normal((16, 4, 16)).astype(np.float32) if experts else tokens


def main():
    plan, folder, count, *death = sys.argv[1:]
    plan = plan if plan == "auto" else json.loads(plan)
    for one in plan if isinstance(plan, list) else [plan]:
        train(one, folder, int(count), *death)


def train(plan, folder, count, *death):
    experts = "expert" in plan
    loss, params = (test_experts.loss, test_experts.start()) if experts else (steps.llama_loss(), steps.start()[0])
    trainer = Trainer(
        loss, optax.adamw(1e-3), params=params, plan=plan, clip=1.0, log_every=1, checkpoints=folder or None, save_every=4
    )  # fmt: skip
    trainer.fit(batches(*death, experts=experts), count)
    trainer.close()
    assert trainer.plan is not None
    if jax.process_index() == 0:
        print(json.dumps({"ended": int(trainer.state.step), "mesh": trainer.plan.mesh}), flush=True)


if __name__ == "__main__":
    main()
