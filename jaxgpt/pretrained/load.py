"""A trained model, from its files alone: config, parameters, tokenizer."""

import difflib
import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import __version__, pretrained
from jaxgpt.chat import Messages, Tools, choose, render
from jaxgpt.config import Config, from_dict
from jaxgpt.errors import InputError
from jaxgpt.generation import constrained
from jaxgpt.generation.sampling import Sampling
from jaxgpt.generation.stream import Pieces, search, write
from jaxgpt.model import GPT, ComputeConfig, Leaves, letters
from jaxgpt.model.cache import CacheDtype
from jaxgpt.model.params import flat, merge, nested, split
from jaxgpt.model.quantize import quantize_params
from jaxgpt.paths import expand
from jaxgpt.pretrained import foreign, generation
from jaxgpt.sharding import Layout
from jaxgpt.tokenizer import Tokenizer, TokenizerConfig, from_json
from jaxgpt.training import checkpoint
from jaxgpt.training.finetune import LORA, Diff, compare, fold_lora, resize_embeddings

Dtype = Literal["float32", "bfloat16", "int8"]
PLAIN = ComputeConfig("float32", "unrolled", "none", "plain")
RUNS = Config().runs
"""The folder of runs in which a path is never taken for a name on the hub."""


@dataclass(frozen=True)
class Writing(Sampling):
    """How a text is written: how its tokens are drawn, what it may be, and by which means."""

    temperature: float = 0.8
    """Logits are divided by it; 0: the likeliest token."""
    stop: str | Sequence[str] = ()
    """The text ends before one of these."""
    choices: Sequence[str] = ()
    """It is one of these."""
    regex: str = ""
    """It matches this expression as a whole."""
    schema: Mapping[str, Any] | None = None
    """It is JSON that fits this schema."""
    draft: "Trained | None" = None
    """A smaller model with the same tokenizer, which guesses ahead; the text stays the same."""
    beam: int = 1
    """Beginnings that a beam search keeps, to write the likeliest text it finds; 1: it is drawn."""
    cache: CacheDtype = "same"
    """Of keys and values; int8: in a byte each."""

    def check(self, vocabulary: int) -> None:
        """Raises InputError where a field cannot be, for a vocabulary of so many ids."""
        super().check(vocabulary)
        if not isinstance(self.beam, Integral) or self.beam < 1:
            raise InputError(f"beam={self.beam}; set it to a whole number, 1 or more")
        if self.beam == 1:
            return
        plain, fine = vars(Writing()), {"beam", "stop", "seed", "cache"}
        asked = [
            name
            for name, value in vars(self).items()
            if name not in fine and value not in (plain[name], [], 0)
        ]
        if asked:
            raise InputError(
                f"beam={self.beam} takes the likeliest text as it is; leave out {', '.join(asked)}"
            )

    def as_guide(
        self, tokenizer: Tokenizer, ends: Sequence[int], context: Sequence[int] | None = None
    ) -> constrained.Guide | None:
        """What `choices`, `regex` or `schema` leave; InputError for two of them.

        `context` are the ids before the text, see `constrained.choices`.
        """
        asked = {"choices": self.choices, "regex": self.regex, "schema": self.schema}
        given = [name for name, value in asked.items() if value not in ((), [], "", None)]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} at once; give one")
        if self.choices:
            return constrained.choices(tokenizer, self.choices, ends=ends, context=context)
        if self.regex:
            return constrained.regex(tokenizer, self.regex, ends=ends, context=context)
        if self.schema is not None:
            return constrained.json_schema(tokenizer, dict(self.schema), ends=ends, context=context)
        return None


