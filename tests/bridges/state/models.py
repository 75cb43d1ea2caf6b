"""Twelve kinds of small models for the state fuzz.

Every model takes `forward(x, y=None, factor=1.0, nested=None)` and reads attributes of every type in `finish`, so that
each mutation of the fuzz applies to each model.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

WIDTH = 8
GLOBALS: dict[str, Any] = {"gain": 1.0, "shift": 0.0}
global_gain = 1.0

Pair = collections.namedtuple("Pair", "value rest")


@dataclasses.dataclass
class Record:
    """An output that no pytree knows."""

    value: torch.Tensor
    count: int


def halve(x):
    return x * 0.5


def cube(x):
    return x * x * x


def rescaled(x):
    """A function that models call by its global name, which the fuzz binds to another one."""
    return x * 1.25


class Adjustable(torch.nn.Module):
    """Base of all models: `begin` and `finish` read the arguments and the attributes that the fuzz changes."""

    class_gain = 1.0
    polarity = 1

    def __init__(self):
        super().__init__()
        self.scale = 1.0
        self.offset = 0
        self.flag = False
        self.mode = "plain"
        self.returns = "tensor"
        self.writes = False
        self.fresh = False
        self.steps: list[float] = []
        self.options: dict[str, Any] = {"gain": 1.0}
        self.extra: torch.Tensor | None = None
        self.function: Callable | None = None
        self.tail: torch.nn.Module | None = None
        self.gate = torch.nn.Parameter(torch.full((1,), 0.75))
        self.register_buffer("memory", torch.full((1,), 0.25))
        self.register_buffer("optional", None)

    def begin(self, x, y, factor, nested):
        if y is not None:
            if self.writes:
                y.mul_(0.5)
            x = x + y
        if nested is not None:
            x = x * nested["weights"][0] + nested["pair"].value + nested["weights"][1]["shift"]
        return x * factor

    def finish(self, x, y, source):
        x = x * self.scale + self.offset
        if self.flag:
            x = -x
        if self.mode == "tanh":
            x = x.tanh()
        elif self.mode == "sin":
            x = x.sin()
        for step in self.steps:
            x = x + step
        for key in sorted(self.options):
            x = x * self.options[key]
        if self.extra is not None:
            x = x + self.extra
        if self.optional is not None:
            x = x - self.optional
        if self.function is not None:
            x = self.function(x)
        if self.tail is not None:
            x = self.tail(x)
        if self.fresh:
            x = x + torch.full((1,), 0.5)
        x = rescaled(x * self.gate) + self.memory
        x = x * (self.class_gain * global_gain * GLOBALS["gain"]) + GLOBALS["shift"]
        return self.result(x * self.polarity, y, source)

    def result(self, x, y, source):
        if self.returns == "many":
            out = {"out": x, "view": x[0], "input": source, "companion": y, "part": source.flatten(0, 1)}
            return {**out, "gate": self.gate, "memory": self.memory, "row": self.memory[:1], "count": self.offset}
        if self.returns == "pair":
            return Pair(x, [x.sum(), None, "text"])
        if self.returns == "record":
            return Record(x, self.offset)
        if self.returns == "transposed":
            return x.transpose(0, -1), x.permute(*reversed(range(x.dim()))).contiguous()
        return x


class ConvNet(Adjustable):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, WIDTH)

    def forward(self, x, y=None, factor=1.0, nested=None):
        h = F.relu(self.norm(self.conv(self.begin(x, y, factor, nested))))
        return self.finish(self.head(h.mean((2, 3))), y, x)


class Encoder(Adjustable):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.head = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y=None, factor=1.0, nested=None):
        return self.finish(self.head(self.layer(self.begin(x, y, factor, nested))), y, x)


class Decoder(Adjustable):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.head = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.heads = 2
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x, y=None, factor=1.0, nested=None):
        h = self.begin(x, y, factor, nested)
        batch, length, _ = h.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, -1))
        mask = self.mask[:length, :length]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.finish(self.head(h + attended), y, x)


class LoRALinear(torch.nn.Module):
    """A linear layer with named low-rank adapters that can be chosen, disabled and merged."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        self.down = torch.nn.ModuleDict()
        self.up = torch.nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.active: list[str] = []
        self.disabled = False
        self.merged: list[str] = []

    def add(self, name: str, rank: int = 2):
        weight = self.base.weight
        self.down[name] = torch.nn.Linear(self.base.in_features, rank, bias=False).to(weight.dtype)
        self.up[name] = torch.nn.Linear(rank, self.base.out_features, bias=False).to(weight.dtype)
        self.scaling[name] = 1.5

    def delta(self, name: str):
        return self.up[name].weight @ self.down[name].weight * self.scaling[name]

    def merge(self):
        for name in self.active:
            if name not in self.merged:
                self.base.weight.data += self.delta(name).data
                self.merged.append(name)

    def unmerge(self):
        while self.merged:
            self.base.weight.data -= self.delta(self.merged.pop()).data

    def forward(self, x):
        if self.disabled:
            if self.merged:
                self.unmerge()
            return self.base(x)
        result = self.base(x)
        if not self.merged:
            for name in self.active:
                result = result + self.up[name](self.down[name](x)) * self.scaling[name]
        return result


class Adapted(Adjustable):
    def __init__(self):
        super().__init__()
        self.first = LoRALinear(torch.nn.Linear(WIDTH, WIDTH))
        self.second = LoRALinear(torch.nn.Linear(WIDTH, WIDTH))
        for layer in (self.first, self.second):
            layer.add("default")
            layer.add("other")
            layer.active = ["default"]

    def forward(self, x, y=None, factor=1.0, nested=None):
        return self.finish(self.second(F.gelu(self.first(self.begin(x, y, factor, nested)))), y, x)


