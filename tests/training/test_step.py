from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import model
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import Mean
from jaxgpt.sharding import ParallelConfig, make_mesh
from jaxgpt.training import optim
from jaxgpt.training.guard import highest_plausible_loss, init_guard, is_spike, update_guard
from jaxgpt.training.step import eval_step, from_saved, init_state, to_saved, train_step
from tests.tiny import PLAIN

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.standard_normal(3).astype(np.float32), "b": np.float32(0.5)}


def batch(seed, rows=8):
    """Rows of 5 numbers each of which has its weight: ragged, as masks are."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, 5, 3)).astype(np.float32),
        "y": rng.standard_normal((rows, 5)).astype(np.float32),
        "weights": (rng.random((rows, 5)) * (rng.random((rows, 1)) > 0.3)).astype(np.float32),
    }


def squares(params, batch, key):
    """Weighted least squares, as an objective."""
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    total = (batch["weights"] * error**2).sum()
    return total, {"loss": Mean(total, batch["weights"].sum())}


def noise(params, batch, key):
    """An objective whose gradient is its key's noise."""
    total = (params["w"] * jax.random.normal(key, (3,))).sum() * batch["weights"].sum()
    return total, {"loss": Mean(total, batch["weights"].sum())}


def stepper(loss_fn=squares, tx=None, **settings):
    tx = tx or optax.adam(0.1)
    step = jax.jit(partial(train_step, loss_fn=loss_fn, tx=tx, **settings))
    ema = settings.get("ema", 0.0) > 0
    params = jax.tree.map(jnp.asarray, PARAMS)
    return step, init_state(params, tx, jax.random.key(0), ema=ema)


def halved(batch):
    return jax.tree.map(lambda rows: rows.reshape(2, 4, *rows.shape[1:]), batch)


def assert_trees_close(a, b):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6), a, b)


def assert_states_equal(a, b):
    a, b = (s._replace(key=jax.random.key_data(s.key)) for s in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_skipped(after, before):
    """Nothing has changed but the step number and the count of skipped steps."""
    assert after.step == before.step + 1 and after.guard.skipped == before.guard.skipped + 1
    assert_states_equal(after._replace(step=before.step, guard=before.guard), before)


def test_the_gradient_is_that_of_the_weighted_mean():
    step, state = stepper(tx=optax.sgd(0.1))
    data = batch(1)
    after, metrics = step(state, data)
    x, y, weights = (data[name].astype(np.float64) for name in ("x", "y", "weights"))
    error = x @ PARAMS["w"] + PARAMS["b"] - y
    slope = 2 * weights * error / weights.sum()
    dw, db = np.einsum("bt,btd->d", slope, x), slope.sum()
    np.testing.assert_allclose(after.params["w"], PARAMS["w"] - 0.1 * dw, rtol=1e-5)
    np.testing.assert_allclose(after.params["b"], PARAMS["b"] - 0.1 * db, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt((dw**2).sum() + db**2), rtol=1e-5)
    mean = (weights * error**2).sum() / weights.sum()
    np.testing.assert_allclose(metrics["loss"].value, mean, rtol=1e-5)
    assert metrics["finite"]


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1.0, 1e3])
def test_the_update_is_that_of_an_optax_chain(clip):
    cfg = optim.OptimConfig(warmup=0, clip=clip, schedule="constant", learning_rate=0.1)
    tx = optim.build(cfg, {("w",): (("D",), (3,)), ("b",): ((), ())}, 10)
    step, state = stepper(tx=tx)
    decays = {"w": True, "b": False}
    adamw = optax.adamw(lambda _: 0.1, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=0.1, mask=decays)
    chain = optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw
    params, opt = state.params, chain.init(state.params)
    for seed in range(4):
        data = batch(seed)
        (_, report), grads = jax.value_and_grad(squares, has_aux=True)(params, data, None)
        grads = jax.tree.map(lambda g, n=report["loss"].count: g / n, grads)
        updates, opt = chain.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        state, _ = step(state, data)
    assert_trees_close(state.params, params)
    assert_trees_close(state.opt, opt)  # and they have the same structure


@pytest.mark.skipif(
    jax.__version_info__ < (0, 8, 1), reason="jax before 0.8.1 copies a gradient of a product"
)
def test_an_update_copies_neither_the_gradient_nor_the_state():
    cfg = optim.OptimConfig(warmup=0)
    w = jnp.ones((512, 512))

    def loss(params, batch, key):
        total = jnp.square(batch["x"] @ params["w"]).sum()
        return total, {"loss": Mean(total, jnp.float32(8))}

    tx = optim.build(cfg, {("w",): (("D", "F"), w.shape)}, 10)
    state = init_state({"w": w}, tx, jax.random.key(0))
    step = jax.jit(partial(train_step, loss_fn=loss, tx=tx), donate_argnums=0)
    compiled = step.lower(state, {"x": jnp.ones((8, 512))}).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * w.nbytes  # the gradient


