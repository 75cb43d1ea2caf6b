"""Samples of lowering rules that neither a family's common cases nor PyTorch's op database reach."""

import torch

aten, prims = torch.ops.aten, torch.ops.prims


def _t(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


X, Y, V = _t(3, 4), _t(3, 4, seed=1), _t(4, seed=2)
POSITIVE, UNIT = X.abs() + 0.1, X.tanh() * 0.9
N, B = _t(3, 4, dtype=torch.int64), _t(3, 4) > 0
IMAGE = _t(2, 4, 9, 8)
Z = torch.complex(X, Y)
BAGGED, OFFSETS = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([0, 2, 2])
SMALL = torch.tensor([-128, 127, 5, -3, 100, 1], dtype=torch.int8)
SHIFTS = torch.tensor([1, -1, 7, 8, 0, 100], dtype=torch.int8)
_RESIZED = {1: IMAGE[0], 2: IMAGE, 3: IMAGE[None]}
NEAREST = ("upsample_nearest", "_upsample_nearest_exact")
POLYNOMIALS = [
    *(f"{shifted}chebyshev_polynomial_{letter}" for shifted in ("", "shifted_") for letter in "tuvw"),
    "hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p",
]  # fmt: skip
FLOAT_PRIMS = [
    "abs", "acos", "asin", "asinh", "atan", "atanh", "cos", "cosh", "ceil", "erf", "erfc", "exp", "exp2", "expm1", "floor",
    "log", "log1p", "log2", "log10", "neg", "reciprocal", "rsqrt", "sign", "sin", "sinh", "sqrt", "cbrt", "tan", "tanh",
    "trunc", "round",
]  # fmt: skip
PAIR_PRIMS = [
    "add", "sub", "mul", "div", "fmod", "remainder", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "atan2",
    "fmax", "fmin", "hypot", "nextafter",
]  # fmt: skip

# Overload -> argument tuples, or (arguments, keywords).
_EDGES = torch.tensor([-2.0, -0.5, 0.25, 1.0])
MORE = {
    aten.histogram.bin_ct: [(X, 5), ((X, 5), {"range": [-1.0, 1.0], "density": True}), (X * 0, 3), ((X, 4), {"weight": X.abs()})],
    aten.histogram.bins_tensor: [(X, _EDGES), ((_EDGES, _EDGES), {"density": True})],
    aten._histogramdd_bin_edges.default: [(X[:, :2], [2, 3])],
    aten._histogramdd_from_bin_cts.default: [(X[:, :2], [2, 3]), ((X[:, :2], [2, 3]), {"range": [-1.0, 1.0, -2.0, 2.0], "density": True})],
    aten._histogramdd_from_bin_tensors.default: [(X[:, :2], [_EDGES, _EDGES])],
    aten.nonzero_static.default: [((X[:0],), {"size": 2}), ((B,), {"size": 3, "fill_value": 7})],
    aten._is_all_true.default: [(B,), (B | True,)],
    aten._is_any_true.default: [(B,), (B & False,)],
    aten.max_pool1d.default: [(IMAGE[0], 2), (IMAGE[0], 3, 2, 1)],
    aten.max_pool3d.default: [(IMAGE[None], 2, 2)],
    aten.median.dim: [(X, 1), (N, 0, True), (torch.tensor([[1.0, float("nan"), 2.0]]), 1)],
    aten._int_mm.default: [(torch.ones(4, 8, dtype=torch.int8), torch.full((8, 8), 3, dtype=torch.int8))],
    aten._cholesky_solve_helper.default: [(X, torch.eye(3) * 2, False)],
    aten._conj_copy.default: [(Z,)],
    aten.conj_physical.default: [(Z,)],
    aten._linalg_eigvals.default: [(torch.diag(V),)],
    aten.view.dtype: [(X, torch.int32), (X, torch.float64), (N, torch.int16), (B, torch.uint8), (Z, torch.float32), (X, torch.complex64)],
    aten.view_as_complex_copy.default: [(_t(3, 2),)],
    aten.view_as_real_copy.default: [(Z,)],
    aten.copysign.Scalar: [(X, -1.0), (N, 2)],
    aten.true_divide.Scalar: [(X, 3), (N, 2)],
    aten.bucketize.Scalar: [(0.5, V.sort().values)],
    aten.searchsorted.Scalar: [(V.sort().values, 0.5)],
    aten.sort.stable: [((N,), {"stable": True, "dim": 0}), ((X,), {"stable": True, "descending": True})],
    aten.scatter.value_reduce: [((X, 0, N[:2].abs() % 3, 2.0), {"reduce": "multiply"})],
    aten.repeat_interleave.Tensor: [((torch.tensor([1, 2, 0]),), {"output_size": 3})],
    aten.replication_pad3d_backward.default: [(_t(1, 1, 4, 4, 4), _t(1, 1, 3, 3, 2), [1, 1, 0, 1, 1, 0])],
    **{getattr(aten, f"{n}{d}d").default: [(_RESIZED[d], [5, 13, 6][:d]), (_RESIZED[d], [18, 17, 9][:d], *[2.05] * d)] for n in NEAREST for d in (1, 2, 3)},
    **{getattr(aten, f"{n}{d}d").vec: [(_RESIZED[d], [5, 13, 6][:d], None), (_RESIZED[d], None, [1.5] * d)] for n in NEAREST for d in (1, 2, 3)},
    **{getattr(aten, f"upsample_{n}{d}d").vec: [(_RESIZED[d], [5, 13, 6][:d], False, None), (_RESIZED[d], None, True, [1.5] * d)] for n, d in (("linear", 1), ("bilinear", 2), ("trilinear", 3), ("bicubic", 2))},
    **{getattr(aten, f"_upsample_{n}2d_aa").vec: [(IMAGE, [5, 13], False, None), (IMAGE, None, False, [1.5, 0.5])] for n in ("bilinear", "bicubic", "lanczos")},
    aten._upsample_bicubic2d_aa.default: [(IMAGE, [5, 4], False)],
    aten._upsample_bicubic2d_aa_backward.default: [(IMAGE[..., :5, :4], [5, 4], [2, 4, 9, 8], False)],
    aten._upsample_lanczos2d_aa.default: [(IMAGE, [5, 4], False)],
    aten._upsample_lanczos2d_aa_backward.default: [(IMAGE[..., :5, :4], [5, 4], [2, 4, 9, 8], False)],
    **{getattr(aten, f"{n}1d_backward").default: [(IMAGE[0], [8], [4, 9, 3])] for n in NEAREST},
    **{getattr(aten, f"{n}2d_backward").default: [(IMAGE, [9, 8], [2, 4, 4, 3])] for n in NEAREST},
    **{getattr(aten, f"{n}3d_backward").default: [(IMAGE[None], [4, 9, 8], [1, 2, 2, 4, 3])] for n in NEAREST},
    aten.upsample_linear1d.default: [(IMAGE[0], [5], False), (IMAGE[0], [13], True)],
    aten.upsample_linear1d_backward.default: [(IMAGE[0], [8], [4, 9, 3], False)],
    aten.upsample_bilinear2d.default: [(IMAGE, [5, 12], False), (IMAGE, [5, 12], True), (IMAGE, [18, 12], False, 2.0, 1.5)],
    aten.upsample_bilinear2d_backward.default: [(IMAGE, [9, 8], [2, 4, 4, 3], False), (IMAGE, [9, 8], [2, 4, 4, 3], True)],
    aten.upsample_trilinear3d.default: [(IMAGE[None], [5, 4, 12], False)],
    aten.upsample_trilinear3d_backward.default: [(IMAGE[None], [4, 9, 8], [1, 2, 2, 4, 3], False)],
    aten.upsample_bicubic2d.default: [(IMAGE, [5, 12], False), (IMAGE, [18, 12], True)],
    aten.upsample_bicubic2d_backward.default: [(IMAGE, [9, 8], [2, 4, 4, 3], False)],
    **{op: [(Y, BAGGED, OFFSETS, False, mode) for mode in (0, 1, 2)] for op in (aten._embedding_bag.default, aten._embedding_bag_forward_only.default)},
    aten._embedding_bag_dense_backward.default: [
        (Y, torch.tensor([0, 2, 1]), torch.tensor([0, 0, 2]), torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1]), 5, False, mode, None)
        for mode in (0, 1)
    ],
    aten._weight_norm_interface_backward.default: [(X, Y, POSITIVE[:, :1].contiguous(), Y.norm(2, 1, keepdim=True), 0)],
    **{getattr(aten, f"special_{n}").x_scalar: [(0.5, N.abs())] for n in POLYNOMIALS},
    **{getattr(aten, f"special_{n}").n_scalar: [(UNIT, 3), (UNIT, 0), (UNIT, -1)] for n in POLYNOMIALS},
    **{getattr(prims, n).default: [(POSITIVE * 0.2,)] for n in FLOAT_PRIMS},
    prims.acosh.default: [(POSITIVE + 1,)],
    **{getattr(prims, n).default: [(X, POSITIVE)] for n in PAIR_PRIMS},
    prims.pow.default: [(POSITIVE, Y)],
    **{getattr(prims, f"bitwise_{n}").default: [(N, N + 1)] for n in ("and", "or", "xor")},
    prims.bitwise_not.default: [(N,)],
    prims.gcd.default: [(N, N + 6)],
    **{getattr(prims, f"shift_{n}").default: [(N, N.abs())] for n in ("left", "right_arithmetic")},
    **{getattr(aten, f"__{s}shift__").Tensor: [(N, N), (SMALL, SHIFTS), (SMALL.to(torch.uint8), SHIFTS.to(torch.uint8))] for s in "lr"},
    **{getattr(aten, f"__{s}shift__").Scalar: [(SMALL, n) for n in (-1, 0, 2, 7, 8, 70)] + [(N, 63), (N, 64)] for s in "lr"},
    **{getattr(aten, f"bitwise_{s}_shift").Tensor: [(SMALL, SHIFTS), (N, N.int())] for s in ("left", "right")},
    **{getattr(aten, f"bitwise_{s}_shift").Tensor_Scalar: [(SMALL, 2), (N, -1)] for s in ("left", "right")},
    **{getattr(aten, f"bitwise_{s}_shift").Scalar_Tensor: [(-5, SHIFTS), (7, N)] for s in ("left", "right")},
    aten._trilinear.default: [
        (IMAGE[0], IMAGE[0], IMAGE[0], *([d] for d in expanded), [summed], unrolled)
        for expanded, summed, unrolled in (((0, 0, 1), 1, 2), ((0, 0, 0), 2, 0), ((3, 3, 3), 3, 3), ((3, 3, 3), 3, 0))
    ],
    aten._convolution.default: [
        (IMAGE, _t(6, 4, 3, 3), _t(6), [2, 1], [1, 1], [1, 1], False, [0, 0], 1, False, False, True, True),
        (IMAGE, _t(4, 3, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 0], 1, False, False, True, True),
    ],
    aten._convolution.deprecated: [(IMAGE, _t(6, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2, False, False, True)],
    aten.conv_tbc.default: [(_t(7, 2, 4), _t(3, 4, 5), _t(5), 1), (_t(7, 2, 4), _t(2, 4, 5), _t(5))],
    aten.conv_tbc_backward.default: [(_t(7, 2, 5), _t(7, 2, 4), _t(3, 4, 5), _t(5), 1)],
    aten._index_put_impl.default: [(X, [torch.tensor([0, 2])], V), (X, [None, torch.tensor([1, 1])], V[:1], True)],
    aten.one_hot.default: [(torch.tensor([0, 2, 1]), 4), (torch.tensor([[3, 0]]), 5)],
    aten.bincount.default: [(N.abs().flatten(), None, 5), (N.abs().flatten(), X.flatten(), 7), (N.abs().flatten(), X.flatten().half(), 5)],
    prims.collapse.default: [(IMAGE, 1, 2), (IMAGE, 0, 3), (torch.tensor(2.0), 0, 0)],
    prims.collapse_view.default: [(IMAGE, 1, 2)],
    prims.split_dim.default: [(IMAGE, 2, 3)],
    prims.squeeze.default: [(X[:1, :, None], [0, 2])],
    prims.transpose.default: [(IMAGE, [2, 0, 3, 1])],
    prims.reshape.default: [(X, [2, 6])],
    prims.rev.default: [(IMAGE, [1, 3])],
    prims.cat.default: [([X, Y], 1)],
    prims.view_of.default: [(X,)],
    prims.real.default: [(Z,)],
    prims.imag.default: [(Z,)],
    prims.fill.default: [(X, 2.0)],
    prims.full.default: [(([2, 3], 1.5), {"dtype": torch.float32, "device": "cpu", "requires_grad": False})],
    prims.full_like.default: [((X, 2), {"dtype": torch.int64, "device": "cpu", "requires_grad": False})],
    prims.scalar_tensor.default: [((2.5,), {"dtype": torch.float64, "device": "cpu"})],
    prims.conj_physical.default: [(Z,)],
    prims.convert_element_type.default: [(X, torch.bfloat16), (X * 3, torch.int8), (Z, torch.bool)],
    aten.true_divide.Tensor: [(X, Y), (N, N)],
    prims.isfinite.default: [(torch.tensor([1.0, float("inf"), float("nan")]),)],
    prims.clone.default: [(X,)],
    prims.where.default: [(B, X, Y)],
    prims.prod.default: [(X, [1])],
    prims.amax.default: [(X, [0])],
    prims.amin.default: [(X, [0, 1])],
    prims.as_strided_scatter.default: [(X, Y[:2, :2].clone(), [2, 2], [4, 1], 1)],
    prims.iota.default: [((5,), {"start": 1, "step": 2, "dtype": torch.int64, "device": "cpu", "requires_grad": False})],
    prims.device_put.default: [(X, torch.device("cpu"))],
}  # fmt: skip

