"""What every objective is: a frozen dataclass whose fields are options and whose call is the loss.

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

from jaxgpt.data.records import Reader, Record
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig, Leaves
from jaxgpt.objectives.chunks import Mean
from jaxgpt.tokenizer import Tokenizer

Batch = dict[str, jax.Array]
Sums = dict[str, Any]  # Means, and whatever else adds up over batches


class FrozenModel(NamedTuple):
    """A reference or a teacher: a model whose parameters training does not change."""

    model: Any
    params: Any


@dataclass(frozen=True)
class Objective(ABC):
    """A way of training."""

    reads_records: ClassVar[bool] = False
    """Whether it reads records; else streams of tokens."""
    packs: ClassVar[bool] = False
    """Whether several examples may share a row, told apart by `segments`."""
    command: ClassVar[str] = "generate"
    """What of `python -m jaxgpt` uses the model."""
    conversational: ClassVar[bool] = False
    """Whether a list of messages in a record may stand for `fields`."""
    optional_fields: ClassVar[tuple[str, ...]] = ()
    """The names of further fields that it reads from a record which has them."""
    uses_rollouts: ClassVar[bool] = False
    """Whether batches go through `rollout` before the step."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that it reads from every record."""
        return ()

    @property
    def reader(self) -> Reader:
        """What the data has to know to read records for it."""
        return Reader(self.fields, self.optional_fields, self.conversational, self.example)

    def example(self, record: Record) -> Any:
        """What an example is made of, in values of JSON or dataclasses.

        That is the fields that are read, or all if the record has none of them. Records of which it
        is equal are the same example: they are held out together.
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
        """Updates of the parameters by one batch."""
        return 1

    def check(self) -> None:  # noqa: B027 - most have something to check, not all
        """Raises InputError where a field cannot be."""

    def fit(self, records: Sequence[Record]) -> Self:
        """The objective with what only the training records tell, such as the names of labels."""
        return self

    def extend(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with the special tokens it needs, added where they are missing."""
        return tokenizer

    def encode(self, record: Record, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        """A record as arrays: of shape [T] for what lies along a row, [] for one value each.

        Raises InputError, beginning with `record.where`, for a record that cannot be.
        """
        raise InputError(f"{type(self).__name__} reads records and lacks `encode`; define it")

    def cut(self, example: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        """An example that is too long, cut at its end."""
        return {name: array[:length] if array.ndim else array for name, array in example.items()}

    def build(self, cfg: GPTConfig, compute: Any) -> Any:
        """The model."""
        return cfg.build(compute)

    def leaves(self, cfg: GPTConfig) -> Leaves:
        """Parameters beside the model's: path -> (letters, shape). New, `w` is drawn, `b` zero."""
        return {}

    def rollout(self, trained: Any, batch: Any, key: jax.Array) -> Any:
        """The batch to train on: samples of the current model, `trained`, for a batch of data."""
        return batch

    @abstractmethod
    def __call__(
        self,
        model: Any,
        params: Any,
        batch: Batch,
        key: jax.Array | None,
        reference: FrozenModel | None = None,
        teacher: FrozenModel | None = None,
    ) -> tuple[jax.Array, Sums]:
        """The loss summed over the batch, and sums to report, "loss" a `Mean` among them.

        Args:
            model: The model.
            params: Its parameters, with those of `leaves`.
            batch: Arrays with B rows.
            key: For dropout; None in evaluation, where nothing is random.
            reference: The model at the start of training, if `uses_reference`. An objective that
                needs neither model need not have these two arguments.
            teacher: The model of `teacher_path`, if that is set.
        """

    def report(self, sums: Sums) -> dict[str, float]:
        """What is logged of the sums over some batches: each mean."""
        return {k: float(v.value) for k, v in sums.items() if isinstance(v, Mean)}

    def show(self, sums: Sums, folder: Path) -> str:
        """What the sums over the test set say, to read; pictures go to the run's folder."""
        return ""

    def compare(self, train: Sequence[Record], test: Sequence[Record]) -> str:
        """What a simple method reaches on the test set, to read beside the model's result."""
        return ""

    def measure(self, trained: Any, records: Sequence[Record], whole: bool) -> dict[str, float]:
        """What is measured by using the model on held-out records: nothing.

        On all of them where `whole` is asked for, which is at the end; else on as many as is quick.
        """
        return {}

    def argument(self, records: Sequence[Record], prompt: str) -> str:
        """A text to give `command` as an example, such as a held-out one; "" if it takes none."""
        return prompt if self.command == "generate" else ""

    def sample(self, trained: Any, records: Sequence[Record], prompt: str, tokens: int) -> str:
        """What the trained model does, to read: here, going on from a prompt."""
        return trained(prompt, tokens)


@dataclass(frozen=True)
class UnknownObjective(Objective):
    """Stands for the objective of a checkpoint whose class is not defined in this process."""

    name: str = ""
    """The class."""

    def check(self) -> NoReturn:
        """Raises InputError: it can be read about, not trained with."""
        raise InputError(
            f"objective {self.name} is not one of jaxgpt's; train with the config file that has it"
        )

    def __call__(self, *_: Any) -> NoReturn:
        """Raises InputError."""
        self.check()
