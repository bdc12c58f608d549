"""What a run works on: the checkpoint it resumes from, its tokenizer, its data, its teacher."""

import json
import platform
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax

from jaxgpt import config, data, processes, tokenizer
from jaxgpt.errors import InputError
from jaxgpt.paths import cache_folder, place_of
from jaxgpt.pretrained.load import ModelSource, check_exists, find_tokenizer, source
from jaxgpt.training import checkpoint
from jaxgpt.training.mirror import has_begun


class Resumed(NamedTuple):
    """The checkpoint that a run resumes from, if there is one."""

    step: int | None
    metadata: checkpoint.Metadata
    """What the checkpoint says of itself; empty for a new run."""
    went_back: bool
    """Whether `resume` asked for this step, and later ones were abandoned."""


def check_models(cfg: config.Config, coming: Collection[str] = ()) -> None:
    """Raises InputError if a model that a new run needs does not exist; nothing is read.

    Args:
        cfg: The run's config.
        coming: The places of runs that will be trained before.
    """
    wanted = sorted({cfg.start, cfg.objective.teacher_path} - {""})
    missing = [path for path in wanted if place_of(path) not in coming]
    if missing and not has_begun(cfg):
        for path in missing:
            check_exists(path)


def find_start(checkpoints: checkpoint.Checkpoints, resume: int) -> Resumed:
    """The checkpoint to resume from: the newest one, or the one of step `resume` if that is set.

    A run that went back to step `resume` and has saved a later step since resumes from the later
    one, so that the same command can be repeated.
    """

    def read(step: int | None) -> checkpoint.Metadata:
        return {} if step is None else checkpoint.read_metadata(checkpoints.folder / str(step))

    start = checkpoints.latest()
    saved = read(start)
    if not resume:
        return Resumed(start, saved, False)
    went_back = saved.get("lineage", {}).get("went_back_to", [])
    if start != resume and went_back[-1:] == [resume]:
        print(f"the run went back to step {resume} before, and now resumes from step {start}")
        return Resumed(start, saved, False)
    checkpoints.go_back(resume)
    return Resumed(resume, read(resume), True)


def prepare_data(
    cfg: config.Config, saved: checkpoint.Metadata
) -> tuple[config.Config, tokenizer.Tokenizer, data.Dataset, ModelSource | None]:
    """Reads the text or the records, finds the tokenizer, and makes the batches.

    Args:
        cfg: The config of the run.
        saved: The metadata of the checkpoint that the run resumes from; empty for a new run.

    Returns:
        The config with what the data and the start decide (vocabulary, labels, architecture), the
        tokenizer, the dataset, and the model that a new run starts from.

    Raises:
        InputError: The data, the start or the tokenizer is invalid, or differs from the saved one.
    """
    # A missing model is reported before anything about the data.
    origin = source(cfg.start, cfg.adapter) if cfg.start and not saved else None
    # The files that a run began with, although the branch of a data set may have moved since.
    pinned, revisions = data.pin(cfg.data, saved.get("data", {}).get("revisions", {}))
    splits = {}
    if isinstance(pinned, data.RecordsConfig):
        splits = data.read_splits(pinned, cfg.objective.reader)
        cfg = replace(cfg, objective=cfg.objective.fit(splits["train"]))
    cfg, text = find_text_tokenizer(cfg, saved, origin, splits, pinned)
    if cfg.train.sample_tokens:
        text.encode(cfg.train.prompt)  # raises now, not after training
    text = cfg.objective.extend(text)
    V = max(text.vocab_size, cfg.model.V if cfg.start else 0)
    cfg = replace(cfg, model=replace(cfg.model, V=V))
    if saved:
        config.refuse_changed(saved["config"], cfg)
    if isinstance(pinned, data.RecordsConfig):
        dataset = data.examples(
            pinned,
            splits,
            partial(cfg.objective.encode, tokenizer=text),
            cfg.objective.cut,
            text.fingerprint,
            packs=cfg.objective.packs,
            **batch_options(cfg),
        )
    else:
        named = replace(pinned, paths=cfg.data.paths, val_paths=cfg.data.val_paths)
        if pinned.stream:
            state = saved.get("data_state", {})
            dataset = data.stream(pinned, text, state=state, named=named, **batch_options(cfg))
        else:
            dataset = data.streams(data.prepare(pinned, text), named, **batch_options(cfg))
    if revisions:
        fingerprint = {**dataset.fingerprint, "revisions": revisions}
        dataset = replace(dataset, fingerprint=fingerprint)
    if saved:
        then, now = saved["versions"].get("python", "another version"), platform.python_version()
        hint = ""
        if then != now and any(path.partition(":")[0] == "python" for path in cfg.data.paths):
            hint = f" (the library of Python {then}, which resumes the run; this is Python {now})"
        data.refuse_changed(saved["data"], dataset.fingerprint, hint)
    return cfg, text, dataset, origin


