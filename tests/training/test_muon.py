from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import model
from jaxgpt.model import GPTConfig
from jaxgpt.model.params import flat, nested
from jaxgpt.sharding import ParallelConfig, make_mesh
from jaxgpt.training import muon
from jaxgpt.training.muon import COEFFICIENTS, newton_schulz, orthogonalize
from tests.tiny import PLAIN, random_params

CFG = GPTConfig(L=2, D=8, N=2, K=1, H=6, F=12, T=4, V=20, position="rotary")
RATE = optax.constant_schedule(0.02)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 6, 10), (1, 10, 6), (2, 7, 7)])
def test_iterations_map_singular_values_by_the_polynomial(shape):
    x = draw(0, *shape)
    u, s, vt = np.linalg.svd(np.float64(x), full_matrices=False)
    s /= np.linalg.norm(s, axis=-1, keepdims=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    found = newton_schulz(jnp.array(x), jnp.array(COEFFICIENTS))
    np.testing.assert_allclose(found, (u * s[:, None]) @ vt, atol=2e-5)


@pytest.mark.parametrize("budget", [1 << 25, 2 * 6 * 10, 1])
def test_matrices_in_one_batch_are_orthogonalized_as_each_by_itself(budget, monkeypatch):
    monkeypatch.setattr(muon, "BUDGET", budget)
    shapes = [(3, 6, 10), (1, 7, 7), (2, 10, 6), (1, 6, 10), (2, 5, 10)]
    stacks = [jnp.array(draw(i, *shape)) for i, shape in enumerate(shapes)]
    coefficients = jnp.array(COEFFICIENTS)
    for stack, found in zip(stacks, orthogonalize(stacks, coefficients), strict=True):
        for matrix, one in zip(stack, found, strict=True):
            alone = newton_schulz(matrix[None], coefficients)[0]
            np.testing.assert_allclose(one, alone, atol=2e-5)


def test_matrices_of_equal_shape_share_their_products():
    gpt = CFG.build(PLAIN)
    momentum = {p: x for p, x in flat(random_params(gpt)).items() if p[-1] == "w"}
    letters = model.letters(gpt)
    traced = jax.make_jaxpr(lambda m: list(muon.muon_updates(m, letters, jnp.ones(3)).values()))
    products = str(traced(momentum)).count("dot_general")
    # q, o are of 12 x 8, up, down too; k, v of 6 x 8: two batches of five iterations.
    assert products == 2 * 5 * 3


def axes_of(path, names):
    """The axes that optax takes for the inputs and outputs of a matrix in a block."""
    lead = int(names[0] == "L")
    outputs = {"q": 2, "k": 2, "v": 2}.get(path[-2], 1)
    reduction = tuple(range(lead + outputs, len(names)))
    return optax.contrib.MuonDimensionNumbers(reduction, tuple(range(lead, lead + outputs)))


@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_muon_is_that_of_optax_with_the_same_state(layers):
    gpt = CFG.build(replace(PLAIN, layers=layers))
    letters = model.letters(gpt)

    def matrices(seed):
        tree = random_params(gpt, seed=seed)
        return nested({p: x for p, x in flat(tree).items() if p[-1] == "w"})

    params = matrices(0)
    axes = nested({p: axes_of(p, letters[p][0]) for p in flat(params)})
    ours = muon.muon(RATE, letters, 0.1)
    theirs = optax.contrib.muon(
        RATE, weight_decay=0.1, muon_weight_dimension_numbers=lambda _: axes
    )
    state, expected_state = ours.init(params), theirs.init(params)
    update, expected_update = jax.jit(ours.update), jax.jit(theirs.update)
    for seed in (1, 2, 3):
        updates, state = update(matrices(seed), state, params)
        expected, expected_state = expected_update(matrices(seed), expected_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), updates, expected)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, expected_state)


@pytest.mark.parametrize(("data", "fsdp"), [(1, 8), (2, 4)])
def test_under_fsdp_devices_share_the_matrices(data, fsdp):
    shapes = [(6, 32, 48), (2, 48, 32), (3, 32, 32)]
    stacks = [jnp.array(draw(i, *shape)) for i, shape in enumerate(shapes)]
    coefficients = jnp.array(COEFFICIENTS)
    mesh = make_mesh(ParallelConfig(data=data, fsdp=fsdp))
    split = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))

    def program(stacks):
        return jax.jit(lambda stacks: orthogonalize(stacks, coefficients)).lower(stacks).compile()

    alone = program(stacks)
    placed = [jax.device_put(x, split) for x in stacks]
    with jax.set_mesh(mesh):
        shared = program(placed)
    for one, other in zip(alone(stacks), shared(placed), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    # A device has one of eight matrices of 32 x 48, and one of three of 32 x 32.
    flops = [compiled.cost_analysis()["flops"] for compiled in (shared, alone)]
    assert flops[0] < 0.2 * flops[1]
