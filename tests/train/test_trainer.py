"""The trainer: models of each framework, checkpoints that are gone on from, and what cannot go on."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kpx
from kpx.errors import CheckpointError, CheckpointWarning, TrainingError
from kpx.train import Trainer
from tests.devices import on_four
from tests.optional import torch


def _loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]) ** 2)


def _params():
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.standard_normal((8, 8)) * 0.3, jnp.float32) for n in "ab"}


def _batches(rows=8, count=None):
    rng = np.random.default_rng(1)
    while count is None or (count := count - 1) >= 0:
        yield {n: rng.standard_normal((rows, 8)).astype(np.float32) for n in "xy"}


def _trainer(**options):
    return Trainer(_loss, optax.adam(1e-2), params=_params(), **{"log_every": 1000, **options})


def _by_hand(steps):
    params, optimizer = _params(), optax.adam(1e-2)
    state, losses = optimizer.init(params), []
    for batch, _ in zip(_batches(), range(steps), strict=False):
        value, gradient = jax.value_and_grad(_loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return losses


def test_its_losses_are_those_of_a_loop_by_hand():
    ended = _trainer().fit(_batches(), 6)
    np.testing.assert_allclose(list(ended.losses.values()), _by_hand(6), rtol=1e-4)
    assert ended.step == 6
    assert list(ended.losses) == [1, 2, 3, 4, 5, 6]


def test_it_goes_on_from_the_last_checkpoint(tmp_path):
    first = _trainer(checkpoints=tmp_path, save_every=2)
    first.fit(_batches(), 4)
    first.close()
    second = _trainer(checkpoints=tmp_path, save_every=2)
    ended = second.fit(_batches(), 8)
    second.close()
    assert list(ended.losses) == [5, 6, 7, 8]
    np.testing.assert_allclose(list(ended.losses.values()), _by_hand(8)[4:], rtol=1e-4)


_BUCKETS = """
import jax, jax.numpy as jnp, numpy as np, optax
import kpx
from kpx.train import Trainer
rng, traced = np.random.default_rng(0), []
params = {"table": rng.standard_normal((32, 8)) * 0.3, "out": rng.standard_normal((8, 32)) * 0.3}
params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
def loss(params, batch):
    traced.append(batch["ids"].shape)
    logits, kept = params["table"][batch["ids"]] @ params["out"], batch["labels"] >= 0
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(kept, batch["labels"], 0))
    return jnp.sum(each * kept) / jnp.sum(kept)
def batches():
    draw = np.random.default_rng(1)
    for length in (9, 16, 12, 30, 5, 32):
        ids = draw.integers(0, 32, (8, length)).astype(np.int32)
        yield {"ids": ids, "labels": ids}
def losses(**options):
    return [*Trainer(loss, optax.adam(1e-2), params=params, log_every=1000, **options).fit(batches(), 6).losses.values()]
wanted = losses(plan={"data": 4})
buckets = kpx.Buckets(sequence=[16, 32])
for plan in ({"fsdp": 4}, {"data": 2, "context": 2}):
    traced.clear()
    found = losses(plan=plan, buckets=buckets, padding={"labels": -100})
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert {length for _, length in traced} == {16, 32}, traced
try:
    losses(plan={"context": 4}, buckets=kpx.Buckets(sequence=[18, 32]), padding={"labels": -100})
except kpx.ConfigError as error:
    assert "do not divide the buckets [18]" in str(error)
try:
    losses(plan={"fsdp": 4}, buckets=kpx.Buckets(sequence=[16]))
except kpx.InputError as error:
    print("the same" if "largest bucket is 16" in str(error) else error)
"""


def test_sequences_of_many_lengths_train_in_a_few_over_a_mesh():
    on_four(_BUCKETS)


def test_buckets_of_rows_are_refused():
    with pytest.raises(kpx.ConfigError, match="pads sequences alone"):
        _trainer(buckets=kpx.Buckets(batch=[8, 16]))


def _by_grain(kind):
    """Batches of grain's, by a loader or a data set; an iterable of `{"x", "y"}`."""
    grain = pytest.importorskip("grain")
    rows = np.random.default_rng(1).standard_normal((64, 2, 8)).astype(np.float32)
    if kind == "data set":
        return grain.MapDataset.source(rows).shuffle(seed=0).repeat().batch(8).map(_named).to_iter_dataset()
    sampler = grain.samplers.IndexSampler(64, grain.sharding.NoSharding(), shuffle=True, num_epochs=None, seed=0)

    class Named(grain.transforms.Map):
        def map(self, batch):
            return _named(batch)

    operations = [grain.transforms.Batch(8, drop_remainder=True), Named()]
    return grain.DataLoader(data_source=rows, sampler=sampler, operations=operations)


def _named(batch):
    return {"x": batch[:, 0], "y": batch[:, 1]}


@pytest.mark.parametrize("kind", ["data set", "loader"])
def test_data_of_grains_goes_on_where_it_was(tmp_path, kind):
    whole = _trainer().fit(_by_grain(kind), 6)
    first = _trainer(checkpoints=tmp_path, save_every=2)
    first.fit(_by_grain(kind), 4)
    first.close()
    second = _trainer(checkpoints=tmp_path, save_every=2)
    stream = iter(_by_grain(kind))
    ended = second.fit(stream, 6)
    second.close()
    np.testing.assert_allclose(list(ended.losses.values()), list(whole.losses.values())[4:], rtol=1e-5)


