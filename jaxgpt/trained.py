"""A trained model, from its files alone: config, parameters, tokenizer."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import checkpoint, guide, pretrained
from jaxgpt.cache import CacheDtype
from jaxgpt.chat import Messages, choose, render
from jaxgpt.config import Config, from_dict
from jaxgpt.errors import InputError
from jaxgpt.model import GPT, ComputeConfig, Leaves, letters
from jaxgpt.parallel import Layout
from jaxgpt.sampling import Sampling
from jaxgpt.tokenizer import Tokenizer, TokenizerConfig, from_json
from jaxgpt.tune import LORA, Diff, adapted, compare, flat, join, merged, nested, quantized, split
from jaxgpt.writing import search, write

Dtype = Literal["float32", "bfloat16", "int8"]
PLAIN = ComputeConfig("float32", "unrolled", "none", "plain")


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
    ) -> guide.Guide | None:
        """What `choices`, `regex` or `schema` leave; InputError for two of them.

        `context` are the ids before the text, see `guide.choices`.
        """
        asked = {"choices": self.choices, "regex": self.regex, "schema": self.schema}
        given = [name for name, value in asked.items() if value not in ((), [], "", None)]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} at once; give one")
        if self.choices:
            return guide.choices(tokenizer, self.choices, ends=ends, context=context)
        if self.regex:
            return guide.regex(tokenizer, self.regex, ends=ends, context=context)
        if self.schema is not None:
            return guide.json_schema(tokenizer, dict(self.schema), ends=ends, context=context)
        return None


class Trained(NamedTuple):
    """A trained model: `config, params, tokenizer = jaxgpt.load(path)`, or call it to write."""

    config: Config
    params: Any
    tokenizer: Tokenizer

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
        held = self._replace(params=params)
        _ = held.model  # which cannot run everywhere
        return held

    def __call__(self, prompt: str = "", tokens: int = 200, **options: Any) -> str:
        """The prompt and what is written on from it: what `stream` gives, in one."""
        return prompt + "".join(self.stream(prompt, tokens, **options))

    def stream(self, prompt: str = "", tokens: int = 200, **options: Any) -> Iterator[str]:
        """What follows a prompt, up to so many tokens, in pieces as it is written.

        The options are the fields of `Writing`. As documents begin, so does a prompt; the text ends
        where the model ends it. Raises InputError for a prompt longer than the context, and for an
        option that cannot be.
        """
        ids = [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)] or [self.tokenizer.eot]
        ends = (self.tokenizer.eot, self.tokenizer.eos)
        return self._write(ids, ends, tokens, options, continues=True)

    def chat(self, messages: Messages, tokens: int = 200, **options: Any) -> str:
        """The assistant's answer to a conversation: what `stream_chat` gives, in one."""
        return "".join(self.stream_chat(messages, tokens, **options))

    def stream_chat(self, messages: Messages, tokens: int = 200, **options: Any) -> Iterator[str]:
        """The assistant's answer, of at most so many tokens, in pieces; options as for `stream`.

        `messages` are mappings of `role` and `content`, the last one the user's. Raises InputError
        for a conversation that cannot be, and a tokenizer without a chat format.
        """
        template = choose(self.tokenizer)
        ids = render(template, self.tokenizer, messages, open=True).tokens
        return self._write(ids, template.stops(self.tokenizer), tokens, options, continues=False)

    def _write(
        self,
        ids: Sequence[int],
        ends: Sequence[int],
        tokens: int,
        options: dict[str, Any],
        continues: bool,
    ) -> Iterator[str]:
        known = {f.name for f in fields(Writing)}
        if wrong := options.keys() - known:
            raise InputError(
                f"{', '.join(sorted(wrong))}: no such setting; there are {', '.join(sorted(known))}"
            )
        how = Writing(**options)
        how.check(self.tokenizer.vocab_size)
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
            tokens,
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
        if draft.config.model.T < self.config.model.T:
            raise InputError(
                f"draft={draft.config.name} has a context of {draft.config.model.T}, less than "
                f"{self.config.model.T}; give one of at least that"
            )
        return draft.model, draft.params