def check_type(name: str, value: Any) -> None:
    """Raises InputError if an option of `Writing` has a value of another type than its own."""
    texts = "a text or a list of texts", lambda x: _is_text(x) or all(map(_is_text, _items(x)))
    number = "a number", lambda x: isinstance(x, Real) and not isinstance(x, bool)
    whole = "a whole number", lambda x: isinstance(x, Integral) and not isinstance(x, bool)
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "stop": texts,
        "choices": ("a list of texts", lambda x: not _is_text(x) and texts[1](x)),
        "regex": ("a text", _is_text),
        "schema": ("a JSON schema as a dict", lambda x: x is None or isinstance(x, Mapping)),
        "draft": ("a model that jaxgpt.load returns", lambda x: isinstance(x, Trained | None)),
        "cache": (f"one of {', '.join(get_args(CacheDtype))}", get_args(CacheDtype).__contains__),
        "logit_bias": (
            "a dict of token ids and numbers",
            lambda x: isinstance(x, Mapping) and all(map(number[1], x.values())),
        ),
    } | dict.fromkeys(("top_k", "seed", "beam"), whole)
    wanted, is_right = kinds.get(name, number)
    if not is_right(value):
        raise InputError(f"{name}={value!r:.80} is not right; give {wanted}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _items(value: Any) -> Sequence[Any]:
    """The items of a list or tuple; for anything else, something that is no text."""
    return value if isinstance(value, list | tuple) else [None]


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model: `config, params, tokenizer = jaxgpt.load(path)`, or call it to write."""

    config: Config
    params: Any
    tokenizer: Tokenizer
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    """The end tokens and sampling settings of the published model that it comes from, as in its
    generation_config.json."""

    def __iter__(self) -> Iterator[Any]:
        """Config, parameters and tokenizer, to unpack."""
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
        """The model, as it runs best here: `model.apply({"params": params}, tokens_BT)`."""
        halved = self.params["wte"].dtype == jnp.bfloat16
        asked = ComputeConfig(dtype="bfloat16" if halved else "auto")
        compute, _ = asked.resolve(self.config.model, jax.default_backend())
        # One row of any length: the kernels for training want whole blocks.
        compute = replace(compute, attention="plain")
        return self.config.objective.build(self.config.model, compute)

    def held_in(self, dtype: Dtype) -> "Trained":
        """The model to write from only, with smaller matrices, LoRA's factors added on.

        bfloat16 holds every parameter in two bytes; int8 a matrix in one for each number. Raises
        InputError for bfloat16 on a CPU where jax lacks its products.
        """
        if dtype == "float32":
            return self
        params = jax.jit(partial(smaller, self.config, dtype))(self.params)
        held = replace(self, params=params)
        _ = held.model  # which cannot run everywhere
        return held

    @overload
    def __call__(self, prompt: str = "", tokens: int = 200, **options: Any) -> str: ...

    @overload
    def __call__(self, prompt: Sequence[str], tokens: int = 200, **options: Any) -> list[str]: ...

    def __call__(
        self, prompt: str | Sequence[str] = "", tokens: int = 200, **options: Any
    ) -> str | list[str]:
        """The prompt and its continuation in one text; of several prompts, a list of texts.

        Each text is the one that its prompt gets alone. See `stream` for the options and errors.
        """
        if isinstance(prompt, str):
            return prompt + "".join(self.stream(prompt, tokens, **options))
        if not isinstance(prompt, list | tuple):
            raise InputError(f"prompt={prompt!r:.80}; give a text, or a list of texts")
        written = [self.stream(each, tokens, **options) for each in prompt]  # raises errors first
        return [each + "".join(pieces) for each, pieces in zip(prompt, written, strict=True)]

    def answer(self, messages: Messages, tokens: int = 200, **options: Any) -> str:
        """As `chat`, with a mark after an answer that ends at the limit of tokens: to show."""
        pieces = self.stream_chat(messages, tokens, **options)
        text = "".join(pieces)
        return text if pieces.finish_reason == "stop" else f"{text} ... (cut at {tokens} tokens)"

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The sampling settings of the model's `generation_config`, by the names of `Sampling`."""
        return generation.sampling(self.generation_config)

    def stream(self, prompt: str = "", tokens: int = 200, **options: Any) -> Pieces:
        """What follows a prompt, up to so many tokens, in pieces as it is written.

        The options are the fields of `Writing`; those that are not given are what the model's
        `generation_config` says, else the defaults. As documents begin, so does a prompt; the text
        ends where the model ends it. Raises InputError for a prompt longer than the context, and
        for an invalid option.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompt={prompt!r:.80}; give a text")
        ids = [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)] or [self.tokenizer.eot]
        ends = (self.tokenizer.eot, self.tokenizer.eos)
        return self._write(ids, ends, tokens, options, continues=True)

    def chat(self, messages: Messages, tokens: int = 200, **options: Any) -> str:
        """The assistant's answer to a conversation: what `stream_chat` gives, in one."""
        return "".join(self.stream_chat(messages, tokens, **options))

    def stream_chat(
        self, messages: Messages, tokens: int = 200, *, tools: Tools = (), **options: Any
    ) -> Pieces:
        """The assistant's answer, of at most so many tokens, in pieces; options as for `stream`.

        Args:
            messages: Mappings of `role` and `content`, the last one the user's or a tool's.
            tokens: The most tokens of the answer.
            tools: The functions that the assistant may call, as JSON schemas, for models whose
                chat template lists them; a call is part of the answer's text.
            options: As for `stream`.

        Raises:
            InputError: The conversation or an option is invalid, or the tokenizer has no chat
                format.
        """
        for name, value in {"messages": messages, "tools": tools}.items():
            if not isinstance(value, list | tuple):
                raise InputError(f"{name}={value!r:.80} is not right; give a list")
        template = choose(self.tokenizer)
        ids = render(template, self.tokenizer, messages, open=True, tools=tools).tokens
        return self._write(ids, template.stops(self.tokenizer), tokens, options, continues=False)

    def _write(
        self,
        ids: Sequence[int],
        ends: Sequence[int],
        tokens: int,
        options: dict[str, Any],
        continues: bool,
    ) -> Pieces:
        known = {f.name for f in fields(Writing)}
        if wrong := options.keys() - known:
            raise InputError(
                f"{', '.join(sorted(wrong))}: no such setting; there are {', '.join(sorted(known))}"
            )
        for name, value in options.items():
            check_type(name, value)
        if not isinstance(tokens, Integral):
            raise InputError(f"tokens={tokens!r}; set it to a whole number, 1 or more")
        settings = self.sampling_defaults if options.get("beam", 1) == 1 else {}
        how = Writing(**{**settings, **options})
        how.check(self.tokenizer.vocab_size)
        ends = [*ends, *generation.end_ids(self.generation_config)]
        if how.beam > 1:
            by: Any = partial(search, width=how.beam)
        else:
            held = how.as_guide(self.tokenizer, ends, ids if continues else ())
            draft = None if how.draft is None else self._drafted_by(how.draft)
            by = partial(write, sampling=how, guide=held, draft=draft)
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

    def _drafted_by(self, draft: "Trained") -> tuple[GPT, Any]:
        """The model that guesses; InputError where it has other tokens, or a shorter context."""
        if draft.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise InputError(
                f"draft={draft.config.name} has another tokenizer than {self.config.name}, and its "
                "tokens mean nothing here; give a model with the same one, such as a student"
            )
        theirs, ours = draft.config.model.decode_T, self.config.model.decode_T
        if theirs < ours:
            raise InputError(
                f"draft={draft.config.name} has a context of {theirs}, less than {ours}; use one "
                "of at least that"
            )
        return draft.model, draft.params


def smaller(config: Config, dtype: Dtype, params: Any) -> Any:
    """The parameters as `Trained.held_in` has them; a pure function, to jit or `eval_shape`."""
    if dtype == "float32":
        return params
    plain = fold_lora(params)
    if dtype == "int8":
        return quantize_params(
            plain, letters(config.objective.build(config.model, PLAIN)), embeddings=True
        )
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: all that is known of it before its parameters are read."""

    config: Config
    """Its model and tokenizer; the rest is its own run's, or the default."""
    tokenizer: Tokenizer
    params: Callable[..., Any]
    """The parameters, as in `ShapeDtypeStruct`s given to it, or on the first device."""
    abstract: Any
    """Their `ShapeDtypeStruct`s, without places."""
    lineage: dict[str, Any]
    """What a checkpoint says of where its run started."""
    digest: Callable[[], str]
    """SHA-256 of what its files hold, to know it again."""
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    """See `Trained`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoint says of itself (`checkpoint.read`); empty for published models."""
    better: str = ""
    """For a run whose newest step is not its best: which one is, and how to take it."""

    def load(self, dtype: Dtype = "float32") -> Trained:
        """The model with its parameters, as `load` gives it."""
        trained = Trained(self.config, self.params(), self.tokenizer, self.generation_config)
        return trained.held_in(dtype)

    @property
    def note(self) -> str:
        """Where from, on a terminal."""
        path, *rest = self.lineage.items()
        which = ", ".join(f"{name} {value}" for name, value in rest)
        return f"from {path[1]} ({which})" + (f"; {self.better}" if self.better else "")

    def compare(self, here: Leaves) -> Diff:
        """What becomes of each leaf, of separate layers; InputError where one does not fit."""
        plain = jax.eval_shape(fold_lora, self.abstract)
        return compare({path: leaf.shape for path, leaf in flat(plain).items()}, here)

    def take(self, diff: Diff, V: int, layout: Layout, *under: str) -> Any:
        """The parameters for a tree that it was compared with: plain, in place, of V tokens.

        `under` is where the layout's letters have them.
        """

        def places(tree: Any) -> Any:
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
    """A model, ready to write, to fine-tune and to evaluate.

    `path` is a run's folder (its newest checkpoint), RUN@best (the one with the lowest validation
    loss) or RUN@STEP, one checkpoint's folder, a folder of Hugging Face's layout, or a name there,
    NAME or NAME@REVISION, which is downloaded once. The running average of the parameters is loaded
    where a run kept one. `adapter` is a folder with a LoRA adapter of PEFT's layout, whose leaves
    are put beside the matrices; rows of new tokens come with its tokenizer. With another `dtype` it
    is a model to write from only, as `Trained.held_in` makes it: "bfloat16" is half the memory,
    "int8" a quarter, and both are faster where reading the matrices is what takes the time. Raises
    InputError where there is no model, it is damaged, or it is in another program's format.
    """
    return source(path, adapter).load(dtype)


def source(path: str | Path, adapter: str | Path = "") -> Source:
    """What `load` loads, with its parameters still in their files."""
    found = _source(path)
    return _with_adapter(found, expand(adapter)) if adapter else found


def find_tokenizer(path: str) -> tuple[Tokenizer, TokenizerConfig]:
    """The tokenizer of a model, and its options; the model's weights are not read.

    `path` is as for `load`. Of a name on the hub the weights are not downloaded, and a folder need
    not have any. Raises InputError where there is no tokenizer, or it is damaged.
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


def _with_adapter(found: Source, folder: Path) -> Source:
    from jaxgpt.pretrained import peft

    cfg = found.config.model
    factors, rows = peft.read(folder, cfg), peft.read_rows(folder, cfg)
    V = max([cfg.V, *(int(each.ids.max()) + 1 for each in rows.values())])
    tokenizer = _adapter_tokenizer(found, folder, V)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), factors)
    model = replace(cfg, V=V)
    if V > cfg.V and (missing := {"wte", *([] if cfg.tied else ["head"])} - rows.keys()):
        raise InputError(f"{folder} has new tokens, and no rows of {min(missing)} for them")
    tables = {
        name: jax.ShapeDtypeStruct((model.sizes["V"], cfg.D), np.float32)
        for name in ("wte", "head")
        if name in found.abstract
    }

    def params(abstract: Any = None) -> Any:
        if abstract is None:
            tree = merge(jax.tree.map(jnp.asarray, factors), found.params())
        else:
            places, base = split(abstract, lambda path: path[-1] in LORA)
            put = jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), factors, places)
            for name in tables:
                there, place = found.abstract[name], base[name].sharding
                base[name] = jax.ShapeDtypeStruct(there.shape, there.dtype, sharding=place)
            tree = merge(put, found.params(base))
        for name, wanted in tables.items():
            grown = wanted.shape[0] - tree[name].shape[0]
            leaf = jnp.pad(tree[name], ((0, grown), (0, 0)))
            if name in rows:
                leaf = leaf.at[rows[name].ids].set(rows[name].values)
            place = tree[name].sharding if abstract is None else abstract[name].sharding
            tree[name] = jax.device_put(leaf, place)
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


def _adapter_tokenizer(found: Source, folder: Path, V: int) -> Tokenizer:
    """The tokenizer of an adapter's folder, or of the model if that has none."""
    from jaxgpt.tokenizer.huggingface import read_tokenizer

    old = found.tokenizer
    if not (folder / "tokenizer.json").exists():
        if V > found.config.model.V:
            raise InputError(
                f"{folder} has rows for new tokens, and no tokenizer.json that says which; save "
                "the tokenizer that it was trained with there: tokenizer.save_pretrained(...)"
            )
        return old
    new = read_tokenizer(folder)
    alike = list(new.pieces[: old.vocab_size]) == list(old.pieces)
    if not alike or new.vocab_size > V:
        raise InputError(
            f"{folder} has a tokenizer of {new.vocab_size} tokens that is not the model's, with "
            f"more tokens up to {V} in all; use an adapter of this model"
        )
    return new


def _source(path: str | Path) -> Source:
    check_exists(path)
    folder = expand(path)
    if folder.is_dir() and pretrained.is_here(folder):
        return _pretrained(folder, {"path": str(path)})
    run, at, step = str(path).rpartition("@")
    if at and not folder.exists() and expand(run).is_dir():
        return _run(checkpoint.find_step(expand(run), step), str(path))
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
        foreign.refuse(folder)
    return _run(folder, str(path))


def check_exists(path: str | Path) -> None:
    """Raises InputError if a path is neither here nor a model's name; the hub is not asked."""
    from jaxgpt.pretrained import hub

    run, at, _ = str(path).rpartition("@")
    name = str(path).partition("@")[0]
    if expand(path).exists() or (at and expand(run).exists()) or _is_name(name):
        return
    if near := difflib.get_close_matches(name, hub.SHORT, 1, 0.7):
        raise InputError(f"{path} is neither a folder here nor a model; did you mean {near[0]}?")
    checkpoint.open_checkpoint(expand(run if at else path))


def _is_name(name: str) -> bool:
    """Whether it is OWNER/NAME, and no path in a folder of runs or one that is here, or short."""
    from jaxgpt.pretrained import hub

    parent = Path(name).parent
    owned = "/" in name and hub.looks_like_name(name) and parent.name != RUNS
    return (owned and not parent.is_dir()) or name in hub.SHORT


def _pretrained(folder: Path, lineage: dict[str, Any]) -> Source:
    from jaxgpt.tokenizer.huggingface import read_tokenizer

    found, tokenizer = pretrained.read(folder), read_tokenizer(folder)
    if tokenizer.vocab_size > found.cfg.V:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, and the model only "
            f"{found.cfg.V}; they are not of one model: get both again"
        )
    config = Config(
        name=folder.name, model=found.cfg, tokenizer=TokenizerConfig(kind=tokenizer.kind)
    )
    shapes = {
        path: jax.ShapeDtypeStruct(shape, np.float32)
        for path, (_, shape) in letters(found.cfg.build(PLAIN)).items()
    }
    lineage = {**lineage, "dtype": found.dtype}
    return Source(
        config,
        tokenizer,
        found.params,
        nested(shapes),
        lineage,
        lambda: _digest(folder),
        found.generation_config,
    )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".msgpack") and file.is_file():
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _run(path: Path, given: str) -> Source:
    opened = checkpoint.open_checkpoint(path, ("ema", "params"))
    about = opened.metadata
    if "leaves" not in about:
        raise InputError(f"{opened.folder} is no checkpoint: it has a manifest, and no leaves.json")
    item = "ema" if "ema" in about["leaves"] else "params"
    lineage = {"path": given, "step": about["metrics"]["step"], "item": item}
    config = from_dict(Config, about["config"])
    abstract = checkpoint.as_abstract(about["leaves"][item])
    here = letters(config.objective.build(config.model, PLAIN))
    for name, leaf in flat(abstract).items():
        if name in here and leaf.shape != here[name][1]:
            raise InputError(
                f"{path}: {'/'.join(name)} is {list(leaf.shape)}, and {list(here[name][1])} in "
                "this version of jaxgpt; use the one that wrote it, or train again"
            )
    step, best = lineage["step"], checkpoint.best_step(opened.folder.parent)
    better = ""
    if opened.folder != expand(path) and best not in (None, step):
        loss = checkpoint.read_measured(opened.folder.parent / str(best))["val_loss"]
        here = about["metrics"].get("val_loss")
        better = (
            f"its step {best} has a lower validation loss, {loss:.4f}"
            f"{'' if here is None else f' instead of {here:.4f}'}: {given}@best takes that"
        )
    return Source(
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
    """The versions of Python, jaxgpt and its libraries, which a checkpoint records."""
    libraries = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    ours = {"python": platform.python_version(), "jaxgpt": __version__}
    return ours | {name: version(name) for name in libraries}