QUANTIZED_DECOMPOSED = (
    "quantize_per_tensor", "quantize_per_tensor.tensor", "quantize_per_tensor.tensor2", "dequantize_per_tensor",
    "dequantize_per_tensor.tensor", "dequantize_per_tensor.tensor2", "quantize_per_channel", "dequantize_per_channel",
    "fake_quant_per_channel", "choose_qparams.tensor", "choose_qparams_symmetric.tensor", "choose_qparams_per_token",
    "choose_qparams_per_token_asymmetric", "_choose_qparams_per_token_asymmetric_impl", "quantize_per_token",
    "dequantize_per_token", "quantize_per_channel_group", "dequantize_per_channel_group", "convert_element_type.no_fuse",
)  # fmt: skip

# Rules whose result is no tensor, or a draw's gradient, or that have files of their own; the others are run by
# test_torch_state.py and test_torch_ops.py.
ELSEWHERE = {
    aten.sym_storage_offset.default, aten.sym_numel.default, aten.sym_size.int, aten.sym_stride.int,
    aten._local_scalar_dense.default, aten._assert_scalar.default, aten._assert_async.msg,
    aten._functional_assert_async.msg, aten.fractional_max_pool2d_backward.default,
    aten.fractional_max_pool3d_backward.default, aten._grouped_mm.default, "transformers::grouped_mm_fallback",
    "transformers::grouped_mm_fallback_backward", "kpx.op.default", "kpx.op_backward.default",
    # test_torch_control.py
    "cond", "while_loop", "scan", "map_impl", "associative_scan", "invoke_subgraph", "wrap_with_set_grad_enabled",
    # test_torch_quantized.py
    aten.fake_quantize_per_tensor_affine_cachemask.default, aten._scaled_mm.default,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default,
    aten.fake_quantize_per_channel_affine_cachemask.default, aten._fake_quantize_learnable_per_tensor_affine.default,
    aten._fake_quantize_learnable_per_channel_affine.default,
    aten._fake_quantize_learnable_per_tensor_affine_backward.default,
    aten._fake_quantize_learnable_per_channel_affine_backward.default,
    aten._fused_moving_avg_obs_fq_helper_functional.default,
    *(f"quantized_decomposed::{name}" for name in QUANTIZED_DECOMPOSED),
}  # fmt: skip

