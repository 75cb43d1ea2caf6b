"""The bench of torch-mlir's suite tells right from wrong, on a small suite of the same form."""

import sys
import textwrap

import pytest

from bench import torch_mlir, torch_mlir_case
from tests.optional import torch

FILES = {
    "framework.py": """
        import multiprocess
        import torch

        class TestUtils:
            def __init__(self): torch.manual_seed(0)
            def rand(self, *sizes): return torch.rand(sizes)
    """,
    "registry.py": """
        from collections import namedtuple

        GLOBAL_TEST_REGISTRY = []
        Test = namedtuple("Test", "unique_name program_factory program_invoker")

        def register_test_case(module_factory):
            return lambda f: GLOBAL_TEST_REGISTRY.append(Test(f.__name__, module_factory, f))
    """,
    "test_suite/__init__.py": "raise ImportError('only a build has this')",
    "test_suite/cases.py": """
        import torch
        from torch_mlir_e2e_test.framework import TestUtils
        from torch_mlir_e2e_test.registry import register_test_case

        def case(name, forward, invoke):
            module = type(name, (torch.nn.Module,), {"forward": forward})
            invoke.__name__ = name
            register_test_case(module_factory=module)(invoke)

        def scaled(self, x):
            x.mul_(2)
            return x + 1

        def told_apart(self, x):
            return x + 1 if torch.compiler.is_compiling() else x

        case("writes", scaled, lambda m, tu: (m.forward(tu.rand(3)), m.forward(tu.rand(2, 2))))
        case("draws", lambda self, x: torch.rand_like(x).mean(), lambda m, tu: m.forward(tu.rand(4000)))
        case("differs", told_apart, lambda m, tu: m.forward(tu.rand(3)))
        case("raises", lambda self, x: x @ x, lambda m, tu: m.forward(tu.rand(3, 2)))
    """,
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    checkout = tmp_path_factory.mktemp("torch-mlir")
    folder = torch_mlir_case.suite_folder(str(checkout)) / "torch_mlir_e2e_test"
    for name, text in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield torch_mlir_case.load(str(checkout))


@pytest.mark.parametrize(
    ("name", "verdict"), [("writes", "right"), ("draws", "right"), ("differs", "wrong"), ("raises", "eager fails")]
)
def test_a_case_has_its_verdict(suite, name, verdict):
    found = torch_mlir_case.run(suite[name])
    assert found.verdict == verdict, found.reason


def test_values_shapes_dtypes_and_structures_are_compared():
    x = torch.tensor([1.0, float("nan"), 2.0])
    assert torch_mlir_case._difference((x, 3), (x.clone(), 3)) == ""
    assert "values differ" in torch_mlir_case._difference(x, x + 0.1)
    assert "float64" in torch_mlir_case._difference(x, x.double())
    assert "[3, 1]" in torch_mlir_case._difference(x, x[:, None])
    assert "structure" in torch_mlir_case._difference((x,), [x])
    assert "a Tensor instead of a int" in torch_mlir_case._difference(torch.tensor(3), 3)


def test_failures_of_one_kind_share_a_reason():
    first = {
        "verdict": "refused",
        "reason": "The model uses 1 op(s):\n  aten.foo.default: used by the model itself\nAdd",
    }
    assert torch_mlir.reason_of(first) == "no lowering rule: aten.foo.default"
    broken = "`A` could not be captured whole:\n  a.py:3, in forward: x\n    Dynamic shape operator\nEverything"
    assert torch_mlir.reason_of({"verdict": "broken", "reason": broken}) == "Dynamic shape operator"
    refused = [{"verdict": "refused", "reason": f"CaptureError: `{name}` decides"} for name in ("One", "Two")]
    assert len({torch_mlir.reason_of(v) for v in refused}) == 1
