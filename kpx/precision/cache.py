"""Keys and values of a decoder's attention, kept in int8 or FP8."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpx.errors import ConfigError, InputError
from kpx.precision import formats

_KINDS: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "key_scales", "values", "value_scales", "length"],
    meta_fields=["precision"],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of the tokens so far, each token's and head's by a scale of its own, symmetric.

    A pytree: it goes through `kpx.jit`, scans and checkpoints, and can be donated. A quarter of f32's bytes, and half of bf16's, and
    the scales: 4 bytes for each token and head.

    Attributes:
        keys, values: int8 or e4m3, `[batch, heads, capacity, width]`.
        key_scales, value_scales: f32 `[batch, heads, capacity]`.
        length: i32 `[]`, how many tokens there are.
        precision: `int8` or `fp8`.
    """

    keys: jax.Array
    key_scales: jax.Array
    values: jax.Array
    value_scales: jax.Array
    length: jax.Array
    precision: str = "int8"

    @classmethod
    def zeros(cls, batch: int, heads: int, capacity: int, width: int, precision: str = "int8") -> KVCache:
        """An empty one, for so many tokens.

        Raises:
            ConfigError: the precision is not one of `int8` and `fp8`.
        """
        if precision not in _KINDS:
            raise ConfigError(f"`precision={precision!r}` is none that a cache is kept in. Use 'int8' or 'fp8'.")
        numbers = jnp.zeros((batch, heads, capacity, width), _KINDS[precision])
        scales = jnp.zeros((batch, heads, capacity), jnp.float32)
        return cls(numbers, scales, numbers, scales, jnp.zeros((), jnp.int32), precision)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(a.nbytes for a in (self.keys, self.key_scales, self.values, self.value_scales))

    def append(self, keys: jax.Array, values: jax.Array) -> KVCache:
        """It with more tokens, `[batch, heads, tokens, width]`, of any floating dtype.

        Raises:
            InputError: their shape does not fit, or there is no room for them (where the length is known, outside of `jit`;
                within, the last ones are overwritten).
        """
        batch, heads, capacity, width = self.keys.shape
        if keys.shape != values.shape or keys.ndim != 4 or (*keys.shape[:2], keys.shape[3]) != (batch, heads, width):
            raise InputError(
                f"Keys {list(keys.shape)} and values {list(values.shape)} do not fit a cache of {[batch, heads, 'tokens', width]}."
            )
        known = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if known + keys.shape[2] > capacity:
            raise InputError(
                f"The cache has room for {capacity} tokens, and {known} are in it: {keys.shape[2]} more do not fit. Make it larger: "
                "`KVCache.zeros(batch, heads, capacity, width)`."
            )
        changes: dict[str, Any] = {"length": self.length + keys.shape[2]}
        for name, given in (("key", keys), ("value", values)):
            numbers, scales = self._quantized(given)
            at = (0, 0, self.length, 0)
            changes[f"{name}s"] = jax.lax.dynamic_update_slice(getattr(self, f"{name}s"), numbers, at)
            changes[f"{name}_scales"] = jax.lax.dynamic_update_slice(getattr(self, f"{name}_scales"), scales, at[:3])
        return dataclasses.replace(self, **changes)

    def _quantized(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32)
        if self.precision == "fp8":
            numbers, scales = formats.scaled(x, "e4m3", -1)
            return numbers.astype(jnp.float8_e4m3fn), scales[..., 0]
        numbers, scales = formats.in_integers(x, 127, -1)
        return numbers.astype(jnp.int8), scales[..., 0]

    def attend(self, query: jax.Array, *, scale: float | None = None) -> jax.Array:
        """Causal attention of the last tokens' queries over all that is in it.

        Args:
            query: `[batch, query heads, tokens, width]`, of the tokens that were appended last; query heads may be several times
                the cache's, which they share in order.
            scale: of the scores; 1 / sqrt(width) by default.

        Returns:
            Of the query's shape and dtype. Scores, softmax and sums are f32; scales come after the products.

        Raises:
            InputError: the query's shape does not fit.
        """
        batch, heads, capacity, width = self.keys.shape
        if query.ndim != 4 or query.shape[0] != batch or query.shape[3] != width or query.shape[1] % heads:
            raise InputError(f"A query {list(query.shape)} does not fit a cache of {[batch, heads, capacity, width]}.")
        shared, tokens = query.shape[1] // heads, query.shape[2]
        q = query.astype(jnp.float32).reshape(batch, heads, shared, tokens, width)
        by = np.float32(width**-0.5 if scale is None else scale)
        scores = (
            jnp.einsum("bhgtd,bhld->bhgtl", q, self.keys.astype(jnp.float32)) * by * self.key_scales[:, :, None, None]
        )
        last = self.length - tokens + jnp.arange(tokens)
        seen = jnp.arange(capacity) <= last[:, None]
        shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
        weighed = jnp.where(seen, shares * self.value_scales[:, :, None, None], 0.0)
        found = jnp.einsum("bhgtl,bhld->bhgtd", weighed, self.values.astype(jnp.float32))
        return found.reshape(query.shape).astype(query.dtype)
