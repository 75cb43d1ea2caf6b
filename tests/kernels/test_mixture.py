"""A mixture of experts with its routing: against every expert computed densely, and by the grouped product's kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from tests.reference import assert_closer


def _dense(x, logits, gate, up, down, *, top_k, normalized=True):
    """Every row by every expert, and of those the chosen ones."""
    weights = jax.nn.softmax(logits.astype(jnp.promote_types(x.dtype, jnp.float32)), -1)
    kept = jnp.zeros_like(weights)
    rest = logits
    for _ in range(top_k):
        best = jnp.argmax(rest, -1)[..., None] == jnp.arange(logits.shape[-1])
        kept, rest = kept + best * weights, jnp.where(best, -jnp.inf, rest)
    if normalized:
        kept = kept / kept.sum(-1, keepdims=True)
    inner = jax.nn.silu(jnp.einsum("...d,edf->...ef", x, gate)) * jnp.einsum("...d,edf->...ef", x, up)
    return jnp.einsum("...ef,efd,...e->...d", inner, down, kept.astype(x.dtype))


@pytest.mark.parametrize(
    ("top_k", "shape", "normalized"), [(1, (7,), False), (2, (3, 11), True), (4, (5,), True), (2, (1,), False)]
)
def test_values_and_gradients_are_those_of_every_expert_computed(top_k, shape, normalized):
    rng = np.random.default_rng(0)
    shapes = (*shape, 8), (*shape, 4), (4, 8, 6), (4, 8, 6), (4, 6, 8)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in shapes]

    def both(function, given):
        out, pull = jax.vjp(lambda *a: function(*a, top_k=top_k, normalized=normalized), *given)
        return out, *pull(jnp.cos(out))

    found, other = both(kpx.ops.mixture_of_experts, arrays), both(_dense, arrays)
    with jax.enable_x64(True):
        exact = both(_dense, [a.astype(np.float64) for a in arrays])
    for made, theirs, wanted in zip(found, other, exact, strict=True):
        assert_closer(made, theirs, wanted, relative=4e-6)


def test_an_expert_that_no_row_chooses_has_no_gradient():
    x, logits = jnp.ones((5, 8)), jnp.zeros((5, 4)).at[:, 3].set(-9.0)
    matrices = jnp.ones((4, 8, 6)), jnp.ones((4, 8, 6)), jnp.ones((4, 6, 8))
    by_gate = jax.grad(lambda g: kpx.ops.mixture_of_experts(x, logits, g, *matrices[1:], top_k=2).sum())(matrices[0])
    assert (by_gate[2:] == 0).all()
    assert (by_gate[:2] != 0).any()


def test_its_products_are_a_targets_kernels_and_each_row_is_multiplied_once():
    rows, size, width, experts, top_k = 1024, 256, 512, 8, 2
    shapes = (rows, size), (rows, experts), (experts, size, width), (experts, size, width), (experts, width, size)
    specs = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    compiled = kpx.compile(lambda *a: kpx.ops.mixture_of_experts(*a, top_k=top_k), *specs, target="cuda:h100")
    assert compiled.fusions == {"kpx.grouped_matmul": 3}
    assert compiled.kernels == {"kpx.grouped_matmul": "grouped_triton"}
    assert compiled.cost.product_flops < 1.1 * 2 * 3 * rows * top_k * size * width


REFUSED = {
    "They are `\\[..., size\\]`": {"down": jnp.ones((4, 8, 6))},
    "All are one floating dtype": {"up": jnp.ones((4, 8, 6), jnp.bfloat16)},
    "It is from 1 to their number": {"top_k": 5},
    "There are none, relu": {"activation": "swish"},
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_go_together_is_refused(says):
    given = {"gate": jnp.ones((4, 8, 6)), "up": jnp.ones((4, 8, 6)), "down": jnp.ones((4, 6, 8)), "top_k": 2}
    with pytest.raises(kpx.InputError, match=says):
        kpx.ops.mixture_of_experts(jnp.ones((3, 8)), jnp.ones((3, 4)), **given | REFUSED[says])
