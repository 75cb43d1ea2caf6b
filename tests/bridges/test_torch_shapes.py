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


# Buckets are proved, not tried ------------------------------------------------------------------


class Function(torch.nn.Module):
    """A function of one input as a model."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.inner = function, torch.nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.inner)


def _attended(x, causal=False):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=causal)


READS_THE_BATCH = {
    "standardized": lambda x: (x - x.mean(0)) / (x.std(0) + 1e-3),
    "softmax": lambda x: x.softmax(0),
    "maximum": lambda x: x - x.amax(0),
    "minimum": lambda x: x - x.amin(0),
    "argmax": lambda x: x[0] + x.argmax(0),
    "top-k": lambda x: x.topk(2, 0).values,
    "sorted": lambda x: x.sort(0).values,
    "sum from the end": lambda x: x.flip(0).cumsum(0).flip(0),
    "median": lambda x: x - x.median(0).values,
    "norm": lambda x: x / (x.norm() + 1),
    "any above": lambda x: torch.where((x > 10).any(0), x, -x),
    "products of rows": lambda x: x @ x.T @ x,
}


@pytest.mark.parametrize("kind", READS_THE_BATCH)
@pytest.mark.parametrize("number", [0.0, 2.0])
def test_what_reads_a_padded_batch_is_refused_whatever_the_first_numbers(kind, number):
    optimized = kpx.optimize(Function(READS_THE_BATCH[kind]), dynamic_shapes=kpx.Buckets(batch=[8]))
    with pytest.raises(kpx.InputError, match="changes output 0"):
        optimized(torch.full((5, 4), number))


READS_THE_SEQUENCE = {
    "mean": lambda x: x.mean(1),
    "maximum": lambda x: x.amax(1),
    "argmax": lambda x: x.argmax(1),
    "last position": lambda x: x[:, -1],
    "attention without a mask": _attended,
    "convolution": lambda x: torch.nn.functional.conv1d(x.mT, torch.ones(4, 4, 3), padding=1).mT,
}


@pytest.mark.parametrize("kind", READS_THE_SEQUENCE)
def test_what_reads_a_padded_sequence_is_refused_after_zeros(kind):
    optimized = kpx.optimize(Function(READS_THE_SEQUENCE[kind]).eval(), dynamic_shapes=kpx.Buckets(sequence=[8]))
    with pytest.raises(kpx.InputError, match="changes output 0"):
        optimized(torch.zeros(2, 5, 4))


READS_ITS_ROWS = {
    "linear": (lambda x, f: f(x), torch.nn.Linear(4, 4)),
    "layer norm": (lambda x, f: f(x), torch.nn.LayerNorm(4)),
    "batch norm in inference": (lambda x, f: f(x.mT).mT, torch.nn.BatchNorm1d(4)),
    "convolution over the features": (lambda x, f: f(x.reshape(-1, 1, 4)).reshape(x.shape), torch.nn.Conv1d(1, 1, 3, padding=1)),
    "causal attention": (lambda x: _attended(x, causal=True),),
    "sum from the start": (lambda x: x.cumsum(1),),
    "maximum over the features": (lambda x: x - x.amax(2, keepdim=True),),
}  # fmt: skip


@pytest.mark.parametrize("kind", READS_ITS_ROWS)
def test_what_reads_no_padding_is_accepted_after_zeros(kind):
    torch.manual_seed(0)
    function, *modules = READS_ITS_ROWS[kind]
    model = Function(function, *modules).eval()
    optimized = kpx.optimize(model, dynamic_shapes=kpx.Buckets(batch=[4], sequence=[8]))
    optimized(torch.zeros(3, 5, 4))
    for shape in ((3, 5, 4), (2, 7, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)


def test_token_ids_that_were_all_zero_show_no_less():
    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(20, 8)

        def forward(self, ids):
            return self.words(ids).mean(1)

    with pytest.raises(kpx.InputError, match="changes output 0"):
        kpx.optimize(Pooled(), dynamic_shapes=kpx.Buckets(sequence=[8]))(torch.zeros(2, 5, dtype=torch.int64))


def test_a_parameter_that_is_zero_hides_no_dependence():
    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.gate * x.mean(0)

    with pytest.raises(kpx.InputError, match="changes output 0"):
        kpx.optimize(Gated().eval(), dynamic_shapes=kpx.Buckets(batch=[8]))(torch.randn(5, 4))


def test_batch_norm_in_training_is_refused_and_its_statistics_stay():
    model = torch.nn.BatchNorm1d(4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimized = kpx.optimize(model, dynamic_shapes=kpx.Buckets(batch=[8]))
    with pytest.raises(kpx.InputError, match="changes output 0"):
        optimized(torch.randn(5, 4))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_statistics_that_padding_changes_are_refused():
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            self.seen.add_((x > 0).sum(0))
            return x * 2

    with pytest.raises(kpx.InputError, match="changes the buffer `seen`"):
        kpx.optimize(Counts(), dynamic_shapes=kpx.Buckets(batch=[8]))(torch.randn(5, 4))


def test_dropout_in_training_is_refused_by_name():
    optimized = kpx.optimize(torch.nn.Dropout(0.5), dynamic_shapes=kpx.Buckets(batch=[8]))
    with pytest.raises(kpx.InputError, match="draws random numbers"):
        optimized(torch.randn(5, 4))


def test_a_mode_that_is_set_later_is_proved_anew():
    class Switched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.centered = False

        def forward(self, x, by_largest=False):
            x = x - x.mean(0) if self.centered else x
            return x - x.amax(0) if by_largest else x * 2

    model = Switched()
    optimized = kpx.optimize(model, dynamic_shapes=kpx.Buckets(batch=[8]))
    optimized(torch.randn(5, 4))
    with pytest.raises(kpx.InputError, match="changes output 0"):
        optimized(torch.randn(5, 4), by_largest=True)
    model.centered = True
    with pytest.raises(kpx.InputError, match="changes output 0"):
        optimized(torch.randn(5, 4))


def test_an_input_that_first_had_another_size_than_the_batch_is_proved_when_it_has_it():
    class Two(torch.nn.Module):
        def forward(self, x, table):
            return x + table.mean(0)

    optimized = kpx.optimize(Two(), dynamic_shapes=kpx.Buckets(batch=[8]))
    optimized(torch.randn(5, 4), torch.randn(3, 4))
    with pytest.raises(kpx.InputError, match="changes output 0"):
        optimized(torch.randn(3, 4), torch.randn(3, 4))


def test_a_proof_changes_neither_inputs_nor_state_nor_the_random_state():
    class Writes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x, ids):
            self.calls.add_(1)
            return x * 2 + ids

    model, x, ids = Writes(), torch.randn(5, 4), torch.arange(5)[:, None]
    copies, state = (x.clone(), ids.clone()), torch.get_rng_state()
    kpx.optimize(model, dynamic_shapes=kpx.Buckets(batch=[8]))(x, ids)
    torch.testing.assert_close((x, ids), copies, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 1


def test_a_model_that_writes_its_parameters_is_refused_before_it_does():
    class Writes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x):
            self.weight.mul_(2)
            return x * self.weight

    model = Writes()
    with pytest.raises(kpx.InputError, match="writes one of its parameters"):
        kpx.optimize(model, dynamic_shapes=kpx.Buckets(batch=[8]))(torch.randn(5, 4))
    assert torch.equal(model.weight, torch.ones(4))


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


@pytest.mark.parametrize("lengths", [(3, 2, 16), (3, 3, 3, 3)])
def test_rows_that_see_each_other_are_refused_by_row(lengths):
    class Centered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(20, 8)

        def forward(self, ids, attention_mask):
            x = self.words(ids) * attention_mask[..., None]
            return x - x.mean(0)

    with pytest.raises(kpx.InputError, match="changes output 0"):
        kpx.optimize(Centered(), dynamic_shapes=BY_ROW)(*_padded_batch(*lengths, width=16))


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
