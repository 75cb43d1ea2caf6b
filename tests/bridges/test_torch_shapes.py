"""Inputs whose sizes change: captured once, warned of, or padded to buckets."""

import warnings

import pytest
import torch

import kpx


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean(1)


class Masked(torch.nn.Module):
    """Attention over a sequence with a mask, and a mean of what is shown."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(20, 8)

    def forward(self, ids, attention_mask=None):
        x = self.words(ids)
        shown = torch.ones_like(ids) if attention_mask is None else attention_mask
        scores = (x @ x.transpose(1, 2)).masked_fill(shown[:, None, :] == 0, float("-inf"))
        y = scores.softmax(-1) @ x
        return {"tokens": y, "pooled": (y * shown[..., None]).sum(1) / shown.sum(1, keepdim=True)}


def _ids(*shape):
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(0))


# Captured once ---------------------------------------------------------------------------------


def test_dynamic_shapes_capture_a_model_once():
    model = torch.nn.Linear(8, 4)
    optimized = kpx.optimize(model, dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", kpx.RecompileWarning)
        for n in (3, 4, 9, 64):
            torch.testing.assert_close(optimized(torch.ones(n, 8)), model(torch.ones(n, 8)))
    assert len(type(optimized)._kpx_engine.settings.graphs) == 1


def test_a_size_outside_of_the_dynamic_range_is_captured_anew():
    model = torch.nn.Linear(8, 4)
    optimized = kpx.optimize(model, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.testing.assert_close(optimized(torch.ones(5, 8)), model(torch.ones(5, 8)))
    torch.testing.assert_close(optimized(torch.ones(1, 8)), model(torch.ones(1, 8)))


def test_the_fourth_shape_warns_and_names_the_dimension():
    optimized = kpx.optimize(torch.nn.Linear(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", kpx.RecompileWarning)
        for n in (1, 2, 3):
            optimized(torch.ones(n, 8))
    with pytest.warns(kpx.RecompileWarning, match=r"dimension 0 of input 0 \(1, 2, 3, 4\).*kpx\.Buckets"):
        optimized(torch.ones(4, 8))


# Buckets ---------------------------------------------------------------------------------------


def test_batches_are_padded_to_their_bucket_and_cut_back():
    model = torch.nn.Linear(8, 4)
    optimized = kpx.optimize(model, dynamic_shapes=kpx.Buckets(batch=[1, 4, 8]))
    for n in (1, 2, 3, 4, 7):
        torch.testing.assert_close(optimized(torch.ones(n, 8)), model(torch.ones(n, 8)))
    assert len(optimized.compiled_programs()) == 3  # one each for 1, 4 and 8 rows


def test_sequences_are_padded_under_a_mask_that_the_model_takes():
    model = Masked().eval()
    optimized = kpx.optimize(model, dynamic_shapes=kpx.Buckets(batch="pow2", sequence=[8, 16]))
    for shape in ((2, 5), (3, 8), (3, 11)):
        wanted, got = model(_ids(*shape)), optimized(_ids(*shape))
        assert got["tokens"].shape == wanted["tokens"].shape
        torch.testing.assert_close(got, wanted)


def test_a_mask_that_was_given_is_padded():
    model = Masked().eval()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    optimized = kpx.optimize(model, dynamic_shapes=kpx.Buckets(sequence=[8]))
    torch.testing.assert_close(optimized(_ids(2, 5), attention_mask=mask), model(_ids(2, 5), attention_mask=mask))


def test_a_bucket_in_which_padding_shows_is_refused():
    optimized = kpx.optimize(Mean(), dynamic_shapes=kpx.Buckets(sequence="pow2"))
    with pytest.raises(kpx.InputError, match=r"Padding to .* changes output 0 of `Mean` by up to 0\.25"):
        optimized(torch.ones(2, 3, 4))


def test_a_batch_above_the_largest_bucket_is_refused():
    optimized = kpx.optimize(torch.nn.Linear(8, 4), dynamic_shapes=kpx.Buckets(batch=[2, 4]))
    with pytest.raises(kpx.InputError, match=r"batch of 5 was given, and the largest bucket is 4"):
        optimized(torch.ones(5, 8))


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({}, "No sizes"),
        ({"batch": [4, 2]}, "not increasing"),
        ({"batch": [0, 2]}, "positive"),
        ({"sequence": "pow3"}, "pow2"),
    ],
)
def test_buckets_that_make_no_sense_are_refused(sizes, words):
    with pytest.raises(kpx.ConfigError, match=words):
        kpx.Buckets(**sizes)


@pytest.mark.parametrize("size, bucket", [(1, 1), (2, 2), (3, 4), (9, 16)])
def test_powers_of_two_are_the_next_one_up(size, bucket):
    assert kpx.Buckets(batch="pow2").fit("batch", size) == bucket


# Rows by their own lengths ---------------------------------------------------------------------


def _padded_batch(*lengths, width=24):
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        ids[i, :n], mask[i, :n] = _ids(width)[:n], 1
    return ids, mask


BY_ROW = kpx.Buckets(batch=[2, 4], sequence=[4, 8, 16], by_row=True)


def _check_rows(optimized, model, ids, mask):
    got, wanted = optimized(ids, attention_mask=mask), model(ids, attention_mask=mask)
    torch.testing.assert_close(got["tokens"], wanted["tokens"] * mask[..., None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["pooled"], wanted["pooled"], rtol=1e-4, atol=1e-5)


def test_rows_are_computed_at_their_own_lengths_and_embeddings_stay():
    model = Masked().eval()
    buckets = kpx.Buckets(batch=[2, 4], sequence=[4, 8, 16, 24], by_row=True)
    optimized = kpx.optimize(model, dynamic_shapes=buckets)
    ids, mask = _padded_batch(3, 24, 7, 1, 4, 8, 2, 2, 2, 16)
    _check_rows(optimized, model, ids, mask)
    modules = " ".join(compiled.stablehlo for compiled in optimized.compiled_programs())
    assert {n for n in range(1, 25) if f"x{n}xi64>" in modules} >= {4, 8, 16, 24}
    _check_rows(optimized, model, *_padded_batch(5, 6, 3))


def test_a_mask_that_is_no_padding_on_the_right_is_computed_whole():
    model = Masked().eval()
    optimized = kpx.optimize(model, dynamic_shapes=kpx.Buckets(batch=[4], sequence=[8, 24], by_row=True))
    ids, mask = _padded_batch(3, 24, 7)
    mask = mask.flip(1)
    torch.testing.assert_close(optimized(ids, attention_mask=mask), model(ids, attention_mask=mask))


def test_a_model_that_sees_the_padding_is_refused_by_row():
    class Leaky(torch.nn.Module):
        def forward(self, ids, attention_mask):
            return ids.float().mean(1, keepdim=True) * attention_mask

    optimized = kpx.optimize(Leaky(), dynamic_shapes=BY_ROW)
    with pytest.raises(kpx.InputError, match="Padding to"):
        optimized(*_padded_batch(3, 2, 16, width=16))


def test_an_output_that_holds_no_rows_is_refused():
    class Sum(torch.nn.Module):
        def forward(self, ids, attention_mask):
            return (ids * attention_mask).sum(0).sum()

    with pytest.raises(kpx.InputError, match="Leave `by_row` out"):
        kpx.optimize(Sum(), dynamic_shapes=BY_ROW)(*_padded_batch(3, 2, 16, width=16))


def test_an_output_with_the_sequence_elsewhere_is_refused():
    class Scores(torch.nn.Module):
        def forward(self, ids, attention_mask):
            x = (ids * attention_mask).float()
            return x[:, None, :, None] * x[:, None, None, :]

    with pytest.raises(kpx.InputError, match="elsewhere than in dimension 1"):
        kpx.optimize(Scores(), dynamic_shapes=BY_ROW)(*_padded_batch(3, 2, 16, width=16))


def test_by_row_needs_both_sizes():
    with pytest.raises(kpx.ConfigError, match="both dimensions"):
        kpx.Buckets(sequence=[8], by_row=True)