# Overload -> arguments, keywords, and the mean of what is drawn.
_F32 = {"dtype": torch.float32, "device": "cpu"}
DRAWS = {
    **{op: (([2000],), {}, 0.5) for op in (aten.rand.default, aten.rand.generator)},
    aten.rand_like.default: ((torch.zeros(2000),), {}, 0.5),
    aten.native_dropout.default: ((torch.ones(2000), 0.25, True), {}, 1.0),
    aten.uniform.default: ((torch.zeros(2000), 1.0, 3.0), {}, 2.0),
    **{op: (([2000],), {}, 0.0) for op in (aten.randn.default, aten.randn.generator)},
    aten.randn_like.default: ((torch.zeros(2000),), {}, 0.0),
    aten.normal_functional.default: ((torch.zeros(2000), 2.0, 0.5), {}, 2.0),
    aten.normal.Tensor_float: ((torch.full((2000,), 2.0), 0.5), {}, 2.0),
    aten.normal.float_Tensor: ((2.0, torch.full((2000,), 0.5)), {}, 2.0),
    aten.normal.Tensor_Tensor: ((torch.full((2000,), 2.0), torch.full((2000,), 0.5)), {}, 2.0),
    aten.normal.float_float: ((2.0, 0.5, [2000]), {}, 2.0),
    **{op: ((5, [2000]), {}, 2.0) for op in (aten.randint.default, aten.randint.generator)},
    **{op: ((2, 5, [2000]), {}, 3.0) for op in (aten.randint.low, aten.randint.low_generator)},
    aten.randint_like.default: ((torch.zeros(2000), 5), {}, 2.0),
    aten.randint_like.Tensor: ((torch.zeros(2000), torch.tensor(5)), {}, 2.0),
    aten.randint_like.low_dtype: ((torch.zeros(2000), 2, 5), {}, 3.0),
    **{op: ((2001,), {}, 1000.0) for op in (aten.randperm.default, aten.randperm.generator)},
    aten.bernoulli.default: ((torch.full((2000,), 0.3),), {}, 0.3),
    aten.bernoulli.p: ((torch.zeros(2000), 0.3), {}, 0.3),
    aten.bernoulli.Tensor: ((torch.zeros(2000), torch.full((2000,), 0.3)), {}, 0.3),
    aten.geometric.default: ((torch.zeros(2000), 0.5), {}, 2.0),
    aten.multinomial.default: ((torch.tensor([0.0, 1.0, 1.0]), 2000, True), {}, 1.5),
    aten.poisson.default: ((torch.full((2000,), 3.0),), {}, 3.0),
    aten._standard_gamma.default: ((torch.full((2000,), 2.0),), {}, 2.0),
    aten._sample_dirichlet.default: ((torch.ones(500, 4),), {}, 0.25),
    aten.native_dropout.default: ((torch.ones(2000), 0.25, True), {}, 1.0),
    aten.dropout.default: ((torch.ones(2000), 0.25, True), {}, 1.0),
    aten.rrelu_with_noise_functional.default: ((-torch.ones(2000), torch.zeros(2000), 0.1, 0.3, True), {}, -0.2),
    aten.scaled_dot_product_attention.default: ((*[torch.ones(40, 2, 4, 8)] * 3, None, 0.25), {}, 1.0),
    prims.normal.default: (([2000],), {"mean": 2.0, "std": 0.5, "requires_grad": False, **_F32}, 2.0),
    prims.uniform.default: (([2000],), {"low": 1.0, "high": 3.0, "stride": [1], **_F32}, 2.0),
}
