"""The options of the evaluation on tasks that ends a run."""

from dataclasses import dataclass
from typing import Annotated

from jaxgpt.bounds import Ge, check_bounds

EVALUATION = "evaluation.json"
"""The file in a run's folder with what it was measured on tasks, as `jaxgpt eval --json` writes."""


@dataclass(frozen=True)
class EvaluationConfig:
    """On which tasks a run is measured after its last step."""

    tasks: tuple[str, ...] = ()
    """Tasks by name ('python', a suite from the standard library; 'core'; 'gsm8k'), task files
    (JSON Lines), or folders of evaluation bundles in the format of DCLM's CORE. Empty: the run is
    not measured on tasks."""
    shots: Annotated[int, Ge(-1)] = -1
    """The number of solved examples in each prompt (few-shot); -1: as each task says."""
    chat: bool = False
    """Whether queries and answers of tasks are messages of a conversation in the model's chat
    format. Tasks that continue a text (schema, cloze, text) stay as they are."""
    limit: Annotated[int, Ge(0)] = 0
    """The most examples of each task; 0: all."""

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        check_bounds(self, "evaluation.")
