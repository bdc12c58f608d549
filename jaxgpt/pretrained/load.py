"""Loads a trained model: config, parameters and tokenizer, from a run, a folder or the hub."""

import difflib
import hashlib
import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import __version__, pretrained
from jaxgpt.config import Config, from_dict
from jaxgpt.errors import InputError
from jaxgpt.manifest import file_sha256
from jaxgpt.model import Leaves, Params, letters
from jaxgpt.model.params import flat, merge, nested, split
from jaxgpt.paths import expand, is_url
from jaxgpt.pretrained import foreign
from jaxgpt.pretrained.gguf_file import is_gguf
from jaxgpt.pretrained.trained import PLAIN, Dtype, Trained, check_dtype, convert_leaf
from jaxgpt.pretrained.weights import Convert, keep
from jaxgpt.sharding import Layout
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer import Tokenizer, TokenizerConfig, from_json
from jaxgpt.training import checkpoint
from jaxgpt.training.finetune import LORA, Diff, compare, fold_lora, resize_embeddings

if TYPE_CHECKING:
    from jaxgpt.pretrained.gguf_model import GGUFModel

RUNS = Config().runs
"""The folder of runs: a path in it is never looked up on the hub."""


@dataclass(frozen=True)
class ModelSource:
    """A model whose parameters are not loaded yet."""

    config: Config
    """The config of the run that trained the model; for a published model, the defaults with its
    model and tokenizer."""
    tokenizer: Tokenizer
    params: Callable[..., Params]
    """Loads the parameters: on the first device, or with the shardings of a tree of
    `ShapeDtypeStruct`s that is passed to it."""
    abstract: Params
    """The parameters' `ShapeDtypeStruct`s, without shardings."""
    lineage: JsonObject
    """The model's path and version, for the checkpoints of a run that starts from it."""
    digest: Callable[[], str]
    """Computes the SHA-256 of the model's files, to recognize the same model later."""
    generation_config: JsonObject = field(default_factory=dict)
    """See `Trained`."""
    metadata: JsonObject = field(default_factory=dict)
    """The checkpoint's metadata (`checkpoint.read_metadata`); empty for published models."""
    run_folder: Path | None = None
    """The folder of the run on this machine; None for published models."""
    better: str = ""
    """If the run has a step with a lower validation loss: which one, and how to load it."""
    convert: Callable[[Params | None, Convert], Params] | None = None
    """Like `params`, and converts each leaf before the next one is read; for published models."""

    def load(self, dtype: Dtype = "float32") -> Trained:
        """Loads the parameters, see the function `load`."""
        check_dtype(self.config, dtype)
        trained = Trained(self.config, {}, self.tokenizer, self.generation_config, self.origin)
        if self.convert and dtype in ("int8", "int4"):
            params = self.convert(None, partial(convert_leaf, self.config, dtype))
            return replace(trained, params=params)
        return replace(trained, params=self.params()).astype(dtype)

    @property
    def note(self) -> str:
        """A line for the terminal that tells where the model comes from."""
        return f"from {self.origin}" + (f"; {self.better}" if self.better else "")

    @property
    def origin(self) -> str:
        """The model's path, and which of its versions this is."""
        path, *rest = self.lineage.items()
        which = ", ".join(f"{name} {value}" for name, value in rest)
        return f"{path[1]} ({which})"

    def compare(self, here: Leaves) -> Diff:
        """Compares the model's leaves (LoRA merged) with those of another architecture.

        Args:
            here: The leaves of the other architecture, with separate layers.

        Raises:
            InputError: A leaf has another shape.
        """
        plain = jax.eval_shape(fold_lora, self.abstract)
        return compare({path: leaf.shape for path, leaf in flat(plain).items()}, here)

    def take(
        self, diff: Diff, V: int, layout: Layout, *under: str, convert: Convert = keep
    ) -> Params:
        """Loads the parameters for another architecture, with LoRA merged.

        Args:
            diff: The result of `compare` with that architecture.
            V: The architecture's number of tokens, to which the embeddings are resized.
            layout: The layout that has the parameters' shardings.
            under: The path of these parameters in the layout's tree.
            convert: Returns by path what the tree has for a float32 leaf at a path.
        """

        def places(tree: Params) -> Params:
            for name in under:
                tree = {name: tree}
            tree = layout.shardings(tree)
            for name in under:
                tree = tree[name]
            return tree

        abstract = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            self.abstract,
            places(self.abstract),
        )
        if self.convert:
            tree = self.convert(abstract, convert)
        else:
            whole = flat(fold_lora(self.params(abstract)))
            leaves: dict[tuple[str, ...], jax.Array] = {}
            while whole:
                leaves |= convert(*whole.popitem())
            tree = nested(leaves)
        tree = resize_embeddings(tree, diff, self.config.model.V, V)
        return jax.device_put(tree, places(tree))


