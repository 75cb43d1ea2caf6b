"""Small versions of every benchmark model match PyTorch, in f32 and bf16."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

import kpx
from bench.cases import CASES
from tests.reference import assert_closer

pytestmark = pytest.mark.models


def _f64_outputs(model, inputs):
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return pytree.tree_leaves(copy.deepcopy(model).double()(**wide))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_model_is_as_close_to_f64_as_eager_is(name, dtype):
    model, inputs = CASES[name].make(small=True, dtype=dtype)
    with torch.no_grad():
        reference = _f64_outputs(model, inputs)
        eager = model(**inputs)
        ours = kpx.optimize(model)(**inputs)
    assert type(ours) is type(eager)
    flat, flat_eager = pytree.tree_leaves(ours), pytree.tree_leaves(eager)
    assert [(t.shape, t.dtype) for t in flat] == [(t.shape, t.dtype) for t in flat_eager]
    for ours_, eager_, reference_ in zip(flat, flat_eager, reference, strict=True):
        slack = 1e-4 if dtype == torch.float32 else 0.0
        assert_closer(ours_.double(), eager_.double(), reference_, relative=slack)


def test_a_cache_among_the_outputs_is_refused_ahead_with_its_remedy():
    model, inputs = CASES["gpt2"].make(small=True)
    with pytest.raises(kpx.CaptureError, match=r"DynamicCache.*\n.*pass `use_cache=False`"):
        kpx.compile(model, **inputs, use_cache=True)


def test_a_cache_among_the_outputs_of_a_call_is_the_models_own():
    model, inputs = CASES["gpt2"].make(small=True)
    with torch.no_grad():
        got, wanted = kpx.optimize(model)(**inputs, use_cache=True), model(**inputs, use_cache=True)
    assert type(got.past_key_values) is type(wanted.past_key_values)
    ours, eager = (output.past_key_values.layers[-1].keys for output in (got, wanted))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
