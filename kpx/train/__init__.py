"""Training: a step, planned and run, that survives what happens to the processes it runs in."""

from kpx.train.distributed import initialize
from kpx.train.fit import fit_batch
from kpx.train.step import State, Step
from kpx.train.trainer import Trainer

__all__ = ["State", "Step", "Trainer", "fit_batch", "initialize"]