def load(path: str | Path, adapter: str | Path = "", *, dtype: Dtype = "float32") -> Trained:
    """Loads a model for generation, fine-tuning or evaluation.

    If a run keeps a moving average of the parameters (EMA), that is loaded.

    Args:
        path: One of these: a run's folder (loads the newest checkpoint), RUN@best (the checkpoint
            with the lowest validation loss), RUN@STEP, the folder of one checkpoint, the URL of
            any of these in a bucket (gs://bucket/runs/a), which is downloaded to the cache, a
            folder in the layout of Hugging Face, a name on the hub (NAME or NAME@REVISION), which
            is downloaded once, or a GGUF file.
        adapter: A folder with a LoRA adapter in PEFT's layout; its factors are added to the
            parameters. New tokens come with the adapter's tokenizer.
        dtype: Other types than "float32" are for inference only, see `Trained.astype`: "bfloat16"
            takes half of the memory, "int8" a quarter and "int4" less. They are faster if memory
            bandwidth is the limit, as it is when one text is generated.

    Raises:
        InputError: The model does not exist, is damaged, or is in another program's format; or
            see `Trained.astype`.
    """
    return source(path, adapter).load(dtype)


def source(path: str | Path, adapter: str | Path = "") -> ModelSource:
    """Finds and validates a model as `load` does, without loading its parameters."""
    found = _source(path)
    return _with_adapter(found, expand(adapter)) if adapter else found


def find_tokenizer(path: str) -> tuple[Tokenizer, TokenizerConfig]:
    """Loads a model's tokenizer without its weights.

    Args:
        path: A model, as for `load`. The weights of a model on the hub are not downloaded, and a
            folder need not have any.

    Returns:
        The tokenizer and its config.

    Raises:
        InputError: There is no tokenizer, or it is damaged.
    """
    from jaxgpt.pretrained import hub
    from jaxgpt.tokenizer.huggingface import read_tokenizer

    if is_url(path):
        found = source(path)
        return found.tokenizer, found.config.tokenizer
    folder = Path(path).expanduser()
    name, _, revision = path.partition("@")
    if not folder.exists() and _is_name(name):
        folder = hub.fetch(name, revision or "main", weights=False).folder
    if any((folder / file).exists() for file in (*hub.TOKENIZERS, "tokenizer.model")):
        tokenizer = read_tokenizer(folder)
        return tokenizer, TokenizerConfig(kind=tokenizer.kind)
    found = source(folder if folder.exists() else path)
    return found.tokenizer, found.config.tokenizer