class Recurrent(Adjustable):
    def __init__(self):
        super().__init__()
        self.cell = torch.nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y=None, factor=1.0, nested=None):
        h, (last, _) = self.cell(self.begin(x, y, factor, nested))
        return self.finish(self.head(h) + last[-1][:, None], y, x)


class Symmetric(torch.nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


class Normed(Adjustable):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(WIDTH, WIDTH))
        self.second = torch.nn.Linear(WIDTH, WIDTH)
        torch.nn.utils.parametrize.register_parametrization(self.second, "weight", Symmetric())

    def forward(self, x, y=None, factor=1.0, nested=None):
        return self.finish(self.second(self.first(self.begin(x, y, factor, nested)).sigmoid()), y, x)


class Caching(Adjustable):
    """Counts its calls, and keeps tensors in a dict, a list and an attribute."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.calls = 0
        self.positions: dict[int, torch.Tensor] = {}
        self.history: list[Any] = []
        self.last: torch.Tensor | None = None

    def forward(self, x, y=None, factor=1.0, nested=None):
        self.calls += 1
        h = self.first(self.begin(x, y, factor, nested))
        if len(h) not in self.positions:
            self.positions[len(h)] = torch.arange(len(h)).to(h.dtype)[:, None] / len(h)
        h = h + self.positions[len(h)] * (self.calls % 3)
        if self.last is not None and self.last.shape == h.shape:
            h = h + self.last
        self.last = h.detach()
        self.history.append(len(h))
        return self.finish(h, y, x)


class Dropping(Adjustable):
    """What dropout returns is an output of its own, compared by its statistics where it is random."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x, y=None, factor=1.0, nested=None):
        h = self.first(self.begin(x, y, factor, nested))
        return {"dropped": self.drop(torch.ones_like(h).repeat(40, 1)), "out": self.finish(h, y, x)}


class Tied(Adjustable):
    """Takes tokens; its embedding is also the weight of its last layer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.out = torch.nn.Linear(WIDTH, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x, y=None, factor=1.0, nested=None):
        return self.finish(self.out(self.norm(self.begin(self.embed(x), y, factor, nested))), y, x)


class Writing(Adjustable):
    """Writes its buffers: a mean, a counter, one row of a ring, and one that it replaces."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ring", torch.zeros(3, WIDTH))
        self.register_buffer("replaced", torch.zeros(WIDTH))

    def forward(self, x, y=None, factor=1.0, nested=None):
        h = self.first(self.begin(x, y, factor, nested))
        row = h.detach().mean(0).to(self.mean.dtype)
        self.mean.mul_(0.5).add_(row)
        self.ring[self.count % 3] = row
        self.count += 1
        self.replaced = self.replaced + row
        return self.finish(h + self.mean + self.ring.sum(0) + self.replaced + self.count, y, x)


class Container(Adjustable):
    """A list and a dict of modules, called in an order that an attribute says."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()])
        self.choices = torch.nn.ModuleDict({"a": torch.nn.Linear(WIDTH, WIDTH), "b": torch.nn.LeakyReLU(0.2)})
        self.order = ["a", "b"]

    def forward(self, x, y=None, factor=1.0, nested=None):
        h = self.begin(x, y, factor, nested)
        for layer in self.layers:
            h = layer(h)
        for name in self.order:
            if name in self.choices:
                h = self.choices[name](h)
        return self.finish(h, y, x)


class Branching(Adjustable):
    """Branches on an attribute, on a tensor's value, and calls Python that no graph holds."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.second = torch.nn.Linear(WIDTH, WIDTH)
        self.threshold = 0.0

    def forward(self, x, y=None, factor=1.0, nested=None):
        h = self.first(self.begin(x, y, factor, nested))
        if self.memory.item() > 0.3:
            h = h + 1
        if h.sum() > self.threshold:
            h = self.second(h)
        else:
            h = h * 2
        return self.finish(h, y, x)


def multiply_by_two(module, args, output):
    return output * 2


def add_one_before(module, args):
    return (args[0] + 1, *args[1:])


class Hooked(Adjustable):
    """Has hooks from its start."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.second = torch.nn.Linear(WIDTH, WIDTH)
        self.first.register_forward_hook(multiply_by_two)
        self.second.register_forward_pre_hook(add_one_before)

    def forward(self, x, y=None, factor=1.0, nested=None):
        return self.finish(self.second(self.first(self.begin(x, y, factor, nested)).relu()), y, x)


def _rows(batch: int, length: int) -> tuple[int, ...]:
    return batch, WIDTH


def _sequence(batch: int, length: int) -> tuple[int, ...]:
    return batch, length, WIDTH


def _image(batch: int, length: int) -> tuple[int, ...]:
    return batch, 3, length + 2, 6


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model's class, and the shape of the floating tensors that it adds up."""

    make: Callable[[], Adjustable]
    shape: Callable[[int, int], tuple[int, ...]] = _rows
    takes_tokens: bool = False


KINDS: dict[str, Kind] = {
    "convnet": Kind(ConvNet, _image),
    "encoder": Kind(Encoder, _sequence),
    "decoder": Kind(Decoder, _sequence),
    "adapted": Kind(Adapted),
    "recurrent": Kind(Recurrent, _sequence),
    "normed": Kind(Normed),
    "hooked": Kind(Hooked),
    "caching": Kind(Caching),
    "dropping": Kind(Dropping),
    "tied": Kind(Tied, _sequence, takes_tokens=True),
    "writing": Kind(Writing),
    "container": Kind(Container),
    "branching": Kind(Branching),
}


@functools.cache
def classes() -> tuple[type, ...]:
    """The models' classes, whose attributes the fuzz changes."""
    return (Adjustable, *(kind.make for kind in KINDS.values()))  # type: ignore[return-value]
