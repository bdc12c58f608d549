"""Rewards: answer, have the answers checked, and make those better than their group likelier."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import chat
from jaxgpt.data.records import Record
from jaxgpt.errors import InputError
from jaxgpt.generation.decode import decode
from jaxgpt.generation.sampling import Sampling
from jaxgpt.objectives.base import Batch, FrozenModel, Objective, Sums
from jaxgpt.objectives.chunks import Mean, log_probs
from jaxgpt.objectives.instruct import located
from jaxgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class GRPO(Objective):
    """Group relative policy optimisation (Shao et al. 2024), with rewards that can be checked.

    A batch is of problems. The model as it is answers each `group` times; an answer's advantage is
    its reward less the group's mean, over the group's standard deviation. A token's loss is
    -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) + beta (q - log q - 1), with r the ratio of its
    probability to the one it was drawn with, and q that of the reference's to its own.
    """

    reads_records: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = True
    command: ClassVar[str] = "chat"
    optional_fields: ClassVar[tuple[str, ...]] = ("input", "system", "history", "tools")

    prompt: str = "instruction"
    """The field of the problem: text, or a list of messages. `input`, `system` and `history` belong
    to it, as in `chat.read_request`."""
    answer: str = "output"
    """The field of what is right."""
    reward: Literal["exact", "number"] = "exact"
    """1 for an answer equal to what is right but for spaces around it, or whose last number equals
    the last number of what is right, as numbers: 1,000 and 1000.0 are equal."""
    group: int = 8
    """Answers to a problem."""
    tokens: int = 16
    """Tokens of an answer, at most; one that does not end within them is wrong."""
    temperature: float = 1.0
    """Of drawing the answers."""
    updates: int = 1
    """Updates by the answers of one batch."""
    epsilon: float = 0.2
    """How far a token's probability may move by one batch and still be pushed."""
    beta: float = 0.02
    """How much it costs to leave the reference (Schulman's estimate of the divergence, k3)."""
    normalize: bool = True
    """Divide advantages by the group's standard deviation; false: do not (Liu et al. 2025)."""
    per: Literal["answer", "token"] = "answer"
    """Whether every answer counts the same, or every token of all answers (Yu et al. 2025)."""
    chunk: int = 64
    """Positions of each row whose logits exist at once."""

    @property
    def fields(self) -> tuple[str, ...]:
        """A problem and what is right."""
        return (self.prompt, self.answer)

    @property
    def uses_reference(self) -> bool:
        """If `beta` is above 0."""
        return self.beta > 0

    @property
    def updates_per_batch(self) -> int:
        """As the field says."""
        return self.updates

    def check(self) -> None:
        """Raises InputError where a field cannot be."""
        if self.group < 2:
            raise InputError(f"objective.group={self.group} has nothing to compare; set it to 2 up")
        for name in ("tokens", "updates", "chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"objective.{name}={getattr(self, name)}; set it to 1 or more")
        for name in ("temperature", "epsilon"):
            if getattr(self, name) <= 0:
                raise InputError(f"objective.{name}={getattr(self, name)}; set it above 0")
        if self.beta < 0:
            raise InputError(f"objective.beta={self.beta}; set it to 0 or more")

    def extend(self, tokenizer: Tokenizer) -> Tokenizer:
        """With the special tokens of ChatML, where those of no chat format are there."""
        return chat.equipped(tokenizer)

    def example(self, record: Record) -> Any:
        """The problem and what is right, whichever fields hold them."""
        with located(record):
            asked = chat.read_request(record.values, self.prompt)
        return asked, record.values.get(self.answer)

    def encode(self, record: Record, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        """tokens [T] of the problem, up to where an answer begins, and their number `length` [];
        `right` [T], what is right in UTF-8.
        """
        if self.reward == "number" and last_number(record.text(self.answer)) is None:
            raise InputError(
                f"{record.where}: {self.answer} is {record.text(self.answer)!r}, which has no "
                "number to compare with; correct it, or set objective.reward=exact"
            )
        with located(record):
            messages, tools = chat.read_request(record.values, self.prompt)
            template = chat.choose(tokenizer)
            tokens = chat.render(template, tokenizer, messages, open=True, tools=tools).tokens
        right = np.frombuffer(record.text(self.answer).encode(), np.uint8)
        return {
            "tokens": np.asarray(tokens, np.int32),
            "length": np.asarray(len(tokens), np.int32),
            "right": right,
        }

    def score(self, answer: str, right: str) -> float:
        """The reward of an answer, 0 to 1; what other checkers override."""
        if self.reward == "number":
            number = last_number(answer)
            return float(number is not None and number == last_number(right))
        return float(answer.strip() == right.strip())

    def cut(self, example: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        """InputError: half a problem is another problem."""
        raise InputError(
            f"a problem of {example['length']} tokens does not fit a row of {length}, and is not "
            "cut; raise train.context, or leave it out"
        )

    def _reward(self, answer: str | None, right: str) -> float:
        return 0.0 if answer is None else self.score(answer, right)

    def rollout(self, trained: Any, batch: Any, key: jax.Array) -> dict[str, np.ndarray]:
        """Problems as `group` rows each, with answers drawn and scored.

        tokens, targets, weights [B * group, T] as in next-token prediction, weights 1 on answers;
        drawn [.., T] the log-probabilities they were drawn with; advantage and reward [..].
        """
        lengths = batch["length"].tolist()
        rights = [bytes(row[row != 0]).decode() for row in batch["right"]]
        prompts = [
            row[:length].tolist() for row, length in zip(batch["tokens"], lengths, strict=True)
        ]
        prompts, rights = (
            [each for each in some for _ in range(self.group)] for some in (prompts, rights)
        )
        answers, ids, log_ps = draw_answers(trained, prompts, self.tokens, key, self.temperature)
        rewards = np.asarray([*map(self._reward, answers, rights)], np.float32)
        groups = rewards.reshape(-1, self.group)
        advantages = groups - groups.mean(1, keepdims=True)
        if self.normalize:
            advantages /= groups.std(1, keepdims=True) + 1e-6

        shape = len(prompts), batch["tokens"].shape[1]
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weights, drawn = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for row, (prompt, new, log_p) in enumerate(zip(prompts, ids, log_ps, strict=True)):
            whole = [*prompt, *new]
            if len(whole) > shape[1] + 1:
                raise InputError(
                    f"a problem of {len(prompt)} tokens and an answer of {len(new)} do not fit a "
                    f"row of {shape[1]}; raise train.context, or lower objective.tokens"
                )
            end = len(whole) - 1
            tokens[row, :end], targets[row, :end] = whole[:-1], whole[1:]
            weights[row, len(prompt) - 1 : end] = 1
            drawn[row, len(prompt) - 1 : end] = log_p
        return {
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
            "drawn": drawn,
            "advantage": advantages.reshape(-1),
            "reward": rewards,
        }

    def __call__(
        self,
        model: Any,
        params: Any,
        batch: Batch,
        key: jax.Array | None,
        reference: FrozenModel | None = None,
        teacher: FrozenModel | None = None,
    ) -> tuple[jax.Array, Sums]:
        """The loss summed over answers, or over their tokens."""
        weights_BT = batch["weights"]
        log_p_BT = log_probs(model, params, batch, self.chunk, key, self.temperature)
        ratio_BT = jnp.exp(log_p_BT - batch["drawn"])
        clipped_BT = jnp.clip(ratio_BT, 1 - self.epsilon, 1 + self.epsilon)
        advantage_BT = batch["advantage"][:, None]
        loss_BT = -jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
        kl_BT = jnp.zeros_like(loss_BT)
        if reference is not None:
            reference_BT = log_probs(*reference, batch, self.chunk, None, self.temperature)
            log_q_BT = reference_BT - log_p_BT
            kl_BT = jnp.exp(log_q_BT) - log_q_BT - 1
            loss_BT = loss_BT + self.beta * kl_BT
        lengths_B = weights_BT.sum(1)
        real_B = (lengths_B > 0).astype(jnp.float32)
        tokens, answers = lengths_B.sum(), real_B.sum()
        share_BT, count = weights_BT, tokens
        if self.per == "answer":
            share_BT, count = weights_BT / jnp.maximum(lengths_B, 1)[:, None], answers
        total = (share_BT * loss_BT).sum()
        outside_BT = (ratio_BT != clipped_BT).astype(jnp.float32)
        return total, {
            "loss": Mean(total, count),
            "reward": Mean((real_B * batch["reward"]).sum(), answers),
            "kl": Mean((weights_BT * kl_BT).sum(), tokens),
            "clipped": Mean((weights_BT * outside_BT).sum(), tokens),
            "length": Mean(tokens, answers),
        }

    def measure(self, trained: Any, records: Sequence[Record], whole: bool) -> dict[str, float]:
        """The mean reward of greedy answers, to the first 256 problems unless `whole`."""
        some = records[: None if whole else 256]
        prompts = [self.encode(record, trained.tokenizer)["tokens"].tolist() for record in some]
        answers, _, _ = draw_answers(trained, prompts, self.tokens, jax.random.key(0), 0.0)
        rights = [record.text(self.answer) for record in some]
        return {"reward": float(np.mean([*map(self._reward, answers, rights)]))}

    def sample(self, trained: Any, records: Sequence[Record], prompt: str, tokens: int) -> str:
        """Greedy answers to the first held-out problems."""
        lines = []
        for record in records[:5]:
            messages = chat.read_request(record.values, self.prompt).messages
            given = trained.answer(messages, self.tokens, temperature=0)
            lines.append(f"{messages[-1].content} {given}  (right: {record.text(self.answer)})")
        return "\n".join(lines)


def last_number(text: str) -> Decimal | None:
    """The last number in a text, None if there is none.

    A comma is part of a number only where it separates thousands: "1,000" is 1000, "3,4" ends with
    4. A minus sign after a digit or letter is an operator or a hyphen: "10-3" ends with 3.
    """
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


_NUMBER = re.compile(
    r"(?:(?<!\w)-)?"
    r"(?:(?<!\d)(?<!\d,)[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][+-]?\d{1,3}(?!\d))?"
)


def draw_answers(
    trained: Any, prompts: list[list[int]], tokens: int, key: jax.Array, temperature: float
) -> tuple[list[str | None], list[list[int]], list[np.ndarray]]:
    """To each prompt an answer, None where it does not end, its ids and their log-probabilities."""
    tokenizer = trained.tokenizer
    stops = chat.choose(tokenizer).stops(tokenizer)
    seed = int(jax.random.bits(key, dtype=jnp.uint32))
    new, log_ps, lengths = decode(
        trained.model,
        trained.params,
        prompts,
        tokens,
        sampling=Sampling(temperature, seed=seed),
        stops=stops,
        vocabulary=tokenizer.vocab_size,
        tempered=True,
    )
    ids = [row[:length].tolist() for row, length in zip(new, lengths, strict=True)]
    return (
        [tokenizer.decode(row[:-1]) if row and row[-1] in stops else None for row in ids],
        ids,
        [row[:length] for row, length in zip(log_ps, lengths, strict=True)],
    )