def _with_adapter(found: ModelSource, folder: Path) -> ModelSource:
    """Adds a PEFT adapter's factors, embedding rows and tokenizer to a model."""
    from jaxgpt.pretrained import peft

    cfg = found.config.model
    factors, rows = peft.read_adapter(folder, cfg), peft.read_rows(folder, cfg)
    V = max([cfg.V, *(int(each.ids.max()) + 1 for each in rows.values())])
    tokenizer = _adapter_tokenizer(found, folder, V)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), factors)
    model = replace(cfg, V=V)
    if V > cfg.V and (missing := {"wte", *([] if cfg.tied else ["head"])} - rows.keys()):
        raise InputError(
            f"{folder} has new tokens, but no rows of {min(missing)} for them; save the adapter "
            "again with PEFT"
        )
    tables = {
        name: jax.ShapeDtypeStruct((model.sizes["V"], cfg.D), np.float32)
        for name in ("wte", "head")
        if name in found.abstract
    }

    def params(abstract: Params | None = None) -> Params:
        if abstract is None:
            tree = merge(jax.tree.map(jnp.asarray, factors), found.params())
        else:
            places, base = split(abstract, lambda path: path[-1] in LORA)
            put = jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), factors, places)
            for name in tables:
                there, place = found.abstract[name], base[name].sharding
                table = jax.ShapeDtypeStruct(there.shape, there.dtype, sharding=place)
                base = {**base, name: table}
            tree = merge(put, found.params(base))
        for name, wanted in tables.items():
            grown = wanted.shape[0] - tree[name].shape[0]
            leaf = jnp.pad(tree[name], ((0, grown), (0, 0)))
            if name in rows:
                leaf = leaf.at[rows[name].ids].set(rows[name].values)
            place = tree[name].sharding if abstract is None else abstract[name].sharding
            tree = {**tree, name: jax.device_put(leaf, place)}
        return tree

    return replace(
        found,
        config=replace(found.config, model=model),
        tokenizer=tokenizer,
        params=params,
        convert=None,
        abstract=merge({**shapes, **tables}, found.abstract),
        lineage={**found.lineage, "adapter": str(folder)},
        digest=lambda: found.digest() + _digest(folder),
    )


def _adapter_tokenizer(found: ModelSource, folder: Path, V: int) -> Tokenizer:
    """The tokenizer in an adapter's folder, or the model's if the folder has none."""
    from jaxgpt.tokenizer.huggingface import read_tokenizer

    old = found.tokenizer
    if not (folder / "tokenizer.json").exists():
        if V > found.config.model.V:
            raise InputError(
                f"{folder} has rows for new tokens, and no tokenizer.json that defines them; save "
                "the adapter's tokenizer there: tokenizer.save_pretrained(...)"
            )
        return old
    new = read_tokenizer(folder)
    alike = list(new.pieces[: old.vocab_size]) == list(old.pieces)
    if not alike or new.vocab_size > V:
        raise InputError(
            f"{folder} has a tokenizer of {new.vocab_size} tokens, which is not the model's "
            f"tokenizer extended to at most {V} tokens; use an adapter of this model"
        )
    return new


def _source(path: str | Path) -> ModelSource:
    """Finds a model without an adapter."""
    if is_url(path):
        folder, item = checkpoint.fetch_model(str(path))
        return _run(folder, str(path), (item,))
    check_exists(path)
    folder = expand(path)
    if folder.is_dir() and pretrained.has_model(folder):
        return _pretrained(folder, {"path": str(path)})
    if folder.is_file() and is_gguf(folder):
        return _gguf(folder, {"path": str(path)})
    run, at, step = str(path).rpartition("@")
    if at and not folder.exists() and expand(run).is_dir():
        return _run(checkpoint.find_checkpoint(expand(run), step), str(path))
    name, _, revision = str(path).partition("@")
    if not folder.exists() and _is_name(name):
        from jaxgpt.pretrained import hub

        try:
            found = hub.fetch(name, revision or "main")
        except InputError as error:
            runs = [str(path.parent) for path in Path().glob("*/*/checkpoints")]
            if near := difflib.get_close_matches(name, runs, 1, 0.7):
                raise InputError(f"{error}; did you mean the run {near[0]}?") from None
            raise
        return _pretrained(found.folder, {"path": found.name, "revision": found.revision})
    if not (folder / "checkpoints").is_dir() and not (folder / "leaves.json").exists():
        foreign.raise_if_foreign(folder)
    return _run(folder, str(path))


def check_exists(path: str | Path) -> None:
    """Raises InputError if a path neither exists nor can be a name on the hub.

    The hub itself is not contacted, and a bucket is.
    """
    from jaxgpt.pretrained import hub

    if is_url(path):
        checkpoint.find_remote(str(path))
        return
    run, at, _ = str(path).rpartition("@")
    name = str(path).partition("@")[0]
    if expand(path).exists() or (at and expand(run).exists()) or _is_name(name):
        return
    if near := difflib.get_close_matches(name, hub.SHORT, 1, 0.7):
        raise InputError(f"{path} is neither a local folder nor a model; did you mean {near[0]}?")
    checkpoint.open_checkpoint(expand(run if at else path))


