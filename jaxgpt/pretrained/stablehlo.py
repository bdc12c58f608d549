"""Exports a model as StableHLO programs with `jax.export`, which jax runs without jaxgpt.

There are two programs, which differ in the number of tokens that they read at once: `prefill` reads
a part of the prompt, and `decode` one token. Both are

    logits, cache = program(weights, cache, tokens, start, count)

with `weights` and `cache` as lists of arrays, `tokens` int32 [1, T], whose first is at position
`start` and of which `count` are not padding, and float32 `logits` [V] of the token after them. All
shapes are fixed, so that prompts of any length need no compilation. Padding leaves values in the
cache at later positions, which later tokens do not attend to and overwrite.
"""

import json
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distribution, version
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxgpt.config import Config
from jaxgpt.errors import InputError
from jaxgpt.generation.decode import extend
from jaxgpt.model import GPTConfig, Params, empty_cache, next_logits
from jaxgpt.model.params import flat, nested
from jaxgpt.paths import expand
from jaxgpt.pretrained import loader
from jaxgpt.pretrained.export import decoder, new_folder, write_text_files
from jaxgpt.pretrained.foreign import PROGRAMS
from jaxgpt.pretrained.tensors import SINGLE, STORED, Shape, write_folder
from jaxgpt.pretrained.trained import PLAIN, Dtype, convert_dtype

PLATFORMS = ("cpu", "cuda", "tpu")
PREFILL = 64  # tokens at once: more would waste time on short prompts, less on long ones
GUARANTEE = "https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees"


class Programs(NamedTuple):
    """A model's programs, and what they take."""

    prefill: export.Exported
    decode: export.Exported
    weights: dict[str, jax.Array | np.ndarray]
    """By parameter path, in the order in which the programs take them."""
    cache: list[jax.ShapeDtypeStruct]
    """The empty cache is zeros of these shapes."""
    context: int
    """The most tokens of a text."""
    tokens: dict[str, int]
    """The number of tokens that each program takes."""


