"""Loads a trained model: config, parameters and tokenizer, from a run, a folder or the hub."""

import difflib
import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import __version__, pretrained
from jaxgpt.chat import Messages, Tools, choose, render
from jaxgpt.config import Config, from_dict
from jaxgpt.errors import InputError
from jaxgpt.generation.config import TEMPERATURE, GenerationConfig
from jaxgpt.generation.stream import TextStream, stream_beam_search, stream_text
from jaxgpt.model import GPT, ComputeConfig, Leaves, Params, letters
from jaxgpt.model.params import flat, merge, nested, split
from jaxgpt.model.quantize import quantize_params
from jaxgpt.paths import expand
from jaxgpt.pretrained import foreign, generation
from jaxgpt.sharding import Layout
from jaxgpt.strict_json import JsonObject
from jaxgpt.tokenizer import Tokenizer, TokenizerConfig, from_json
from jaxgpt.training import checkpoint
from jaxgpt.training.finetune import LORA, Diff, compare, fold_lora, resize_embeddings

Dtype = Literal["float32", "bfloat16", "int8"]
PLAIN = ComputeConfig("float32", "unrolled", "none", "plain")
RUNS = Config().runs
"""The folder of runs: a path in it is never looked up on the hub."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, which can be unpacked or called to generate text.

        config, params, tokenizer = jaxgpt.load(path)
        text = jaxgpt.load(path)("Once upon a time")

    `params` are the arrays; `model` is the Flax module for them.
    """

    config: Config
    params: Params
    tokenizer: Tokenizer
    generation_config: JsonObject = field(default_factory=dict)
    """The fields of generation_config.json (end tokens and sampling settings) of the published
    model from which this model comes."""

    def __iter__(self) -> Iterator[Any]:
        """Yields config, parameters and tokenizer, for unpacking."""
        return iter((self.config, self.params, self.tokenizer))

    def __repr__(self) -> str:
        cfg, numbers = self.config.model, sum(x.size for x in jax.tree.leaves(self.params))
        layers = "layer" if cfg.L == 1 else "layers"
        return (
            f"Trained({self.config.name!r}: {numbers / 1e6:.3g}M parameters, {cfg.L} {layers} of "
            f"width {cfg.D}, context {cfg.T}, {self.tokenizer.vocab_size} tokens)"
        )

    @property
    def model(self) -> GPT:
        """The Flax module for this backend: `model.apply({"params": params}, tokens_BT)`."""
        halved = self.params["wte"].dtype == jnp.bfloat16
        asked = ComputeConfig(dtype="bfloat16" if halved else "auto")
        compute, _ = asked.resolve(self.config.model, jax.default_backend())
        # Prompts have any length, but the attention kernels for training need whole blocks.
        compute = replace(compute, attention="plain")
        return self.config.objective.build(self.config.model, compute)

    def held_in(self, dtype: Dtype) -> "Trained":
        """Converts the model to a smaller data type, for inference only; merges LoRA factors.

        Args:
            dtype: "bfloat16" for all parameters, or "int8" for weight matrices (quantized).

        Raises:
            InputError: JAX does not support bfloat16 matrix products on this CPU.
        """
        if dtype == "float32":
            return self
        params = jax.jit(partial(convert_dtype, self.config, dtype))(self.params)
        held = replace(self, params=params)
        _ = held.model  # raises InputError if the model cannot run on this backend
        return held

    @overload
    def __call__(self, prompt: str = "", tokens: int = 200, **options: Any) -> str: ...

    @overload
    def __call__(self, prompt: Sequence[str], tokens: int = 200, **options: Any) -> list[str]: ...

    def __call__(
        self, prompt: str | Sequence[str] = "", tokens: int = 200, **options: Any
    ) -> str | list[str]:
        """Generates a continuation of a prompt, or of each of several prompts.

        Args:
            prompt: A prompt, or a list of prompts. Each gets the text that it would get alone.
            tokens: The most tokens to generate.
            options: The fields of `GenerationConfig`, see `stream`.

        Returns:
            The prompt with its continuation; for several prompts, a list of texts.

        Raises:
            InputError: See `stream`.
        """
        if isinstance(prompt, str):
            return prompt + "".join(self.stream(prompt, tokens, **options))
        if not isinstance(prompt, list | tuple):
            raise InputError(f"prompt={prompt!r:.80} is invalid; use a string or a list of strings")
        written = [self.stream(each, tokens, **options) for each in prompt]  # raises errors first
        return [each + "".join(pieces) for each, pieces in zip(prompt, written, strict=True)]

    def answer(self, messages: Messages, tokens: int = 200, **options: Any) -> str:
        """Like `chat`, but marks an answer that was cut off at the limit of tokens; for display."""
        pieces = self.stream_chat(messages, tokens, **options)
        text = "".join(pieces)
        return text if pieces.finish_reason == "stop" else f"{text} ... (cut at {tokens} tokens)"

    @property
    def sampling_defaults(self) -> JsonObject:
        """The sampling settings in `generation_config`, by the names of `Sampling`'s fields."""
        return generation.sampling(self.generation_config)

    def stream(self, prompt: str = "", tokens: int = 200, **options: object) -> TextStream:
        """Streams the continuation of a prompt.

        Args:
            prompt: The prompt. As training documents do, it begins with the tokenizer's
                beginning-of-document token.
            tokens: The most tokens to generate.
            options: The fields of `GenerationConfig`. The defaults are the model's
                `generation_config`, then those of `GenerationConfig`.

        Returns:
            An iterator over new text, without the prompt, up to the model's end-of-text token.

        Raises:
            InputError: The prompt is longer than the context, or an option is invalid.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompt={prompt!r:.80} is invalid; use a string")
        ids = [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)] or [self.tokenizer.eot]
        ends = (self.tokenizer.eot, self.tokenizer.eos)
        return self._write(ids, ends, tokens, options, continues=True)

    def chat(self, messages: Messages, tokens: int = 200, **options: Any) -> str:
        """Generates the assistant's answer to a conversation, see `stream_chat`."""
        return "".join(self.stream_chat(messages, tokens, **options))

    def stream_chat(
        self, messages: Messages, tokens: int = 200, *, tools: Tools = (), **options: object
    ) -> TextStream:
        """Streams the assistant's answer to a conversation.

        Args:
            messages: Dicts with `role` and `content`; the last message is the user's or a tool's.
            tokens: The most tokens to generate.
            tools: The functions that the assistant may call, as JSON schemas, for models whose
                chat template has tools. A call is part of the answer's text.
            options: The fields of `GenerationConfig`, see `stream`.

        Returns:
            An iterator over the answer's text.

        Raises:
            InputError: The conversation or an option is invalid, or the tokenizer has no chat
                format.
        """
        for name, value in {"messages": messages, "tools": tools}.items():
            if not isinstance(value, list | tuple):
                raise InputError(f"{name}={value!r:.80} is invalid; use a list")
        template = choose(self.tokenizer)
        ids = render(template, self.tokenizer, messages, open=True, tools=tools).tokens
        return self._write(ids, template.stops(self.tokenizer), tokens, options, continues=False)

    def _write(
        self,
        ids: Sequence[int],
        ends: Sequence[int],
        tokens: int,
        options: JsonObject,
        continues: bool,
    ) -> TextStream:
        known = {f.name for f in fields(GenerationConfig)}
        if wrong := options.keys() - known:
            raise InputError(
                f"{', '.join(sorted(wrong))}: unknown option; the options are "
                f"{', '.join(sorted(known))}"
            )
        if not isinstance(tokens, Integral):
            raise InputError(f"tokens={tokens!r} is invalid; use a whole number, 1 or more")
        how = GenerationConfig(**options)
        how.check(self.tokenizer.vocab_size)
        how = how.with_defaults({"temperature": TEMPERATURE, **self.sampling_defaults})
        ends = [*ends, *generation.end_ids(self.generation_config)]
        if how.beam > 1:
            by: Callable[..., TextStream] = partial(stream_beam_search, width=how.beam)
        else:
            held = how.as_guide(self.tokenizer, ends, ids if continues else ())
            draft = None if how.draft is None else self._drafted_by(how.draft)
            by = partial(stream_text, sampling=how, guide=held, draft=draft)
        return by(
            self.model,
            self.params,
            self.tokenizer,
            ids,
            int(tokens),
            stops=(how.stop,) if isinstance(how.stop, str) else tuple(how.stop),
            stop_ids=tuple(dict.fromkeys(ends)),
            continues=continues,
            cache=how.cache,
        )

    def _drafted_by(self, draft: "Trained") -> tuple[GPT, Params]:
        """Returns the draft model; raises InputError if its tokenizer or context does not fit."""
        if draft.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise InputError(
                f"draft={draft.config.name} has another tokenizer than {self.config.name}; use a "
                "draft model with the same tokenizer, such as a distilled student"
            )
        theirs, ours = draft.config.model.decode_T, self.config.model.decode_T
        if theirs < ours:
            raise InputError(
                f"draft={draft.config.name} has a context of {theirs}; use a draft model with a "
                f"context of at least {ours}"
            )
        return draft.model, draft.params