def smaller(config: Config, dtype: Dtype, params: Any) -> Any:
    """The parameters as `Trained.held_in` has them; a pure function, to jit or `eval_shape`."""
    if dtype == "float32":
        return params
    plain = merged(params)
    if dtype == "int8":
        return quantized(plain, letters(config.objective.build(config.model, PLAIN)), tables=True)
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
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoint says of itself (`checkpoint.read`); empty for published models."""

    def load(self, dtype: Dtype = "float32") -> Trained:
        """The model with its parameters, as `load` gives it."""
        return Trained(self.config, self.params(), self.tokenizer).held_in(dtype)

    @property
    def note(self) -> str:
        """Where from, on a terminal."""
        path, *rest = self.lineage.items()
        return f"from {path[1]} ({', '.join(f'{name} {value}' for name, value in rest)})"

    def compare(self, here: Leaves) -> Diff:
        """What becomes of each leaf, of separate layers; InputError where one does not fit."""
        plain = jax.eval_shape(merged, self.abstract)
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
        tree = adapted(merged(self.params(abstract)), diff, self.config.model.V, V)
        return jax.device_put(tree, places(tree))


def load(path: str | Path, adapter: str | Path = "", *, dtype: Dtype = "float32") -> Trained:
    """A model, ready to write, to fine-tune and to evaluate.

    `path` is a run's folder (its newest checkpoint), one checkpoint's folder, a folder of Hugging
    Face's layout, or a name there, NAME or NAME@REVISION, which is downloaded once. The running
    average of the parameters is loaded where a run kept one. `adapter` is a folder with a LoRA
    adapter of PEFT's layout, whose leaves are put beside the matrices. With another `dtype` it is a
    model to write from only, as `Trained.held_in` makes it: "bfloat16" is half the memory, "int8" a
    quarter, and both are faster where reading the matrices is what takes the time. Raises
    InputError where there is no model, or it is damaged.
    """
    return source(path, adapter).load(dtype)


def source(path: str | Path, adapter: str | Path = "") -> Source:
    """What `load` loads, with its parameters still in their files."""
    found = _source(path)
    return _with_adapter(found, Path(adapter)) if adapter else found


def find_tokenizer(path: str) -> tuple[Tokenizer, TokenizerConfig]:
    """The tokenizer of a model, and its options; the model's weights are not read.

    `path` is as for `load`. Of a name on the hub the weights are not downloaded, and a folder need
    not have any. Raises InputError where there is no tokenizer, or it is damaged.
    """
    from jaxgpt.pretrained import hub
    from jaxgpt.tokenizer.huggingface import read

    folder = Path(path).expanduser()
    name, _, revision = path.partition("@")
    if not folder.exists() and _is_name(name):
        folder = hub.fetch(name, revision or "main", weights=False).folder
    if any((folder / file).exists() for file in (*hub.TOKENIZERS, "tokenizer.model")):
        tokenizer = read(folder)
        return tokenizer, TokenizerConfig(kind=tokenizer.kind)
    found = source(folder if folder.exists() else path)
    return found.tokenizer, found.config.tokenizer


def _with_adapter(found: Source, folder: Path) -> Source:
    from jaxgpt.pretrained import peft

    factors = peft.read(folder, found.config.model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), factors)

    def params(abstract: Any = None) -> Any:
        if abstract is None:
            return join(jax.tree.map(jnp.asarray, factors), found.params())
        places, base = split(abstract, lambda path: path[-1] in LORA)
        put = jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), factors, places)
        return join(put, found.params(base))

    return replace(
        found,
        params=params,
        abstract=join(shapes, found.abstract),
        lineage={**found.lineage, "adapter": str(folder)},
        digest=lambda: found.digest() + _digest(folder),
    )


def _source(path: str | Path) -> Source:
    folder = Path(path)
    if folder.is_dir() and pretrained.is_here(folder):
        return _pretrained(folder, {"path": str(path)})
    name, _, revision = str(path).partition("@")
    if not folder.exists() and _is_name(name):
        from jaxgpt.pretrained import hub

        found = hub.fetch(name, revision or "main")
        return _pretrained(found.folder, {"path": found.name, "revision": found.revision})
    return _run(folder)


def _is_name(name: str) -> bool:
    """Whether it is OWNER/NAME, and not in a folder that is here, or a name that needs no owner."""
    from jaxgpt.pretrained import hub

    owned = "/" in name and hub.looks_like_name(name) and not Path(name).parent.is_dir()
    return owned or name in hub.SHORT


def _pretrained(folder: Path, lineage: dict[str, Any]) -> Source:
    from jaxgpt.tokenizer.huggingface import read

    found, tokenizer = pretrained.read(folder), read(folder)
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
    return Source(config, tokenizer, found.params, nested(shapes), lineage, lambda: _digest(folder))


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".msgpack") and file.is_file():
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _run(path: Path) -> Source:
    opened = checkpoint.open_checkpoint(path, ("ema", "params"))
    about = opened.metadata
    item = "ema" if "ema" in about["leaves"] else "params"
    lineage = {"path": str(path), "step": about["metrics"]["step"], "item": item}
    config = from_dict(Config, about["config"])
    abstract = checkpoint.as_abstract(about["leaves"][item])
    here = letters(config.objective.build(config.model, PLAIN))
    for name, leaf in flat(abstract).items():
        if name in here and leaf.shape != here[name][1]:
            raise InputError(
                f"{path}: {'/'.join(name)} is {list(leaf.shape)}, and {list(here[name][1])} in "
                "this version of jaxgpt; use the one that wrote it, or train again"
            )
    return Source(
        config,
        from_json(about["tokenizer"]),
        partial(opened.load, item),
        abstract,
        lineage,
        opened.digest,
        about,
    )


def versions() -> dict[str, str]:
    """The versions that make a run what it is."""
    return {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}