@pytest.mark.parametrize("damage", ["partial", "corrupt"])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, damage):
    first = _trainer(checkpoints=tmp_path, save_every=2)
    first.fit(_batches(), 4)
    first.close()
    for path in [p for p in (tmp_path / "4").rglob("*") if p.is_file()]:
        if damage == "partial" and "state" in path.parts and path.name != "_METADATA":
            path.unlink()
        elif damage == "corrupt" and path.stat().st_size > 0:
            path.write_bytes(b"\0" * path.stat().st_size)
    second = _trainer(checkpoints=tmp_path, save_every=2)
    with pytest.warns(CheckpointWarning, match="of step 4.*That of step 2 is used"):
        ended = second.fit(_batches(), 6)
    second.close()
    np.testing.assert_allclose(list(ended.losses.values()), _by_hand(6)[2:], rtol=1e-4)
    assert len(list(tmp_path.glob("4.*.unreadable"))) == 1  # nothing is lost
    assert (tmp_path / "4").is_dir()  # saved again


def test_another_models_checkpoint_is_refused_and_left(tmp_path):
    first = _trainer(checkpoints=tmp_path)
    first.fit(_batches(), 2)
    first.close()
    other = Trainer(_loss, optax.sgd(1e-2), params=_params(), checkpoints=tmp_path)
    with pytest.raises(CheckpointError, match="of another model or optimizer"):
        other.fit(_batches(), 4)
    assert (tmp_path / "2").is_dir()
    other.close()


def test_two_jobs_on_one_folder_are_an_error(tmp_path):
    (tmp_path / "kpx.lock").write_text(json.dumps({"job": "other", "host": "elsewhere", "process": 1, "time": 4e9}))
    with pytest.raises(CheckpointError, match="belongs to another job, process 1 on elsewhere"):
        _trainer(checkpoints=tmp_path)


def test_a_lock_that_a_dead_job_left_is_taken(tmp_path):
    (tmp_path / "kpx.lock").write_text(json.dumps({"job": "other", "host": "elsewhere", "process": 1, "time": 0}))
    _trainer(checkpoints=tmp_path).close()
    assert not (tmp_path / "kpx.lock").exists()


def test_a_loss_that_is_no_number_names_the_step_and_is_not_saved(tmp_path):
    def batches():
        for n, batch in enumerate(_batches()):
            yield batch | {"y": batch["y"] * (np.nan if n == 3 else 1)}

    trainer = _trainer(checkpoints=tmp_path, save_every=2)
    with pytest.raises(TrainingError, match=r"Step 4 gave .*loss=nan on process 0") as caught:
        trainer.fit(batches(), 8)
    trainer.close()
    assert caught.value.step == 4
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["2"]


def test_a_pytorch_model_trains_as_pytorch_trains_it():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))

    def loss(call, batch):
        return jnp.mean((call(batch["x"]) - batch["y"]) ** 2)

    ended = Trainer(model, optax.sgd(0.1), loss=loss, log_every=1000).fit(_batches(), 4)
    optimizer, wanted = torch.optim.SGD(model.parameters(), 0.1), []
    for batch, _ in zip(_batches(), range(4), strict=False):
        optimizer.zero_grad()
        value = torch.nn.functional.mse_loss(model(torch.from_numpy(batch["x"])), torch.from_numpy(batch["y"]))
        value.backward()
        optimizer.step()
        wanted.append(value.item())
    np.testing.assert_allclose(list(ended.losses.values()), wanted, rtol=1e-4)


def test_what_batch_norm_keeps_is_carried_along():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).train()
    trainer = Trainer(
        model, optax.sgd(0.1), loss=lambda call, b: jnp.mean((call(b["x"]) - b["y"]) ** 2), log_every=1000
    )
    trainer.fit(_batches(), 3)
    assert trainer.state.carried["1.num_batches_tracked"] == 3


def test_a_flax_module_of_either_kind_trains():
    from flax import linen, nnx

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(8)(jnp.tanh(linen.Dense(16)(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))

    made = Linen()
    bound = made.bind(made.init(jax.random.key(0), jnp.ones((1, 8))))
    for model in (bound, Nnx(nnx.Rngs(0))):
        ended = Trainer(
            model, optax.adam(3e-2), loss=lambda call, b: jnp.mean((call(b["x"]) - b["x"]) ** 2), log_every=1000
        ).fit(_batches(), 30)
        assert ended.losses[30] < 0.5 * ended.losses[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"plan": "fast"}, "'auto', sizes of axes"), ({"params": None}, "without its parameters")],
)
def test_what_cannot_be_trained_is_refused(options, says):
    with pytest.raises(kpx.KpxError, match=says):
        Trainer(_loss, optax.sgd(0.1), **{"params": _params(), **options})


def test_a_loss_that_is_no_single_number_is_an_error():
    trainer = Trainer(lambda p, b: b["x"] @ p["a"], optax.sgd(0.1), params=_params())
    with pytest.raises(kpx.InputError, match=r"not one number: it has the shape \(8, 8\)"):
        trainer.fit(_batches(), 1)


def test_data_without_a_batch_is_an_error():
    with pytest.raises(kpx.InputError, match="no batch"):
        _trainer().fit([], 1)


def test_data_that_ends_early_ends_the_training():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended = _trainer().fit(_batches(count=3), 10)
    assert ended.step == 3
    assert len(ended.losses) == 3
