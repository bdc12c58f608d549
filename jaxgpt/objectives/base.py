"""The base of all objectives: frozen dataclasses whose fields are options and whose call is a loss.

    loss_sum, {"loss": Mean(total, count), ...} = objective(model, params, batch, key)

Everything but the call has a default, so an objective over token streams needs nothing else. An
objective over records defines what a record becomes (`encode`), one with parameters of its own
their shapes (`leaves`), one with another model how it is built (`build`), and one that trains on
samples of the model how they are made (`rollout`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, Self

import jax
import numpy as np

from jaxgpt.bounds import check_bounds
from jaxgpt.data.records import Reader, Record
from jaxgpt.errors import InputError
from jaxgpt.model import GPT, ComputeConfig, GPTConfig, Leaves, Params
from jaxgpt.objectives.chunks import Batch, Mean
from jaxgpt.objectives.trained import Trained
from jaxgpt.tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]  # of an example, or of a batch on the host
Sums = dict[str, Any]  # Means, and other values that add up over batches


class FrozenModel(NamedTuple):
    """A reference or a teacher: a model whose parameters training does not change."""

    model: GPT
    params: Params


@dataclass(frozen=True)
class Objective(ABC):
    """A training objective."""

    reads_records: ClassVar[bool] = False
    """Whether it reads records; if not, it reads token streams."""
    packs: ClassVar[bool] = False
    """Whether short examples are packed into one row, kept apart by `segments`."""
    command: ClassVar[str] = "generate"
    """The command of `python -m jaxgpt` that uses the trained model."""
    conversational: ClassVar[bool] = False
    """Whether a record may hold a list of messages instead of `fields`."""
    optional_fields: ClassVar[tuple[str, ...]] = ()
    """Further fields of a record that are read if they are there."""
    uses_rollouts: ClassVar[bool] = False
    """Whether batches go through `rollout` before the step."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are read from every record."""
        return ()

    @property
    def reader(self) -> Reader:
        """How records are read for this objective."""
        return Reader(self.fields, self.optional_fields, self.conversational, self.example)

    def example(self, record: Record) -> object:
        """The content of an example, as JSON values or dataclasses, by which duplicates are found.

        It is the fields that are read, or all of them if the record has none of these. Records with
        equal content go to the same split.
        """
        names = (*self.fields, *self.optional_fields)
        read = {name: value for name in names if (value := record.values.get(name)) is not None}
        return read or record.values

    @property
    def uses_reference(self) -> bool:
        """Whether it compares the model with what it was at the start of training."""
        return False

    @property
    def teacher_path(self) -> str:
        """The path of a model to learn from; empty: none."""
        return ""

    @property
    def updates_per_batch(self) -> int:
        """How many updates are made with each batch."""
        return 1

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        check_bounds(self, "objective.")

    def fit(self, records: Sequence[Record]) -> Self:
        """The objective with what is learned from the training records, such as the labels."""
        return self

    def extend(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with the special tokens that the objective needs."""
        return tokenizer

    def encode(self, record: Record, tokenizer: Tokenizer) -> Arrays:
        """The arrays of a record: [T] for values per token, [] for one value per record.

        Raises:
            InputError: The record is invalid; the message begins with `record.where`.
        """
        raise InputError(f"{type(self).__name__} reads records and lacks `encode`; define it")

    def cut(self, example: Arrays, length: int) -> Arrays:
        """An example that is too long, truncated at its end."""
        return {name: array[:length] if array.ndim else array for name, array in example.items()}

    def build(self, cfg: GPTConfig, compute: ComputeConfig) -> GPT:
        """The model of an architecture."""
        return cfg.build(compute)

    def leaves(self, cfg: GPTConfig) -> Leaves:
        """Parameters that the objective adds: letters and shapes by path.

        A new `w` is sampled like the model's weights; other leaves are 0.
        """
        return {}

    def rollout(self, trained: Trained, batch: Arrays, key: jax.Array) -> Arrays:
        """The batch to train on: samples of the current model, `trained`, for a batch of data."""
        return batch

    @abstractmethod
    def __call__(
        self,
        model: GPT,
        params: Params,
        batch: Batch,
        key: jax.Array | None,
        reference: FrozenModel | None = None,
        teacher: FrozenModel | None = None,
    ) -> tuple[jax.Array, Sums]:
        """The loss summed over the batch, and sums to report, "loss" a `Mean` among them.

        Args:
            model: The model.
            params: Its parameters, with those of `leaves`.
            batch: Arrays with B rows: those of `encode`, or for text tokens, targets and weights
                [B, T]; and segments and positions [B, T] if parts of a row are kept apart.
            key: For dropout; None in evaluation, where nothing is random.
            reference: The model at the start of training, if `uses_reference`. An objective that
                needs neither model need not have these two arguments.
            teacher: The model of `teacher_path`, if that is set.
        """

    def report(self, sums: Sums) -> dict[str, float]:
        """The metrics to log, from sums over some batches: every mean."""
        return {k: float(v.value) for k, v in sums.items() if isinstance(v, Mean)}

    def show(self, sums: Sums, folder: Path) -> str:
        """A report on the sums over the test set, as text; plots are saved in the run's folder."""
        return ""

    def compare(self, train: Sequence[Record], test: Sequence[Record]) -> str:
        """What a simple baseline reaches on the test set, as text."""
        return ""

    def measure(self, trained: Trained, records: Sequence[Record], whole: bool) -> dict[str, float]:
        """Metrics for which the model must be used on held-out records, such as BLEU.

        Args:
            trained: The current model.
            records: Held-out records.
            whole: Whether to use all records, as at the end of training, or only a few.
        """
        return {}

    def argument(self, records: Sequence[Record], prompt: str) -> str:
        """An example argument for `command`, such as a held-out text; "" if it takes none."""
        return prompt if self.command == "generate" else ""

    def sample(self, trained: Trained, records: Sequence[Record], prompt: str, tokens: int) -> str:
        """A sample of what the trained model does, as text: here, a continuation of the prompt."""
        return trained(prompt, tokens)


@dataclass(frozen=True)
class UnknownObjective(Objective):
    """A placeholder for a checkpoint's objective whose class is not defined in this process."""

    name: str = ""
    """The name of the class."""

    def check(self) -> NoReturn:
        """Raises InputError: such a checkpoint can be loaded, but not trained."""
        raise InputError(
            f"objective {self.name} is not known; train with the config file that defines it"
        )

    def __call__(self, *_: object) -> NoReturn:
        """Raises InputError."""
        self.check()
