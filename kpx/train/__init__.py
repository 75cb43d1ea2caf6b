"""Training: a step, planned and run, that survives what happens to the processes it runs in."""

from kpx.sharding.exchange import Exchange
from kpx.train.distributed import initialize
from kpx.train.fit import fit_batch
from kpx.train.step import State, Step
from kpx.train.trainer import Trainer

__all__ = ["Exchange", "State", "Step", "Trainer", "fit_batch", "initialize"]