def test_accumulation_is_exact_with_ragged_weights():
    ends = []
    for micro in (1, 2, 4):
        step, state = stepper(micro=micro)
        for seed in range(4):
            state, metrics = step(state, batch(seed))
        ends.append((state.params, metrics["loss"], metrics["grad_norm"]))
    for other in ends[1:]:
        assert_trees_close(other, ends[0])


@pytest.mark.parametrize("field", ["y", "weights"])
def test_a_batch_that_is_not_finite_changes_nothing_but_the_step(field):
    step, state = stepper(ema=0.9)
    state, _ = step(state, batch(0))
    bad = batch(1)
    bad[field][2, 3] = np.nan
    after, metrics = step(state, bad)
    assert not metrics["finite"]
    assert_skipped(after, state)
    again, metrics = step(after, batch(2))
    assert metrics["finite"]
    assert (again.params["w"] != state.params["w"]).all()


def test_a_batch_of_no_weight_is_skipped():
    step, state = stepper()
    after, metrics = step(state, batch(0) | {"weights": np.zeros((8, 5), np.float32)})
    assert not metrics["finite"]
    assert_skipped(after, state)


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    step, state = stepper()
    bad = batch(0) | {"y": np.full((8, 5), np.nan, np.float32)}
    counts = []
    for data in (bad, batch(1), bad, bad):
        state, metrics = step(state, data)
        counts.append((int(metrics["skipped"]), int(metrics["in_a_row"])))
    assert counts == [(1, 1), (1, 0), (2, 1), (3, 2)]
    assert (state.step, state.guard.updates) == (4, 1)


@pytest.mark.parametrize("count", [63, 64, 128, 200])
def test_a_spike_is_what_numpy_finds_six_deviations_above_the_last_128_steps(count):
    values = np.random.default_rng(count).normal(3.0, 0.5, (count, 2)).astype(np.float32)
    guard = init_guard()
    for loss, norm in values:
        guard = update_guard(guard, loss, norm, jnp.bool_(True))
    last = values[-128:].astype(np.float64)
    (loss, norm), (far_loss, far_norm) = last.mean(0), last.mean(0) + 6 * last.std(0)
    known = count >= 64  # before that, nothing is a spike
    assert bool(is_spike(guard, jnp.float32(far_loss * 1.001), jnp.float32(norm), 6)) == known
    assert bool(is_spike(guard, jnp.float32(loss), jnp.float32(far_norm * 1.001), 6)) == known
    assert not is_spike(guard, jnp.float32(far_loss * 0.999), jnp.float32(far_norm * 0.999), 6)


def test_a_spike_is_skipped_only_if_asked_for():
    spike = batch(9)
    spike["y"] = spike["y"] + 1000
    for sigmas in (0.0, 6.0):
        step, state = stepper(tx=optax.sgd(1e-3), spike=sigmas)
        for seed in range(64):
            state, _ = step(state, batch(seed))
        after, metrics = step(state, spike)
        assert metrics["skipped"] == (sigmas > 0)
        assert bool((after.params["w"] == state.params["w"]).all()) == (sigmas > 0)


def test_a_skipped_step_is_not_in_the_history():
    guard = update_guard(init_guard(), jnp.float32(2), jnp.float32(1), jnp.bool_(True))
    skipped = update_guard(guard, jnp.float32(1e9), jnp.float32(1e9), jnp.bool_(False))
    np.testing.assert_array_equal(skipped.losses, guard.losses)
    assert highest_plausible_loss(skipped) == highest_plausible_loss(guard) == 2 + 18 + 1


def test_a_plausible_loss_is_near_the_last_ones_once_there_is_a_history():
    guard = init_guard()
    assert highest_plausible_loss(guard) == np.inf
    losses = np.random.default_rng(0).normal(3.0, 0.1, 300).astype(np.float32)
    for loss in losses:
        guard = update_guard(guard, loss, jnp.float32(1), jnp.bool_(True))
    last = losses[-128:]
    np.testing.assert_allclose(
        highest_plausible_loss(guard), last.max() + 6 * last.std() + 1, rtol=1e-5
    )


def test_randomness_is_a_function_of_key_and_step():
    step, state = stepper(noise, optax.sgd(1.0))

    def drawn(key, number):
        start = state._replace(key=jax.random.key(key), step=jnp.int32(number))
        after, _ = step(start, batch(0))
        assert (jax.random.key_data(after.key) == jax.random.key_data(start.key)).all()
        return after.params["w"] - state.params["w"]

    np.testing.assert_array_equal(drawn(0, 7), drawn(0, 7))
    others = [drawn(0, 7), drawn(0, 8), drawn(1, 7)]
    assert len({tuple(map(float, other)) for other in others}) == 3


