"""Atomic, self-describing checkpoints with hashes.

A checkpoint is a folder named by its step:

    runs/NAME/checkpoints/500/
        params/ train/   the arrays of each top-level item of the state, written by Orbax
        config.json ...  metadata from the caller: config, tokenizer, data, versions, lineage
        format.json      the version of this layout
        metrics.json     the step, and metrics that were measured before the save
        evaluation.json  metrics that were measured after the save, such as the validation loss
        leaves.json      the path, dtype and shape of every array
        SHA256SUMS       the manifest: the hash of every file above

A checkpoint is written to `500.saving`, renamed to `500`, and then gets its manifest, so a killed
process leaves no partial checkpoint that counts, also where renaming a folder is not atomic. Files
are hashed before they are read, and files that are not in the manifest are ignored. A damaged
checkpoint is never deleted: it is renamed to `500.damaged`, and training resumes from the newest
intact one. `500.abandoned` is a checkpoint that is later than the step to which a run was reset
with --resume.
"""

from jaxgpt.training.checkpoint.arrays import as_abstract
from jaxgpt.training.checkpoint.reader import (
    Metadata,
    OpenCheckpoint,
    best_step,
    find_checkpoint,
    load_params,
    open_checkpoint,
    read_measured,
    read_metadata,
    step_folders,
    steps_in,
)
from jaxgpt.training.checkpoint.remote import MODEL, Remote, fetch_model, fetch_records, find_remote
from jaxgpt.training.checkpoint.writer import CheckpointConfig, Checkpoints

__all__ = [
    "MODEL",
    "CheckpointConfig",
    "Checkpoints",
    "Metadata",
    "OpenCheckpoint",
    "Remote",
    "as_abstract",
    "best_step",
    "fetch_model",
    "fetch_records",
    "find_checkpoint",
    "find_remote",
    "load_params",
    "open_checkpoint",
    "read_measured",
    "read_metadata",
    "step_folders",
    "steps_in",
]
