"""State that a model changes, random numbers, indices out of range: as eager PyTorch has them."""

import copy

import pytest
import torch

import kpx

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(4, 2))

    def forward(self, x, place):
        self.calls += 1
        self.cache[place] = x
        return self.cache.sum() + self.calls


def _pair(model):
    return model, kpx.optimize(copy.deepcopy(model))


# State -----------------------------------------------------------------------------------------


def test_buffers_come_back_changed_at_every_call():
    eager, optimized = _pair(Counter())
    for i in range(4):
        args = torch.full((1, 2), float(i)), torch.tensor([i])
        assert torch.equal(optimized(*args), eager(*args))
    assert torch.equal(optimized.cache, eager.cache)
    assert optimized.calls == 4


def test_a_buffer_keeps_its_storage_when_it_is_written():
    model = Counter()
    optimized = kpx.optimize(model)
    before = model.cache.data_ptr()
    optimized(torch.ones(1, 2), torch.tensor([1]))
    assert model.cache.data_ptr() == before


def test_batch_norm_in_training_mode_updates_its_statistics():
    eager, optimized = _pair(torch.nn.BatchNorm1d(8).train())
    for i in range(3):
        torch.testing.assert_close(optimized(X + i), eager(X + i))
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(dict(optimized.named_buffers())[name], buffer)


def test_what_is_loaded_into_state_is_seen():
    model = Counter()
    optimized = kpx.optimize(model)
    optimized(torch.ones(1, 2), torch.tensor([0]))
    with torch.no_grad():
        model.calls.fill_(10)
    assert optimized(torch.ones(1, 2), torch.tensor([0])) == 2 + 11


def test_an_input_changed_in_place_is_changed_for_the_caller():
    class Doubles(torch.nn.Module):
        def forward(self, x):
            x.mul_(2)
            return x.sum()

    x = X.clone()
    torch.testing.assert_close(kpx.optimize(Doubles())(x), (2 * X).sum())
    assert torch.equal(x, 2 * X)


def test_writes_through_views_are_seen_by_their_base():
    class Writes(torch.nn.Module):
        def forward(self, x):
            y = x.clone()
            y.view(-1)[::2].zero_()
            y.t()[0].add_(1)
            torch.mul(y[1], 3, out=y[1])
            return y

    assert torch.equal(kpx.optimize(Writes())(X), Writes()(X))


# Random ops ------------------------------------------------------------------------------------


def test_every_call_draws_anew():
    model = kpx.optimize(torch.nn.Dropout(0.5).train())
    assert not torch.equal(model(torch.ones(64)), model(torch.ones(64)))


def test_a_model_that_draws_nothing_leaves_pytorchs_generator_alone():
    class Model(torch.nn.Module):
        def forward(self, q):
            y = torch.nn.functional.dropout(q, 0.5, training=False)
            return torch.nn.functional.scaled_dot_product_attention(y, y, y)

    model, q = kpx.optimize(Model()), torch.randn(1, 2, 4, 8)
    torch.manual_seed(0)
    model(q)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_manual_seed_decides_what_is_drawn():
    model = kpx.optimize(torch.nn.Dropout(0.5).train())
    torch.manual_seed(7)
    first = model(torch.ones(64))
    torch.manual_seed(7)
    assert torch.equal(model(torch.ones(64)), first)


def test_two_random_ops_of_a_model_draw_apart():
    class Two(torch.nn.Module):
        def forward(self, x):
            return torch.rand_like(x), torch.rand_like(x)

    a, b = kpx.optimize(Two())(X)
    assert not torch.equal(a, b)


def test_dropout_keeps_the_mean_and_the_share():
    out = kpx.optimize(torch.nn.Dropout(0.25).train())(torch.ones(200_000))
    assert abs((out == 0).float().mean() - 0.25) < 0.01
    assert abs(out.mean() - 1) < 0.01
    assert torch.allclose(out[out != 0], torch.tensor(1 / 0.75))


def test_dropout_inside_attention_is_on_in_training():
    class Model(torch.nn.Module):
        def forward(self, q):
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    model = kpx.optimize(Model())
    q = torch.randn(1, 2, 4, 8)
    assert not torch.equal(model(q), model(q))


# Errors that depend on values ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 5])
def test_an_embedding_index_out_of_range_is_pytorchs_error(bad):
    model = kpx.optimize(torch.nn.Embedding(5, 3))
    model(torch.tensor([0, 4]))
    with pytest.raises(IndexError, match=r"aten\.embedding.*out of range for dimension 0 with size 5"):
        model(torch.tensor([0, bad]))


class Picks(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, i):
        match self.how:
            case "index":
                return x[i]
            case "gather":
                return x.gather(0, i[:, None])
            case "index_select":
                return x.index_select(0, i)
            case "scatter":
                return x.scatter(0, i[:, None], 1.0)
            case "take":
                return x.take(i * 8)


@pytest.mark.parametrize("how", ["index", "gather", "index_select", "scatter", "take"])
def test_an_index_out_of_range_is_an_error_and_one_in_range_is_not(how):
    model = kpx.optimize(Picks(how))
    inside = torch.tensor([0, 2])
    assert torch.equal(model(X, inside), Picks(how)(X, inside))
    with pytest.raises(IndexError, match="out of range"):
        model(X, torch.tensor([0, 3]))


def test_a_failed_check_writes_nothing():
    model = Counter()
    optimized = kpx.optimize(model)
    optimized(torch.ones(1, 2), torch.tensor([0]))
    with pytest.raises(IndexError):
        optimized(torch.ones(1, 2), torch.tensor([9]))
    assert model.calls == 1


def test_a_singular_matrix_is_pytorchs_error():
    class Inverse(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x)

    model = kpx.optimize(Inverse())
    torch.testing.assert_close(model(2 * torch.eye(3)), torch.eye(3) / 2)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        model(torch.zeros(3, 3))


def test_pytorchs_own_runtime_assertions_are_kept():
    class Asserts(torch.nn.Module):
        def forward(self, x):
            torch._assert_async(x.sum() > 0, "the sum must be positive")
            n = x.max().item()
            torch._check(n < 100)
            return x * n

    model = kpx.optimize(Asserts())
    torch.testing.assert_close(model(torch.tensor([1.0, 2.0])), torch.tensor([2.0, 4.0]))
    with pytest.raises(RuntimeError, match="the sum must be positive"):
        model(torch.tensor([-1.0, -2.0]))


def test_arctangents_are_right_on_wide_vectors():
    class Atan(torch.nn.Module):
        def forward(self, x):
            return torch.atan(x)

    x = 9 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kpx.optimize(Atan())(x), torch.atan(x))


def test_an_input_with_odd_strides_in_dimensions_of_one_is_read():
    x = torch.arange(3.0).as_strided((1, 1, 3, 1), (3, 3, 1, 3))
    assert torch.equal(kpx.optimize(torch.nn.ReLU())(x), x)