def test_each_part_of_a_batch_has_its_own_randomness():
    def moved(micro):
        step, state = stepper(noise, optax.sgd(1.0), micro=micro)
        even = batch(0) | {"weights": np.ones((8, 5), np.float32)}
        return state.params["w"] - step(state, even)[0].params["w"]

    key = jax.random.fold_in(jax.random.key(0), 0)
    parts = [jax.random.normal(jax.random.fold_in(key, part), (3,)) for part in range(2)]
    np.testing.assert_allclose(moved(1), jax.random.normal(key, (3,)), rtol=1e-5)
    np.testing.assert_allclose(moved(2), (parts[0] + parts[1]) / 2, rtol=1e-4)


def test_each_device_of_a_mapped_axis_has_its_own_randomness():
    tx = optax.sgd(1.0)
    step = partial(train_step, loss_fn=noise, tx=tx, axis="rows")
    mapped = jax.jit(jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name="rows"))
    state = init_state(jax.tree.map(jnp.asarray, PARAMS), tx, jax.random.key(0))
    same = jax.tree.map(lambda rows: np.stack([rows, rows]), batch(0))
    moved = state.params["w"] - mapped(state, same)[0].params["w"]
    key = jax.random.fold_in(jax.random.key(0), 0)
    draws = [jax.random.normal(jax.random.fold_in(key, device), (3,)) for device in range(2)]
    np.testing.assert_allclose(moved, (draws[0] + draws[1]) / 2, rtol=1e-4)


def test_each_device_of_a_data_parallel_mesh_has_its_own_randomness():
    step, state = stepper(noise, optax.sgd(1.0))
    even = batch(0) | {"weights": np.ones((8, 5), np.float32)}
    with jax.set_mesh(make_mesh(ParallelConfig(devices=2))):
        moved = state.params["w"] - step(state, even)[0].params["w"]
    key = jax.random.fold_in(jax.random.key(0), 0)
    draws = [jax.random.normal(jax.random.fold_in(key, device), (3,)) for device in range(2)]
    np.testing.assert_allclose(moved, (draws[0] + draws[1]) / 2, rtol=1e-4)


def test_a_mapped_axis_adds_up_to_the_whole_batch():
    step, state = stepper()
    tx = optax.adam(0.1)
    part = partial(train_step, loss_fn=squares, tx=tx, axis="rows")
    mapped = jax.jit(jax.vmap(part, in_axes=(None, 0), out_axes=None, axis_name="rows"))
    whole, split = step(state, batch(0)), mapped(state, halved(batch(0)))
    assert_trees_close(split[0].params, whole[0].params)
    assert_trees_close(split[1], whole[1])


def test_running_average_follows_its_formula():
    step, state = stepper(ema=0.75)
    average = PARAMS["w"].astype(np.float64)
    for seed in range(3):
        state, _ = step(state, batch(seed))
        average = 0.75 * average + 0.25 * np.asarray(state.params["w"])
    np.testing.assert_allclose(state.ema["w"], average, rtol=1e-6)
    assert (state.ema["w"] != state.params["w"]).all()


def test_evaluation_has_no_randomness_and_adds_up_over_an_axis():
    keys = []

    def loss_fn(params, batch, key):
        keys.append(key)
        return squares(params, batch, key)

    whole = eval_step(PARAMS, batch(0), loss_fn=loss_fn)["loss"]
    assert keys == [None]
    halves = halved(batch(0))
    step = partial(eval_step, loss_fn=squares, axis="rows")
    mapped = jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name="rows")
    assert_trees_close(mapped(PARAMS, halves)["loss"], whole)


@pytest.mark.parametrize("ema", [False, True])
def test_saved_form_is_the_same_for_stacked_layers_and_reads_back(ema):
    def state_of(layers):
        gpt = GPTConfig(L=2, D=8, N=2, T=4, V=20).build(replace(PLAIN, layers=layers))
        tx = optim.build(optim.OptimConfig(warmup=0), model.letters(gpt), 10)
        return jax.eval_shape(
            lambda: init_state(model.init(gpt, jax.random.key(0)), tx, jnp.zeros(2), ema=ema)
        )

    rng = np.random.default_rng(0)
    filled = partial(jax.tree.map, lambda x: np.float32(rng.standard_normal(x.shape)))
    unrolled, scanned = filled(state_of("unrolled")), filled(state_of("scan"))
    saved = jax.jit(lambda state: to_saved(state, 2, scanned=True))(scanned)
    shapes = partial(jax.tree.map, np.shape)
    assert shapes(saved) == shapes(to_saved(unrolled, 2, scanned=False))
    assert ("ema" in saved) == ema
    for state, form in ((unrolled, to_saved(unrolled, 2, scanned=False)), (scanned, saved)):
        back = jax.jit(partial(from_saved, scanned=form is saved))(form)
        jax.tree.map(np.testing.assert_array_equal, back, state)
