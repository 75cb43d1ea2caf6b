"""A PyTorch Llama from Hugging Face, trained on whatever is there; `--flax` trains a flax model by the same lines.

python -m bench.train_llama --steps 20                                                   # this process alone
python -m kpx launch --processes 4 --devices 2 -m bench.train_llama --plan '{"fsdp": 8}'  # four processes here
python -m bench.train_llama --target tpu-v5e:4x4                                          # a plan for a pod that is not here
"""

import argparse
import json
import os

import numpy as np
import optax

import kpx
from kpx.train import Trainer, initialize

os.environ.setdefault("HF_HUB_OFFLINE", "1")
VOCABULARY, LENGTH, BATCH = 512, 64, 16


def torch_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, vocab_size=VOCABULARY, use_cache=False)
    return LlamaForCausalLM(config), None


def flax_model():
    import jax.numpy as jnp
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(VOCABULARY, 64, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(4)])

        def __call__(self, ids):
            x = self.table(ids)
            for layer in self.layers:
                x = x + jnp.tanh(layer(x))
            return self.table.attend(x)

    def loss(call, batch):
        logits = call(batch["input_ids"][:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"][:, 1:]))

    return Model(nnx.Rngs(0)), loss


def batches():
    rng = np.random.default_rng(0)
    while True:
        ids = np.cumsum(rng.integers(0, 4, (BATCH, LENGTH)), 1) % VOCABULARY  # something to learn
        yield {"input_ids": ids.astype(np.int32), "labels": ids.astype(np.int32)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--flax", action="store_true")
    parser.add_argument("--target")
    parser.add_argument("--plan", default="auto", type=lambda text: text if text == "auto" else json.loads(text))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoints")
    options = parser.parse_args()
    initialize()
    model, loss = flax_model() if options.flax else torch_model()
    trainer = Trainer(model, optax.adamw(1e-3), loss=loss, plan=options.plan, target=options.target,
                      checkpoints=options.checkpoints, clip=1.0)  # fmt: skip
    if options.target and not kpx.Target(options.target).is_present:
        plan = trainer.planned(next(batches()))
        print(plan.explain())
        print(kpx.compile(plan.apply(trainer.step), *plan.specs, target=plan.target).memory)
    else:
        trainer.fit(batches(), options.steps)
    trainer.close()