def _is_name(name: str) -> bool:
    """Whether `name` is a short name of a model, or OWNER/NAME and not a path of this machine.

    A path in the folder of runs, or in another folder that exists, is not a name.
    """
    from jaxgpt.pretrained import hub

    parent = Path(name).parent
    owned = "/" in name and hub.looks_like_name(name) and parent.name != RUNS
    return (owned and not parent.is_dir()) or name in hub.SHORT


def _pretrained(folder: Path, lineage: JsonObject) -> ModelSource:
    """A model in a folder in the layout of Hugging Face."""
    from jaxgpt.tokenizer.huggingface import read_tokenizer

    found, tokenizer = pretrained.read_model(folder), read_tokenizer(folder)
    if tokenizer.vocab_size > found.cfg.V:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, and the model only "
            f"{found.cfg.V}, so they belong to different models; download both again"
        )
    digest = partial(_digest, folder)
    return _published(found, tokenizer, folder.name, lineage, digest)


def _gguf(file: Path, lineage: JsonObject) -> ModelSource:
    """A model in a GGUF file."""
    from jaxgpt.pretrained.gguf_model import read_model

    found = read_model(file)
    return _published(found, found.tokenizer, file.stem, lineage, partial(file_sha256, file))


def _published(
    found: "pretrained.Pretrained | GGUFModel",
    tokenizer: Tokenizer,
    name: str,
    lineage: JsonObject,
    digest: Callable[[], str],
) -> ModelSource:
    """A model that is not a run; it gets the default config."""
    config = Config(name=name, model=found.cfg, tokenizer=TokenizerConfig(kind=tokenizer.kind))
    shapes = {
        path: jax.ShapeDtypeStruct(shape, np.float32)
        for path, (_, shape) in letters(found.cfg.build(PLAIN)).items()
    }
    return ModelSource(
        config,
        tokenizer,
        found.params,
        nested(shapes),
        {**lineage, "dtype": found.dtype},
        digest,
        found.generation_config,
        convert=found.params,
    )


def _digest(folder: Path) -> str:
    """The SHA-256 of a folder's config, weights and tokenizer files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors") and file.is_file():
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _run(path: Path, given: str, items: Collection[str] = checkpoint.MODEL) -> ModelSource:
    """A model in a checkpoint of a run; `given` is the path as the user wrote it."""
    opened = checkpoint.open_checkpoint(path, items)
    about = opened.metadata
    if "leaves" not in about:
        raise InputError(
            f"{opened.folder} is not a checkpoint: it has a manifest but no leaves.json; use "
            "another checkpoint"
        )
    item = "ema" if "ema" in about["leaves"] else "params"
    lineage = {"path": given, "step": about["metrics"]["step"], "item": item}
    config = from_dict(Config, about["config"])
    abstract = checkpoint.as_abstract(about["leaves"][item])
    here = letters(config.objective.build(config.model, PLAIN))
    for name, leaf in flat(jax.eval_shape(fold_lora, abstract)).items():
        if name in here and leaf.shape != here[name][1]:
            raise InputError(
                f"{path}: {'/'.join(name)} has shape {list(leaf.shape)}, and this version of "
                f"jaxgpt needs {list(here[name][1])}; use the version that wrote the checkpoint, "
                "or train again"
            )
    step, best = lineage["step"], checkpoint.best_step(opened.folder.parent)
    better = ""
    if opened.folder != expand(path) and best not in (None, step):
        loss = checkpoint.read_measured(opened.folder.parent / str(best))["val_loss"]
        here = about["metrics"].get("val_loss")
        better = (
            f"its step {best} has a lower validation loss, {loss:.4f}"
            f"{'' if here is None else f' instead of {here:.4f}'}; use {given}@best to load it"
        )
    return ModelSource(
        config,
        from_json(about["tokenizer"]),
        partial(opened.load, item),
        abstract,
        lineage,
        opened.digest,
        about.get("generation_config", {}),
        about,
        opened.folder.parent.parent if opened.folder.parent.name == "checkpoints" else None,
        better,
    )


def versions() -> dict[str, str]:
    """Returns the versions of Python, jaxgpt and its libraries, which checkpoints record."""
    libraries = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    ours = {"python": platform.python_version(), "jaxgpt": __version__}
    return ours | {name: version(name) for name in libraries}