def convert_dtype(config: Config, dtype: Dtype, params: Params) -> Params:
    """Converts parameters as `Trained.held_in` does; a pure function, for jit and `eval_shape`."""
    if dtype == "float32":
        return params
    plain = fold_lora(params)
    if dtype == "int8":
        return quantize_params(
            plain, letters(config.objective.build(config.model, PLAIN)), embeddings=True
        )
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain)


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
    better: str = ""
    """If the run has a step with a lower validation loss: which one, and how to load it."""

    def load(self, dtype: Dtype = "float32") -> Trained:
        """Loads the parameters, see the function `load`."""
        trained = Trained(self.config, self.params(), self.tokenizer, self.generation_config)
        return trained.held_in(dtype)

    @property
    def note(self) -> str:
        """A line for the terminal that tells where the model comes from."""
        path, *rest = self.lineage.items()
        which = ", ".join(f"{name} {value}" for name, value in rest)
        return f"from {path[1]} ({which})" + (f"; {self.better}" if self.better else "")

    def compare(self, here: Leaves) -> Diff:
        """Compares the model's leaves (LoRA merged) with those of another architecture.

        Args:
            here: The leaves of the other architecture, with separate layers.

        Raises:
            InputError: A leaf has another shape.
        """
        plain = jax.eval_shape(fold_lora, self.abstract)
        return compare({path: leaf.shape for path, leaf in flat(plain).items()}, here)

    def take(self, diff: Diff, V: int, layout: Layout, *under: str) -> Params:
        """Loads the parameters for another architecture, with LoRA merged.

        Args:
            diff: The result of `compare` with that architecture.
            V: The architecture's number of tokens, to which the embeddings are resized.
            layout: The layout that has the parameters' shardings.
            under: The path of these parameters in the layout's tree.
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
        tree = resize_embeddings(fold_lora(self.params(abstract)), diff, self.config.model.V, V)
        return jax.device_put(tree, places(tree))


def load(path: str | Path, adapter: str | Path = "", *, dtype: Dtype = "float32") -> Trained:
    """Loads a model for generation, fine-tuning or evaluation.

    If a run keeps a moving average of the parameters (EMA), that is loaded.

    Args:
        path: One of these: a run's folder (loads the newest checkpoint), RUN@best (the checkpoint
            with the lowest validation loss), RUN@STEP, the folder of one checkpoint, a folder in
            the layout of Hugging Face, or a name on the hub (NAME or NAME@REVISION), which is
            downloaded once.
        adapter: A folder with a LoRA adapter in PEFT's layout; its factors are added to the
            parameters. New tokens come with the adapter's tokenizer.
        dtype: Other types than "float32" are for inference only, see `Trained.held_in`: "bfloat16"
            takes half of the memory and "int8" a quarter. Both are faster if memory bandwidth is
            the limit, as it is when one text is generated.

    Raises:
        InputError: The model does not exist, is damaged, or is in another program's format.
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
    check_exists(path)
    folder = expand(path)
    if folder.is_dir() and pretrained.has_model(folder):
        return _pretrained(folder, {"path": str(path)})
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

    The hub itself is not contacted.
    """
    from jaxgpt.pretrained import hub

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
    config = Config(
        name=folder.name, model=found.cfg, tokenizer=TokenizerConfig(kind=tokenizer.kind)
    )
    shapes = {
        path: jax.ShapeDtypeStruct(shape, np.float32)
        for path, (_, shape) in letters(found.cfg.build(PLAIN)).items()
    }
    lineage = {**lineage, "dtype": found.dtype}
    return ModelSource(
        config,
        tokenizer,
        found.params,
        nested(shapes),
        lineage,
        lambda: _digest(folder),
        found.generation_config,
    )


def _digest(folder: Path) -> str:
    """The SHA-256 of a folder's config, weights and tokenizer files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors") and file.is_file():
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _run(path: Path, given: str) -> ModelSource:
    """A model in a checkpoint of a run; `given` is the path as the user wrote it."""
    opened = checkpoint.open_checkpoint(path, ("ema", "params"))
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
    for name, leaf in flat(abstract).items():
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
        better,
    )


def versions() -> dict[str, str]:
    """Returns the versions of Python, jaxgpt and its libraries, which checkpoints record."""
    libraries = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    ours = {"python": platform.python_version(), "jaxgpt": __version__}
    return ours | {name: version(name) for name in libraries}
