"""Muon (Jordan 2024): the update of a matrix is its momentum, orthogonalized.

Newton-Schulz iterations orthogonalize with nothing but matrix products. All matrices of equal
shape, of all layers, share one batched product, also with those that are wide where they are tall.
Under FSDP the devices share these matrices.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonState

from jaxgpt.model import Leaves
from jaxgpt.model.params import Path, first_contracted_axis
from jaxgpt.sharding import PyTree, constrain, parts

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Those of every iteration, which end with singular values between 0.7 and 1.2 (Jordan 2024)."""
ITERATIONS = 5
BUDGET = 1 << 25
"""The numbers of the matrices of a device that share a product; one matrix may have more."""


def newton_schulz(matrices: jax.Array, coefficients: jax.Array) -> jax.Array:
    """Orthogonalizes matrices approximately: U S V^T becomes nearly U V^T.

    An iteration maps every singular value s to a s + b s^3 + c s^5.

    Args:
        matrices: [batch, rows, columns]; it is fastest with no more rows than columns.
        coefficients: a, b and c [3].

    Returns:
        [batch, rows, columns].
    """
    a, b, c = coefficients
    x: jax.Array = matrices / (jnp.linalg.norm(matrices, axis=(1, 2), keepdims=True) + 1e-8)
    for _ in range(ITERATIONS):
        gram = x @ x.swapaxes(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def orthogonalize(stacks: Sequence[jax.Array], coefficients: jax.Array) -> list[jax.Array]:
    """`newton_schulz` of stacks of matrices, those of equal shape in one batch.

    Under FSDP each device has some of the matrices of a batch, whole: products of matrices that are
    split would be added up over the devices in every iteration. Where all devices have all
    parameters, each computes all of it, so that no results have to be gathered.

    Args:
        stacks: Arrays [layers, outputs, inputs], each with sizes of its own.
        coefficients: a, b and c [3].

    Returns:
        Arrays of the same shapes, in the same order.
    """
    batches = defaultdict(list)
    for index, x in enumerate(stacks):
        batches[min(x.shape[1:]), max(x.shape[1:])].append(index)
    results: dict[int, jax.Array] = {}
    for (rows, columns), members in batches.items():
        batch = jnp.concatenate([_wide(stacks[index]) for index in members])
        most = max(1, BUDGET // (rows * columns)) * (parts("B") if parts("D") > 1 else 1)
        bounds = list(range(most, len(batch), most))
        split = jnp.split(batch, bounds)
        done = [_shared(newton_schulz(_shared(part), coefficients)) for part in split]
        ends = [sum(len(stacks[i]) for i in members[: n + 1]) for n in range(len(members) - 1)]
        results |= zip(members, jnp.split(jnp.concatenate(done), ends), strict=True)
    return [
        results[i] if results[i].shape == x.shape else results[i].swapaxes(1, 2)
        for i, x in enumerate(stacks)
    ]


def _shared(x: jax.Array) -> jax.Array:
    return constrain(x, "B--") if parts("D") > 1 else x


def _wide(x: jax.Array) -> jax.Array:
    return x if x.shape[1] <= x.shape[2] else x.swapaxes(1, 2)


def as_stack(x: jax.Array, letters: tuple[str, ...]) -> jax.Array:
    """A parameter with these letters as [layers, outputs, inputs]; one layer if it has no L."""
    lead, middle = int(letters[0] == "L"), first_contracted_axis(letters)
    return x.reshape(math.prod(x.shape[:lead]), math.prod(x.shape[lead:middle]), -1)


def muon_updates(
    momentum: dict[Path, jax.Array], letters: Leaves, coefficients: jax.Array
) -> dict[Path, jax.Array]:
    """Orthogonalized momenta, times sqrt(max(1, outputs / inputs)) (Jordan 2024).

    Args:
        momentum: The momenta of matrices, by path.
        letters: The letters and shapes of parameters, by path.
        coefficients: a, b and c [3].

    Returns:
        Arrays of the same shapes by path, in the same order.
    """
    stacks = [as_stack(x, letters[path][0]) for path, x in momentum.items()]
    return {
        path: (math.sqrt(max(1, done.shape[1] / done.shape[2])) * done).reshape(x.shape)
        for (path, x), done in zip(
            momentum.items(), orthogonalize(stacks, coefficients), strict=True
        )
    }


def scale_by_muon(letters: Leaves, beta: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum with bias correction, then `muon_updates`.

    The state is that of `optax.contrib.scale_by_muon`, so that checkpoints of both are the same.

    Args:
        letters: The letters and shapes of parameters by path; those updated are matrices.
        beta: The decay rate of the momentum.
    """

    def init(params: PyTree) -> MuonState:
        momentum = jax.tree.map(jnp.zeros_like, params)
        return MuonState(jnp.zeros((), jnp.int32), momentum, jnp.array(COEFFICIENTS))

    def update(
        grads: PyTree, state: MuonState, params: PyTree | None = None
    ) -> tuple[PyTree, MuonState]:
        count = optax.safe_increment(state.count)
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.mu, grads)
        now, then = 1 - beta**count, 1 - beta ** (count + 1)
        ahead = jax.tree.map(lambda m, g: beta * m / then + (1 - beta) * g / now, momentum, grads)
        leaves, structure = jax.tree_util.tree_flatten_with_path(ahead)
        by_path = {tuple(entry.key for entry in path): leaf for path, leaf in leaves}
        done = muon_updates(by_path, letters, state.ns_coeffs)
        updates = jax.tree.unflatten(structure, done.values())
        return updates, MuonState(count, momentum, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def muon(
    rate: optax.Schedule, letters: Leaves, weight_decay: float
) -> optax.GradientTransformation:
    """Muon with decoupled weight decay; `optax.contrib.muon` with batched products.

    Args:
        rate: The learning rate by step.
        letters: As for `scale_by_muon`.
        weight_decay: It is multiplied by the learning rate.
    """
    ours = optax.chain(
        scale_by_muon(letters),
        optax.identity(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    # Optax has AdamW for other parameters beside it, of which there are none here: the state is
    # nested in the same way.
    return optax.partition(
        {"muon": ours, "adam": optax.adamw(rate)},
        lambda params: jax.tree.map(lambda _: "muon", params),
    )