def to_stablehlo(
    path: str | Path,
    folder: str | Path,
    *,
    adapter: str | Path = "",
    dtype: Dtype = "float32",
    context: int = 0,
) -> list[Path]:
    """Exports a model as programs for CPU, NVIDIA GPU and TPU, with weights and tokenizer.

    The folder gets a serialized program for prefill and one for decoding, each for all platforms,
    `model.safetensors`, the tokenizer's files, `programs.json`, which describes the programs, and
    `run.py`, which generates with them and needs jax and numpy alone. The attention is jax's own
    operations and no kernel, so that one program runs everywhere.

    Args:
        path: The model, as for `jaxgpt.load`.
        folder: A folder that does not exist or is empty.
        adapter: A folder with a LoRA adapter in PEFT's layout to merge into the model.
        dtype: The data type of the weights, see `Trained.astype`.
        context: The positions of the KV cache; 0: the model's context length.

    Returns:
        The files.

    Raises:
        InputError: The model is not decoder-only, the context is too long, or the folder cannot be
            written.
    """
    found, params = decoder(path, adapter)
    cfg = found.config.model
    context = checked_context(cfg, context)
    with new_folder(expand(folder)) as draft:
        write_text_files(found, draft)
        made = programs(cfg, convert(cfg, params(), dtype), context, PLATFORMS)
        names = {np.dtype(known): name for name, known in STORED.items()}
        shapes = {name: Shape(names[x.dtype], x.shape) for name, x in made.weights.items()}
        write_folder(draft, shapes, lambda name: np.asarray(made.weights[name]), 1 << 62)
        for name in made.tokens:
            (draft / f"{name}.bin").write_bytes(getattr(made, name).serialize())
        about = describe(made, cfg.V, dtype)
        (draft / PROGRAMS).write_text(json.dumps(about, indent=2) + "\n")
        (draft / "run.py").write_text(Path(loader.__file__).read_text())
        with zipfile.ZipFile(draft / "flatbuffers.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            library = distribution("flatbuffers")
            for file in library.files or ():
                if "__pycache__" not in file.parts:
                    archive.writestr(file.as_posix(), file.read_binary())
    return sorted(expand(folder).iterdir())


def checked_context(cfg: GPTConfig, context: int) -> int:
    """The positions of the KV cache, the model's if 0. Raises InputError if they are too many."""
    if not 0 <= context <= cfg.decode_T:
        raise InputError(
            f"context={context} is invalid; use 1 to {cfg.decode_T}, the model's context",
            field="context",
        )
    return context or cfg.decode_T


def convert(cfg: GPTConfig, params: Params, dtype: Dtype) -> Params:
    """The parameters in a data type, see `Trained.astype`."""
    return jax.jit(partial(convert_dtype, Config(model=cfg), dtype))(params)


def programs(cfg: GPTConfig, params: Params, context: int, platforms: tuple[str, ...]) -> Programs:
    """Exports prefill and decoding of a model.

    Args:
        cfg: The architecture.
        params: The parameters: of their values nothing is part of the programs.
        context: The most tokens of a text.
        platforms: Where the programs run, as `jax.export` names it.
    """
    halved = params["wte"].dtype == jnp.bfloat16
    model = cfg.build(replace(PLAIN, dtype="bfloat16" if halved else "float32"))
    tokens = {"prefill": min(PREFILL, context), "decode": 1}
    weights = {path: leaf for path, leaf in sorted(flat(params).items())}
    slots = -(-context // tokens["prefill"]) * tokens["prefill"]  # padding has its own, too
    cache, tree = jax.tree.flatten(
        jax.eval_shape(partial(empty_cache, model, 1, slots, tokens["prefill"]))
    )

    def program(
        weights_: list[jax.Array],
        cache: list[jax.Array],
        tokens_1T: jax.Array,
        start: jax.Array,
        count: jax.Array,
    ) -> tuple[jax.Array, list[jax.Array]]:
        params = nested(dict(zip(weights, weights_, strict=True)))
        after = jax.tree.unflatten(tree, cache)
        hidden_1TD, after = extend(model, params, tokens_1T, start[None], after)
        last_11D = jax.lax.dynamic_slice_in_dim(hidden_1TD, count - 1, 1, 1)
        return next_logits(cfg, params, last_11D)[0, 0, : cfg.V], jax.tree.leaves(after)

    number = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in weights.values()]
    exported = {
        name: export.export(jax.jit(program), platforms=platforms)(
            shapes, cache, jax.ShapeDtypeStruct((1, T), jnp.int32), number, number
        )
        for name, T in tokens.items()
    }
    named = {"/".join(path): leaf for path, leaf in weights.items()}
    return Programs(**exported, weights=named, cache=cache, context=context, tokens=tokens)


def describe(made: Programs, V: int, dtype: str) -> dict[str, object]:
    """What `programs.json` says: what the programs take and return, and who can run them."""
    return {
        "call": "logits, cache = program(weights, cache, tokens, start, count)",
        "arguments": {
            "weights": "a list of the tensors in `weights.order`",
            "cache": "a list of arrays, at first zeros of the shapes in `cache`",
            "tokens": "int32 [1, T], padded at the right; T is in `programs`",
            "start": "int32: the position of the first token; the first of a text is at 0",
            "count": "int32: how many of the tokens are not padding",
            "logits": f"float32 [{V}], of the token after these",
        },
        "context": made.context,
        "dtype": dtype,
        "programs": {
            name: {"file": f"{name}.bin", "tokens": tokens} for name, tokens in made.tokens.items()
        },
        "cache": [{"shape": x.shape, "dtype": x.dtype.name} for x in made.cache],
        "weights": {"file": SINGLE, "order": [*made.weights]},
        "platforms": made.decode.platforms,
        "versions": {
            "jax": jax.__version__,
            "jaxlib": version("jaxlib"),
            "calling_convention": made.decode.calling_convention_version,
            "exported": datetime.now(UTC).date().isoformat(),
            "good_for": "a jaxlib built up to 6 months later or up to 3 weeks earlier than this "
            f"one, see {GUARANTEE}",
        },
    }
