"""Checkpoints that survive a kill, detect damage, and describe themselves.

A checkpoint is a folder named by its step:

    runs/NAME/checkpoints/500/
        params/ train/   the arrays of each top-level item of the state, written by Orbax
        config.json ...  descriptions by the caller: config, tokenizer, data, versions, lineage
        format.json      the version of this layout
        metrics.json     the step, and what was measured before it was saved
        evaluation.json  what was measured after it was saved, such as the validation loss
        leaves.json      the path, dtype and shape of every array
        SHA256SUMS       the hash of every file above

A save is written to `500.saving` and renamed to `500` once its manifest is complete. Files are
hashed before they are read; files that the manifest does not list are ignored. A damaged checkpoint
is never deleted: it is renamed to `500.damaged`, and training resumes from the newest intact one.
`500.abandoned` is a checkpoint that training went back from.
"""

from jaxgpt.training.checkpoint.arrays import as_abstract
from jaxgpt.training.checkpoint.reader import (
    OpenCheckpoint,
    best_step,
    find_step,
    load_params,
    open_checkpoint,
    read,
    read_measured,
    step_folders,
    steps_in,
)
from jaxgpt.training.checkpoint.writer import CheckpointConfig, Checkpoints

__all__ = [
    "CheckpointConfig",
    "Checkpoints",
    "OpenCheckpoint",
    "as_abstract",
    "best_step",
    "find_step",
    "load_params",
    "open_checkpoint",
    "read",
    "read_measured",
    "step_folders",
    "steps_in",
]
