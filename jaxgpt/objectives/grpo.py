"""Reinforcement learning with verifiable rewards (GRPO)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import chat
from jaxgpt.bounds import Ge, Gt
from jaxgpt.data.records import Record
from jaxgpt.errors import InputError
from jaxgpt.generation.decode import decode
from jaxgpt.generation.sampling import Sampling
from jaxgpt.model import GPT, Params
from jaxgpt.objectives.base import Arrays, FrozenModel, Objective, Sums
from jaxgpt.objectives.chunks import Batch, Mean, log_probs
from jaxgpt.objectives.instruct import located
from jaxgpt.objectives.rewards import Reward, exact, last_number, number
from jaxgpt.objectives.trained import Trained
from jaxgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class GRPO(Objective):
    """Group relative policy optimization (GRPO, Shao et al. 2024), with verifiable rewards.

    A batch holds problems, and the current model samples `group` answers to each. The advantage A
    of an answer is its reward minus the mean of its group, divided by the group's standard
    deviation. The loss of a token is
    -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) + beta (q - log q - 1), where r is the ratio of
    its probability to the probability it was sampled with, and q the ratio of the reference's
    probability to the model's.
    """

    reads_records: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = True
    command: ClassVar[str] = "chat"
    optional_fields: ClassVar[tuple[str, ...]] = ("input", "system", "history", "tools")

    prompt: str = "instruction"
    """The field with the problem: text, or a list of messages. `input`, `system` and `history` are
    read too, as in `chat.read_request`."""
    answer: str = "output"
    """The field with the correct answer."""
    reward: Literal["exact", "number"] = "exact"
    """exact: 1 for an answer equal to the correct one, apart from white space around it; number: 1
    if the last numbers of both are equal as numbers (1,000 and 1000.0 are), else 0."""
    rewards: tuple[Reward, ...] = ()
    """Several rewards that are added up, each times its weight, in place of `reward`: functions of
    `jaxgpt.objectives.rewards` or of the config file. Each is also logged by itself."""
    group: Annotated[int, Ge(2)] = 8
    """The number of answers sampled for each problem."""
    tokens: Annotated[int, Ge(1)] = 16
    """The most tokens of an answer; one that does not end within them has reward 0."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """The sampling temperature of answers."""
    updates: Annotated[int, Ge(1)] = 1
    """The number of updates made with the answers to one batch."""
    epsilon: Annotated[float, Gt(0)] = 0.2
    """The clipping range of the probability ratio."""
    beta: Annotated[float, Ge(0)] = 0.02
    """The weight of the KL divergence from the reference (Schulman's k3 estimate); 0: no
    reference."""
    normalize: bool = True
    """Whether advantages are divided by the group's standard deviation (Liu et al. 2025: no)."""
    per: Literal["answer", "token"] = "answer"
    """Whether the loss is averaged over answers, or over the tokens of all answers (Yu et al.
    2025)."""
    chunk: Annotated[int, Ge(0)] = 0
    """Positions of each row whose logits are in memory at once; fewer save memory, and more may be
    faster. 0: chosen from the rows, the vocabulary and the platform, so that the logits on a TPU or
    GPU take at most 512 MiB."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the problem and of the correct answer."""
        return (self.prompt, self.answer)

    @property
    def uses_reference(self) -> bool:
        """If `beta` is above 0."""
        return self.beta > 0

    @property
    def updates_per_batch(self) -> int:
        """The option `updates`."""
        return self.updates

    def check(self) -> None:
        """Raises InputError if a field is invalid, or a reward is not known."""
        super().check()
        names = [reward.name for reward in self.rewards]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise InputError(
                f"objective.rewards has {twice} twice; name it once, with the sum of the weights",
                field="objective.rewards",
            )
        for reward in self.rewards:
            reward.check()

    def extend(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with the special tokens of ChatML, if it has those of no chat format."""
        return chat.equipped(tokenizer)

    def example(self, record: Record) -> object:
        """The problem and what is right, whichever fields hold them."""
        with located(record):
            asked = chat.read_request(record.values, self.prompt)
        return asked, record.values.get(self.answer)

    def encode(self, record: Record, tokenizer: Tokenizer) -> Arrays:
        """tokens [T] of the problem, up to where an answer begins, and their number `length` [];
        `right` [T], what is right in UTF-8.
        """
        compared = {reward.name for reward in self.rewards} or {self.reward}
        if "number" in compared and last_number(record.text(self.answer)) is None:
            raise InputError(
                f"{record.where}: {self.answer} is {record.text(self.answer)!r}, which has no "
                "number to compare with; correct it, or use the reward exact"
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
        """The reward of an answer if there are no `rewards`; subclasses may override it."""
        return (number if self.reward == "number" else exact)(answer, right)

    def cut(self, example: Arrays, length: int) -> Arrays:
        """InputError: half a problem is another problem."""
        raise InputError(
            f"a problem of {example['length']} tokens does not fit a row of {length}, and is not "
            "cut; raise train.context, or leave it out"
        )

    def _score_all(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[str | None],
        rights: Sequence[str],
    ) -> Arrays:
        """reward [N] of N answers, 0 for None, and for each of `rewards` its own, reward_NAME."""
        functions: dict[str, Callable[[str, str], float]] = {
            f"reward_{reward.name}": reward for reward in self.rewards
        }
        scores = {name: np.zeros(len(answers)) for name in functions or ("reward",)}
        for row, (prompt, answer, right) in enumerate(zip(prompts, answers, rights, strict=True)):
            try:
                for name, found in scores.items():
                    if answer is not None:
                        found[row] = functions.get(name, self.score)(answer, right)
            except InputError as error:
                raise InputError(f"{error}; the problem is {tokenizer.decode(prompt)!r}") from error
        if self.rewards:
            parts = zip(self.rewards, list(scores.values()), strict=True)
            scores["reward"] = sum(
                (reward.weight * found for reward, found in parts), np.zeros(len(answers))
            )
        return {name: found.astype(np.float32) for name, found in scores.items()}

    def rollout(self, trained: Trained, batch: Arrays, key: jax.Array) -> Arrays:
        """Samples and scores `group` answers to each problem, each in a row of its own.

        Returns:
            tokens, targets, weights [B * group, T] as in next-token prediction, with weight 1 on
            answers; drawn [B * group, T], the log-probabilities with which they were sampled;
            advantage, reward and for each of `rewards` reward_NAME [B * group].
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
        scores = self._score_all(trained.tokenizer, prompts, answers, rights)
        groups = scores["reward"].reshape(-1, self.group)
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
            **scores,
        }

    def __call__(
        self,
        model: GPT,
        params: Params,
        batch: Batch,
        key: jax.Array | None,
        reference: FrozenModel | None = None,
        teacher: FrozenModel | None = None,
    ) -> tuple[jax.Array, Sums]:
        """The loss, summed over answers or over their tokens (`per`)."""
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
        scores = ["reward", *(f"reward_{reward.name}" for reward in self.rewards)]
        return total, {
            "loss": Mean(total, count),
            **{name: Mean((real_B * batch[name]).sum(), answers) for name in scores},
            "kl": Mean((weights_BT * kl_BT).sum(), tokens),
            "clipped": Mean((weights_BT * outside_BT).sum(), tokens),
            "length": Mean(tokens, answers),
        }

    def measure(self, trained: Trained, records: Sequence[Record], whole: bool) -> dict[str, float]:
        """The mean rewards of greedy answers, to the first 256 problems or to all if `whole`."""
        some = records[: None if whole else 256]
        prompts = [self.encode(record, trained.tokenizer)["tokens"].tolist() for record in some]
        answers, _, _ = draw_answers(trained, prompts, self.tokens, jax.random.key(0), 0.0)
        rights = [record.text(self.answer) for record in some]
        scores = self._score_all(trained.tokenizer, prompts, answers, rights)
        return {name: float(found.mean()) for name, found in scores.items()}

    def sample(self, trained: Trained, records: Sequence[Record], prompt: str, tokens: int) -> str:
        """Greedy answers to the first held-out problems."""
        lines = []
        for record in records[:5]:
            messages = chat.read_request(record.values, self.prompt).messages
            given = trained.answer(messages, self.tokens, temperature=0)
            lines.append(f"{messages[-1].content} {given}  (correct: {record.text(self.answer)})")
        return "\n".join(lines)


def draw_answers(
    trained: Trained, prompts: list[list[int]], tokens: int, key: jax.Array, temperature: float
) -> tuple[list[str | None], list[list[int]], list[np.ndarray]]:
    """An answer to each prompt (None if it does not end), its ids and their log-probabilities."""
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
