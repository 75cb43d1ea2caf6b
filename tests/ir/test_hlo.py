"""Reading a compiler's program: loops, groups of devices, products, what is moved."""

import itertools

import numpy as np
import pytest

from kpx.ir.hlo import Array, Program
from kpx.ir.hlo_cost import work

LOOP = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %y = f32[8,16]{1,0} tanh(%x), metadata={op_name="jit(f)/while/body/tanh"}
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %y)
}

%condition (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(LIMIT)
  ROOT %lt = pred[] compare(%i, %n), direction=DIRECTION
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %first = s32[] constant(FIRST)
  %copied = s32[] copy(%first)
  %t = (s32[], f32[8,16]{1,0}) tuple(%copied, %x)
  %w = (s32[], f32[8,16]{1,0}) while(%t), condition=%condition, body=%bodyKNOWN
  ROOT %r = f32[8,16]{1,0} get-tuple-element(%w), index=1
}
"""


def _loop(first=0, limit=10, direction="LT", known=""):
    changes = {"FIRST": str(first), "LIMIT": str(limit), "DIRECTION": direction, "KNOWN": known}
    text = LOOP
    for name, value in changes.items():
        text = text.replace(name, value)
    return text


@pytest.mark.parametrize("options, trips", [
    ({}, 10), ({"first": 4}, 6), ({"direction": "LE"}, 11), ({"first": 12, "limit": 0, "direction": "GT"}, 12),
    ({"known": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7), ({"direction": "EQ"}, 1),
])  # fmt: skip
def test_a_loops_body_counts_as_often_as_it_runs(options, trips):
    (tanh,) = (w for w in work(Program(_loop(**options))) if w.opcode == "tanh")
    assert (tanh.count, tanh.flops, tanh.bytes) == (trips, 128.0, 2 * 4 * 128)
    assert tanh.operation == "jit(f)/while/body/tanh"


def _entry(*lines: str, before: str = "") -> Program:
    body = "\n".join(f"  {line}" for line in lines)
    return Program(f"HloModule m\n\n{before}\nENTRY %main () -> f32[] {{\n{body}\n}}\n")


@pytest.mark.parametrize("text, array, size", [
    ("bf16[4,8]{1,0:T(8,128)(2,1)S(1)}", Array("bf16", (4, 8), 1), 64),
    ("f32[]{:T(128)}", Array("f32", ()), 4),
    ("s4[3,3]{1,0}", Array("s4", (3, 3)), 5),
    ("f8e4m3fn[10]{0}", Array("f8e4m3fn", (10,)), 10),
    ("f4e2m1fn[10]{0}", Array("f4e2m1fn", (10,)), 5),
    ("pred[7]{0:T(256)}", Array("pred", (7,)), 7),
    ("c64[2]{0}", Array("c64", (2,)), 16),
])  # fmt: skip
def test_an_arrays_type_is_read(text, array, size):
    (found,) = _entry(f"ROOT %x = {text} parameter(0)").entry.instructions[0].results
    assert found == array
    assert found.bytes == size


GROUPS = {
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": ((0, 1), ("model",)),
    "replica_groups=[2,4]<=[4,2]T(1,0)": ((0, 2, 4, 6), ("data",)),
    "replica_groups=[4,2]<=[8]": ((0, 1), ("model",)),
    "replica_groups=[1,8]<=[8]": (tuple(range(8)), ("data", "model")),
    "replica_groups=mesh['a'=4,'b'=2] {'b'}": ((0, 1), ("model",)),
    "replica_groups=mesh['a'=4,'b'=2] {'a'}": ((0, 2, 4, 6), ("data",)),
    "replica_groups=mesh['a'=4,'b'=2] {'a','b'}": (tuple(range(8)), ("data", "model")),
    "replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}": ((0, 4), ("data",)),
    "replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}": ((0, 2), ("data",)),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_a_collectives_axes_are_told_from_every_notation_of_its_groups(groups):
    program = _entry(
        "%x = f32[8]{0} parameter(0)",
        f"ROOT %y = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add",
    )
    (sent,) = (w.collective for w in work(program, {"data": 4, "model": 2}) if w.collective)
    assert (sent.group, sent.axes) == GROUPS[groups]
    assert (sent.kind, sent.bytes, sent.count) == ("all-reduce", 32, 1)


def test_a_permutes_group_is_a_pair_that_differs():
    program = _entry(
        "%x = f32[8]{0} parameter(0)",
        "ROOT %y = f32[8]{0} collective-permute(%x), source_target_pairs={{0,0},{1,3},{3,1},{2,2}}",
    )
    (sent,) = (w.collective for w in work(program, {"x": 2, "y": 2}) if w.collective)
    assert (sent.group, sent.axes) == ((1, 3), ("x",))


@pytest.mark.parametrize("lines, size", [
    (("%y = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), GROUPS, dimensions={0}",
      "ROOT %z = f32[32]{0} all-gather-done(%y)"), 128),
    (("ROOT %y = f32[2]{0} reduce-scatter(%x), GROUPS, dimensions={0}, to_apply=%add",), 32),
    (("%y = f32[8]{0} all-reduce-start(%x), GROUPS, to_apply=%add", "ROOT %z = f32[8]{0} all-reduce-done(%y)"), 32),
])  # fmt: skip
def test_a_collectives_bytes_are_those_of_the_whole_array(lines, size):
    lines = [line.replace("GROUPS", "replica_groups={{0,1,2,3}}") for line in lines]
    found = [w.collective for w in work(_entry("%x = f32[8]{0} parameter(0)", *lines), {"d": 4}) if w.collective]
    assert [sent.bytes for sent in found] == [size]


def test_an_overlapped_collective_counts_at_its_start_alone():
    def fusion(name, also):
        return (
            f"%{name} (p: f32[8]) -> f32[32] {{\n  %p = f32[8]{{0}} parameter(0)\n"
            "  %g = f32[32]{0} all-gather(%p), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}\n"
            f"  ROOT %r = f32[32]{{0}} {also}\n}}\n\n"
        )

    before = fusion("starts", 'custom-call(%g), custom_call_target="AsyncCollectiveStart"') + fusion(
        "ends", 'custom-call(%g), custom_call_target="AsyncCollectiveDone"'
    )
    program = _entry(
        "%x = f32[8]{0} parameter(0)",
        "%a = f32[32]{0} fusion(%x), kind=kCustom, calls=%starts",
        "ROOT %b = f32[32]{0} fusion(%x), kind=kCustom, calls=%ends",
        before=before,
    )
    assert len([w for w in work(program) if w.collective]) == 1


def test_values_in_on_chip_memory_are_not_moved():
    program = _entry("%x = f32[8]{0} parameter(0)", "ROOT %y = f32[8]{0:T(128)S(1)} tanh(%x)")
    assert [w.bytes for w in work(program)] == [32.0]


def test_a_fusion_moves_what_it_reads_and_writes_and_not_what_it_slices_or_updates():
    before = (
        "%update (p0: f32[100,8], p1: f32[50,8], p2: s32[]) -> f32[100,8] {\n"
        "  %p0 = f32[100,8]{1,0} parameter(0)\n  %p1 = f32[50,8]{1,0} parameter(1)\n  %p2 = s32[] parameter(2)\n"
        "  %s = f32[1,8]{1,0} dynamic-slice(%p1, %p2, %p2), dynamic_slice_sizes={1,8}\n"
        "  ROOT %r = f32[100,8]{1,0} dynamic-update-slice(%p0, %s, %p2, %p2)\n}\n"
    )
    program = _entry(
        "%a = f32[100,8]{1,0} parameter(0)", "%b = f32[50,8]{1,0} parameter(1)", "%i = s32[] parameter(2)",
        "ROOT %r = f32[100,8]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%update", before=before,
    )  # fmt: skip
    (update,) = work(program)
    assert update.bytes == 32 + 4 + 32  # the slice, the index, and the row that is written


def test_the_dearer_branch_counts():
    def branch(name, op):
        return (
            f"%{name} (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT %r = f32[8]{{0}} {op}\n}}\n\n"
        )

    before = branch("cheap", "bitcast(%p)") + branch("dear", "tanh(%p)")
    program = _entry(
        "%c = pred[] parameter(0)", "%x = f32[8]{0} parameter(1)",
        "ROOT %r = f32[8]{0} conditional(%c, %x, %x), true_computation=%cheap, false_computation=%dear", before=before,
    )  # fmt: skip
    assert [w.opcode for w in work(program)] == ["tanh"]


def _convolution(length, taps, stride, low, high, hole, dilation):
    """Places, and pairs of taps and places that meet an element, one by one."""
    spread = (length - 1) * hole + 1
    places = (spread + low + high - ((taps - 1) * dilation + 1)) // stride + 1
    pairs = 0
    for o, k in itertools.product(range(places), range(taps)):
        at = o * stride - low + k * dilation
        pairs += 0 <= at < spread and at % hole == 0
    return places, pairs


@pytest.mark.parametrize("seed", range(12))
def test_a_convolution_counts_what_it_multiplies(seed):
    rng = np.random.default_rng(seed)
    dims = [
        (int(rng.integers(3, 9)), int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.integers(0, 3)),
         int(rng.integers(0, 3)), int(rng.integers(1, 3)), int(rng.integers(1, 3)))
        for _ in range(2)
    ]  # fmt: skip
    (h, w), (kh, kw) = (dims[0][0], dims[1][0]), (dims[0][1], dims[1][1])
    (oh, ph), (ow, pw) = (_convolution(*d) for d in dims)
    window = (
        f"size={kh}x{kw} stride={dims[0][2]}x{dims[1][2]} pad={dims[0][3]}_{dims[0][4]}x{dims[1][3]}_{dims[1][4]} "
        f"lhs_dilate={dims[0][5]}x{dims[1][5]} rhs_dilate={dims[0][6]}x{dims[1][6]}"
    )
    program = _entry(
        f"%x = f32[2,{h},{w},3]{{3,2,1,0}} parameter(0)",
        f"%k = f32[{kh},{kw},3,5]{{3,2,1,0}} parameter(1)",
        f"ROOT %y = f32[2,{oh},{ow},5]{{3,2,1,0}} convolution(%x, %k), window={{{window}}}, dim_labels=b01f_01io->b01f",
    )
    assert [w.product_flops for w in work(program)] == [2.0 * 2 * 5 * 3 * ph * pw]


def test_a_product_by_cublas_counts_like_any_other():
    config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
    program = _entry(
        "%a = bf16[16,32]{1,0} parameter(0)", "%b = bf16[32,8]{1,0} parameter(1)",
        f'ROOT %r = (bf16[16,8]{{1,0}}, s8[4096]{{0}}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={config}',
    )  # fmt: skip
    (product,) = work(program)
    assert (product.product_flops, product.element) == (2.0 * 16 * 32 * 8, "bf16")


@pytest.mark.parametrize("precision, element", [
    (", operand_precision={highest,highest}", "f32:highest"), (", operand_precision={high,high}", "f32:high"), ("", "f32"),
])  # fmt: skip
def test_a_products_precision_is_told(precision, element):
    program = _entry(
        "%a = f32[16,32]{1,0} parameter(0)", "%b = f32[32,8]{1,0} parameter(1)",
        f"ROOT %r = f32[16,8]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}{precision}",
    )  # fmt: skip
    (product,) = work(program)
    assert (product.product_flops, product.element) == (2.0 * 16 * 32 * 8, element)
