"""What calls of a loaded model return: lists that are shown as tables in terminals and notebooks.

The items are named tuples, so `pandas.DataFrame(gpt.score(texts))` has their columns.
"""

from typing import ClassVar, NamedTuple, TypeVar

from jaxgpt.display import html_table, shortened, text_table, visible

Row = TypeVar("Row", bound=tuple[object, ...])

SHOWN = 60
"""The most characters of a text in a table."""
ROWS = 100
"""The most rows of a table; of longer lists, the first and last ones are shown."""


class Table(list[Row]):
    """A list of named tuples that is shown as a table."""

    head: ClassVar[tuple[str, ...]] = ()
    """The names of the columns."""
    right: ClassVar[tuple[int, ...]] = ()
    """The columns with numbers, which are aligned to the right."""

    def cells(self, row: Row) -> list[str]:
        """The cells of an item, one for each column."""
        raise NotImplementedError

    def _rows(self) -> list[list[str]]:
        if len(self) <= ROWS:
            return [self.cells(row) for row in self]
        gap = [["\u22ee"] * len(self.head)]
        first, last = self[: ROWS // 2], self[-ROWS // 2 :]
        return [*map(self.cells, first), *gap, *map(self.cells, last)]

    def __repr__(self) -> str:
        return text_table([self.head, *self._rows()], self.right)

    def _repr_html_(self) -> str:
        return html_table(self._rows(), self.head, self.right)


class NextToken(NamedTuple):
    """A token that may come next."""

    token: str
    """Its text."""
    id: int
    probability: float
    logprob: float
    """The logarithm of the probability, in nats."""


class NextTokens(Table[NextToken]):
    """The most likely next tokens, the likeliest first."""

    head = ("token", "id", "probability", "logprob")
    right = (1, 2, 3)

    def cells(self, row: NextToken) -> list[str]:
        """The cells of a token; spaces and line breaks are visible characters."""
        return [visible(row.token), str(row.id), f"{row.probability:.2%}", f"{row.logprob:.3f}"]


class TextScore(NamedTuple):
    """How well a model predicts a text."""

    text: str
    logprob: float
    """The log-likelihood: the sum of the log-probabilities of its tokens, in nats."""
    tokens: int
    """The number of tokens."""
    perplexity: float
    """The exponential of the mean negative log-probability of a token."""
    bits_per_byte: float
    """The negative log-likelihood in bits, per byte of the text in UTF-8. Unlike the perplexity, it
    can be compared between models with different tokenizers."""


class Scores(Table[TextScore]):
    """The scores of texts, in their order."""

    head = ("text", "logprob", "tokens", "perplexity", "bits per byte")
    right = (1, 2, 3, 4)

    def cells(self, row: TextScore) -> list[str]:
        """The cells of a text's score."""
        return [
            shortened(row.text, SHOWN),
            f"{row.logprob:.2f}",
            f"{row.tokens:,}",
            f"{row.perplexity:,.2f}",
            f"{row.bits_per_byte:.3f}",
        ]