def find_text_tokenizer(
    cfg: config.Config,
    saved: checkpoint.Metadata,
    origin: ModelSource | None,
    splits: dict[str, list[data.Record]],
    pinned: data.DataConfig | data.RecordsConfig,
) -> tuple[config.Config, tokenizer.Tokenizer]:
    """The tokenizer: saved, of the model that is started from, of another one, or a new one.

    A new one is trained on `pinned`, which is `cfg.data` with commits as revisions. The config gets
    the architecture and the tokenizer's options of where it is from.
    """
    if saved:
        text = tokenizer.from_json(saved["tokenizer"])
        if cfg.start or cfg.tokenizer.source:
            then = config.from_dict(config.Config, saved["config"])
            if cfg.start:
                cfg = config.adopt(cfg, then.model, then.tokenizer)
            elif cfg.tokenizer.source == then.tokenizer.source:
                cfg = replace(cfg, tokenizer=then.tokenizer)
        return cfg, text
    if origin:
        cfg = config.adopt(cfg, origin.config.model, origin.config.tokenizer)
        return cfg, origin.tokenizer
    if cfg.tokenizer.source:
        text, options = find_tokenizer(cfg.tokenizer.source)
        return replace(cfg, tokenizer=replace(options, source=cfg.tokenizer.source)), text
    if path := cfg.objective.teacher_path:
        teacher = source(path)
        return replace(cfg, tokenizer=teacher.config.tokenizer), teacher.tokenizer
    alphabet = cfg.tokenizer.kind == "characters"  # must contain the held-out text too
    if isinstance(pinned, data.RecordsConfig):
        sets = splits.values() if alphabet else [splits["train"]]
        texts = data.strings([record for records in sets for record in records])
    else:
        texts = data.texts(pinned, held_out=alphabet)
    cache = cache_folder(getattr(pinned, "cache", "")) / "tokenizers"
    built = partial(tokenizer.build, cfg.tokenizer, texts, cache)
    described = processes.from_first_process(lambda: json.dumps(built().to_json()))
    return cfg, tokenizer.from_json(json.loads(described))


def batch_options(cfg: config.Config) -> dict[str, int]:
    """The shape of batches, their order, and which rows of them this process makes."""
    return {
        "context": cfg.context,
        "batch": cfg.train.batch,
        "seed": cfg.seed,
        "limit": cfg.train.eval_batches,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }


def find_teacher(
    cfg: config.Config, text: tokenizer.Tokenizer, saved: checkpoint.Metadata
) -> ModelSource | None:
    """The teacher that the objective names, or None. Raises InputError if it does not fit."""
    path = cfg.objective.teacher_path
    if not path:
        return None
    teacher = source(path)
    if teacher.tokenizer.fingerprint != text.fingerprint or teacher.config.model.V != cfg.model.V:
        raise InputError(
            f"the teacher {path} has {teacher.config.model.V} tokens of another vocabulary than "
            f"the student, which has {cfg.model.V}; train one of them from the other's tokenizer"
        )
    then = saved.get("lineage", {}).get("teacher", {}).get("digest")
    if then and then != teacher.digest():
        raise InputError(
            f"the teacher {path} is not the one this run began with; name the checkpoint of then, "
            f"{saved['lineage']['teacher']}, or set another name"
        )
    return teacher
