"""Fine-tuning MiniLM: is the loss eager's, and how long does a step take?

`python -m bench.finetune [--json FILE] [--steps 50] [--rounds 8]`

The model has its real weights and learns to tell which family of Python's standard library a docstring is from. The
curve is compared with dropout off, since every library draws its own numbers; steps are timed with dropout on, batch
16 x 64, AdamW by torch, in turn within one process.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import kpx
from kpx.hardware.cpu import model
from kpx.observe import minilm

FAMILIES = (
    ("math", "cmath", "statistics", "fractions", "decimal", "random", "heapq", "bisect"),
    ("os", "shutil", "pathlib", "tempfile", "glob", "socket", "subprocess", "tarfile"),
)
BATCH, LENGTH = 16, 64


def texts() -> list[tuple[str, int]]:
    """The first sentence of every public docstring of the two families, with the family's number."""
    found = []
    for label, modules in enumerate(FAMILIES):
        for name in modules:
            module = importlib.import_module(name)
            for attribute in sorted(vars(module)):
                doc = inspect.getdoc(getattr(module, attribute)) if not attribute.startswith("_") else None
                sentence = re.split(r"(?<=\.)\s", " ".join((doc or "").split()))[0]
                if len(sentence.split()) >= 5:
                    found.append((sentence, label))
    return sorted(set(found))


class Classifier(torch.nn.Module):
    """MiniLM, the mean over its tokens, and a linear layer."""

    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.config.hidden_size, len(FAMILIES))  # type: ignore[union-attr,arg-type]

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        shown = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * shown).sum(1) / shown.sum(1))


def batches(tokenizer: Any, count: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Seeded batches of 16 texts of 64 tokens."""
    examples, generator = texts(), torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        chosen = [examples[i] for i in torch.randint(len(examples), (BATCH,), generator=generator).tolist()]
        tokens = minilm.tokenize(tokenizer, [t for t, _ in chosen], LENGTH)
        tokens = {k: tokens[k] for k in ("input_ids", "attention_mask")}
        made.append((tokens, torch.tensor([label for _, label in chosen])))
    return made


WAYS: dict[str, Callable[[torch.nn.Module], Callable]] = {
    "eager": lambda model: model,
    "torch.compile": torch.compile,
    "kpx": lambda model: kpx.optimize(model),
}


def trainer(base: torch.nn.Module, way: str) -> Callable[[tuple], float]:
    """`step(batch) -> loss` of a copy of a model, trained one way."""
    model = copy.deepcopy(base)
    call = WAYS[way](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    def step(batch: tuple) -> float:
        tokens, labels = batch
        loss = torch.nn.functional.cross_entropy(call(**tokens), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def curves(base: torch.nn.Module, data: list) -> dict[str, list[float]]:
    """Losses of eager PyTorch and of kpx over the same batches, dropout off."""
    plain = without_dropout(base)
    return {way: [step(batch) for batch in data] for way in ("eager", "kpx") for step in [trainer(plain, way)]}


def timings(base: torch.nn.Module, data: list, rounds: int) -> dict[str, float]:
    """Median seconds of a step for each way, in turn: three steps a turn, of which the first does not count."""
    steps = {way: trainer(base, way) for way in WAYS}
    for step in steps.values():
        step(data[0])
        step(data[1])
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(rounds):
        for way, step in steps.items():
            step(data[i % len(data)])
            for j in (1, 2):
                start = time.perf_counter()
                step(data[(i + j) % len(data)])
                taken[way].append(time.perf_counter() - start)
    return {way: statistics.median(seconds) for way, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=8, help="of timing; 0 leaves it out")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    encoder, tokenizer = minilm.load()
    base = Classifier(encoder).train()
    data = batches(tokenizer, given.steps)
    found = curves(base, data)
    worst = max(abs(a - b) for a, b in zip(found["eager"], found["kpx"], strict=True))
    print(f"loss from {found['eager'][0]:.4f} to {found['eager'][-1]:.4f}; largest difference from eager {worst:.1e}")
    record: dict[str, Any] = {"largest_difference": worst, "losses": found, "texts": len(texts())}
    if given.rounds:
        seconds = timings(base, data, given.rounds)
        ratios = {way: seconds[way] / seconds["kpx"] for way in ("eager", "torch.compile")}
        print("kpx's step is " + ", ".join(f"{r:.2f} times as fast as {way}'s" for way, r in ratios.items()))
        record["times_faster_than"] = ratios
    if given.json:
        import jax

        versions = {"jax": jax.__version__, "torch": torch.__version__, "python": platform.python_version()}
        machine = {"processor": model(), "cores": os.cpu_count()}
        with open(given.json, "w") as file:
            json.dump(
                {"date": time.strftime("%Y-%m-%d"), "versions": versions, "machine": machine, **record}, file, indent=1
            )
            file.write("\n")


if __name__ == "__main__":
    main()
