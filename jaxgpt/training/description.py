"""What a run says of itself: in its checkpoints, and on a terminal before the first step."""

from jaxgpt import config, data, tokenizer
from jaxgpt.pretrained.load import ModelSource, versions
from jaxgpt.training.checkpoint import Metadata
from jaxgpt.training.finetune import Diff
from jaxgpt.training.inputs import Resumed


def describe(
    cfg: config.Config,
    text: tokenizer.Tokenizer,
    dataset: data.Dataset,
    origin: ModelSource | None,
    teacher: ModelSource | None,
    resumed: Resumed,
) -> Metadata:
    """What a checkpoint says of itself: config, tokenizer, data, versions and lineage."""
    saved, start = resumed.metadata, resumed.step
    before = saved.get("lineage", {})
    lineage = {
        "started_from": origin.lineage if origin else before.get("started_from"),
        "resumed_after": [*before.get("resumed_after", []), *([start] if start else [])],
        "went_back_to": [*before.get("went_back_to", []), *([start] if resumed.went_back else [])],
    }
    if teacher:
        lineage["teacher"] = {**teacher.lineage, "digest": teacher.digest()}
    return {
        "config": config.to_dict(cfg),
        "tokenizer": text.to_json(),
        "data": dataset.fingerprint,
        "versions": versions(),
        "generation_config": (
            origin.generation_config if origin else saved.get("generation_config", {})
        ),
        "lineage": lineage,
    }


def print_summary(
    cfg: config.Config,
    dataset: data.Dataset,
    model_note: str,
    devices_note: str,
    origin: ModelSource | None,
    diff: Diff | None,
    start: int | None,
) -> None:
    """Prints what will be trained, on what, and where."""
    print(config.summary(cfg))
    updates = cfg.train.steps * cfg.objective.updates_per_batch
    own = cfg.optim.in_steps(cfg.tokens_per_update)
    if (warmup := own.warmup_within(updates)) != own.warmup:
        print(
            f"\nwarm-up      shortened from {own.warmup} steps to {warmup}, a tenth of "
            f"the run's {updates}"
        )
    print(f"\ndata         {dataset.note}")
    print(f"model        {model_note}" + (f", {origin.note}" if origin else ""))
    if diff:
        print(diff)
    print(f"devices      {devices_note}")
    print(f"run          {cfg.folder}" + (f", resumed after step {start}\n" if start else "\n"))
