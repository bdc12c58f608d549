"""The tables of a guide: from an automaton over bytes to one over tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained.expressions import Expressions
from jaxgpt.generation.shapes import power_of_two
from jaxgpt.tokenizer.base import Tokenizer

LIMIT = 4096
"""The default limit of the states of a guide."""
LARGEST_LIMIT = 1 << 14
"""The largest `limit`; building a guide takes a byte for each pair of states."""
LARGEST_TABLE = 1 << 23
"""The largest product of states and classes, a table of 32 MB."""

_NEVER, _END = 0, 1  # the classes of tokens that are never allowed, and of those that end


@dataclass(frozen=True, eq=False)
class Guide:
    """A deterministic automaton over token ids. State 0 is the start, the last state is the end.

    Class 0 has the tokens that are never allowed, class 1 the end tokens.
    """

    classes_V: np.ndarray
    """int32[V]: the class of each id. Ids with equal transitions have the same class."""
    next_SC: np.ndarray
    """int32[S, C]: the state after a token of a class; -1: not allowed."""

    def allowed(self, state: int) -> np.ndarray:
        """Whether each id is allowed in a state, bool[V]."""
        return self.next_SC[state, self.classes_V] >= 0

    def after(self, state: int, token: int) -> int:
        """The state after a token; -1 if it is not allowed."""
        return int(self.next_SC[state, self.classes_V[token]])


def guide_of(
    graph: Expressions,
    root: int,
    tokenizer: Tokenizer,
    ends: Sequence[int] | None,
    limit: int,
    context: Sequence[int] | None = None,
) -> Guide:
    """The guide of an expression, for a tokenizer and the ids before the text."""
    if not 2 <= limit <= LARGEST_LIMIT:
        raise InputError(f"limit={limit}; set it from 2 to {LARGEST_LIMIT}")
    end_ids = _end_ids(tokenizer, ends)
    next_SB, complete_S = graph.automaton(root, limit)
    begins, space = tokenizer.place(context)
    if tokenizer.spaced:
        next_SB, complete_S = _with_spaces_within(next_SB, complete_S)
    if space or (begins and tokenizer.first_pieces):
        next_SB, complete_S = _with_own_start(next_SB, complete_S, space)
    tokens, functions_FS, function_of = _token_functions(tokenizer, end_ids, next_SB)
    if begins and tokenizer.first_pieces:
        functions_FS, function_of = _spelled_first(
            tokenizer, next_SB, tokens, functions_FS, function_of
        )

    # Keep the states that tokens can reach, and from which they can reach a complete state.
    S = len(next_SB)
    leads_SS = np.zeros((S, S + 1), bool)
    for next_S in functions_FS:
        leads_SS[np.arange(S), next_S] = True
    leads_SS = leads_SS[:, :S]
    alive_S = _reached(leads_SS.T, complete_S)
    if not alive_S[0]:
        raise InputError(
            "no text is possible: nothing matches, or the tokenizer has no tokens for it"
        )
    kept = np.flatnonzero(_reached(leads_SS & alive_S, np.arange(S) == 0))
    numbers = np.full(S + 1, -1, np.int32)
    numbers[kept] = np.arange(len(kept))

    columns_CS, class_of = _distinct(numbers[functions_FS[:, kept]])
    used = (columns_CS >= 0).any(1)
    _check_size(len(kept) + 1, int(used.sum()) + 2)
    classes = np.where(used, np.cumsum(used) + _END, _NEVER)
    classes_V = np.full(tokenizer.vocab_size, _NEVER, np.int32)
    classes_V[tokens] = classes[class_of[function_of]]
    classes_V[end_ids] = _END
    final = len(kept)
    next_SC = np.full((final + 1, used.sum() + 2), -1, np.int32)
    next_SC[:final, 2:] = columns_CS[used].T
    next_SC[:final, _END] = np.where(complete_S[kept], final, -1)
    next_SC[final, _END] = final
    return Guide(classes_V, next_SC)


_SPACE, _SPACE_WITHIN = ord(" "), 0xFF
"""A space, and the byte that stands for a space at the end of the pieces of `Tokenizer.spaced`,
which is dropped at the end of a text. UTF-8 has no byte 0xFF."""


def _with_spaces_within(
    next_SB: np.ndarray, complete_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Adds transitions for `_SPACE_WITHIN`, a space that is dropped at the end of the text.

    The byte leads to the state after a space. From a complete state it leads to a copy of that
    state which is complete too, because the text may end there, without the space."""
    complete = np.flatnonzero(complete_S)
    after_S = next_SB[:, _SPACE].copy()
    next_SB = np.concatenate(
        [next_SB, np.where((after_S >= 0)[:, None], next_SB[after_S], -1)[complete]]
    )
    after_S[complete] = len(complete_S) + np.arange(len(complete))
    before = next_SB[: len(complete_S), _SPACE][complete]
    within = np.concatenate([after_S, np.where(before >= 0, after_S[before], -1)])
    next_SB[:, _SPACE_WITHIN] = within
    return next_SB, np.concatenate([complete_S, np.ones(len(complete), bool)])


def _with_own_start(
    next_SB: np.ndarray, complete_S: np.ndarray, space: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Adds a copy of the start state to which no token leads, for the first token of a text.

    With `space`, a space is read before that token.
    """
    start = int(next_SB[0, _SPACE_WITHIN]) if space else 0
    if start < 0:
        raise InputError(
            "no text is possible: the tokenizer puts a space after the prompt, and nothing that "
            "begins with a space matches; begin the text with a space"
        )
    moved_SB = np.where(next_SB >= 0, next_SB + 1, -1)
    return (
        np.concatenate([moved_SB[start : start + 1], moved_SB]),
        np.concatenate([complete_S[start : start + 1], complete_S]),
    )


def _spelled_first(
    tokenizer: Tokenizer,
    next_SB: np.ndarray,
    tokens: np.ndarray,
    functions_FS: np.ndarray,
    function_of: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """As `_token_functions`, but in state 0 tokens are spelled as the first one of a text."""
    S = len(next_SB)
    functions = list(functions_FS)
    numbers: dict[tuple[int, int], int] = {}
    function_of = function_of.copy()
    for i, token in enumerate(tokens.tolist()):
        if (piece := tokenizer.first_pieces.get(token)) is None:
            continue
        # A token without bytes leaves the start too: the token after it is not the first.
        state = 0 if piece else 1
        for byte in _within(piece, token in tokenizer.spaced):
            if (state := int(next_SB[state, byte])) < 0:
                break
        key = int(function_of[i]), state if state >= 0 else S
        if key not in numbers:
            numbers[key] = len(functions)
            function = functions[key[0]].copy()
            function[0] = key[1]
            functions.append(function)
            _check_size(S, len(functions))
        function_of[i] = numbers[key]
    return np.array(functions), function_of


def _within(piece: bytes, spaced: bool) -> bytes:
    return piece[:-1] + bytes([_SPACE_WITHIN]) if spaced else piece


def stacked(guides: Sequence[Guide | None], V: int) -> tuple[np.ndarray, np.ndarray]:
    """The tables of the guides of a batch.

    Args:
        guides: The guide of each row; None: everything is allowed, and the state stays 0.
        V: The size of the logits. Ids beyond the tokenizer's vocabulary are never allowed in a row
            with a guide.

    Returns:
        Classes, int32 [B, V], and next states, int32 [B, S, C]. S and C are powers of two, so that
        the decoding loop is compiled for few sizes.

    Raises:
        InputError: V is smaller than the vocabulary of a guide.
    """
    given = [guide for guide in guides if guide is not None]
    if (ids := max((len(guide.classes_V) for guide in given), default=0)) > V:
        raise InputError(f"V={V}, but a guide has {ids} ids; set it to that or more")
    S, C = (
        power_of_two(max((guide.next_SC.shape[i] for guide in given), default=1)) for i in (0, 1)
    )
    classes_BV = np.full((len(guides), V), _NEVER, np.int32)
    next_BSC = np.full((len(guides), S, C), -1, np.int32)
    for row, guide in enumerate(guides):
        if guide is None:
            next_BSC[row, 0] = 0
        else:
            states, classes = guide.next_SC.shape
            classes_BV[row, : len(guide.classes_V)] = guide.classes_V
            next_BSC[row, :states, :classes] = guide.next_SC
    return classes_BV, next_BSC


def _end_ids(tokenizer: Tokenizer, ends: Sequence[int] | None) -> list[int]:
    ids = sorted({tokenizer.eot, tokenizer.eos} if ends is None else set(ends))
    if not ids:
        raise InputError("ends is empty; give the id of at least one end token")
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise InputError(f"ends has {token}; ids are 0 to {tokenizer.vocab_size - 1}")
    return ids


def _token_functions(
    tokenizer: Tokenizer, ends: list[int], next_SB: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of text tokens, their distinct transition functions, and the function of each id.

    A function is a row with the state after each state, S if the token is not allowed there. All
    tokens are read byte by byte at once, and tokens with equal functions so far share the next
    step.
    """
    S = len(next_SB)
    step_KS, kind_B = _distinct(np.where(next_SB < 0, S, next_SB).T)
    step_KS = np.pad(step_KS, ((0, 0), (0, 1)), constant_values=S)
    tokens = _text_tokens(tokenizer, ends)
    pieces = [
        _within(tokenizer.pieces[token], token in tokenizer.spaced) for token in tokens.tolist()
    ]
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    starts = np.cumsum(lengths) - lengths
    kinds = kind_B[np.frombuffer(b"".join(pieces), np.uint8)]

    functions = [np.arange(S, dtype=np.int32), np.full(S, S, np.int32)]
    numbers = {function.tobytes(): number for number, function in enumerate(functions)}
    function_of = np.zeros(len(tokens), np.int64)
    for depth in range(lengths.max(initial=0)):
        live = np.flatnonzero((lengths > depth) & (function_of != 1))
        pairs, pair_of = np.unique(
            function_of[live] * len(step_KS) + kinds[starts[live] + depth], return_inverse=True
        )
        after = np.zeros(len(pairs), np.int64)
        for i, pair in enumerate(pairs.tolist()):
            function = step_KS[pair % len(step_KS)][functions[pair // len(step_KS)]]
            after[i] = numbers.setdefault(function.tobytes(), len(functions))
            if after[i] == len(functions):
                functions.append(function)
                _check_size(S, len(functions))
        function_of[live] = after[pair_of]
    used, function_of = np.unique(function_of, return_inverse=True)
    return tokens, np.array([functions[number] for number in used]).reshape(-1, S), function_of


def _check_size(states: int, classes: int) -> None:
    if states * classes > LARGEST_TABLE:
        raise InputError(
            f"the guide has {states:,} states and {classes:,} classes of tokens or more, a table "
            f"of over {LARGEST_TABLE:,} entries; use fewer or shorter texts and names"
        )


def _text_tokens(tokenizer: Tokenizer, ends: list[int]) -> np.ndarray:
    """The ids of tokens with text: no special tokens, end tokens or unused ids."""
    nothing = "\ufffd".encode()
    try:
        real = tokenizer.encode("\ufffd")
    except InputError:
        real = []
    excluded = {*ends, *tokenizer.specials.values()}
    return np.array(
        [
            token
            for token, piece in enumerate(tokenizer.pieces)
            if piece and token not in excluded and (piece != nothing or token in real)
        ],
        np.int64,
    )


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows, and the number of the distinct row for each row."""
    numbers: dict[bytes, int] = {}
    which = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.int64)
    return rows[np.unique(which, return_index=True)[1]], which


def _reached(leads_SS: np.ndarray, start_S: np.ndarray) -> np.ndarray:
    """The states that can be reached from some states."""
    leads_SS, reached_S, new_S = np.ascontiguousarray(leads_SS), start_S.copy(), start_S
    while new_S.any():
        new_S = leads_SS[new_S].any(0) & ~reached_S
        reached_S |= new_S
    return reached_S


class Pieces(NamedTuple):
    """The bytes of tokens, which may depend on the position in the text."""

    first: set[bytes]
    middle: set[bytes]
    last: set[bytes]
    only: set[bytes]

    def spell(self, text: bytes) -> bool:
        """Whether the text is a concatenation of pieces."""
        single = all(text[i : i + 1] in self.middle for i in range(1, len(text) - 1))
        if single and len(text) > 1 and text[:1] in self.first and text[-1:] in self.last:
            return True
        longest = max(map(len, self.first | self.middle | self.last | self.only), default=0)
        reached = [True] + [False] * len(text)
        for end in range(1, len(text)):
            for start in range(max(end - longest, 0), end):
                pieces = self.middle if start else self.first
                reached[end] |= reached[start] and text[start:end] in pieces
        return any(
            reached[start] and text[start:] in (self.last if start else self.only)
            for start in range(max(len(text) - longest, 0), len(text))
        )


def pieces_of(guide: Guide, tokenizer: Tokenizer, context: Sequence[int] | None) -> Pieces:
    """The bytes of tokens in any position that a guide allows."""
    tokens = np.flatnonzero(guide.classes_V > _END).tolist()
    begins, space = tokenizer.place(context)
    middle = {token: tokenizer.pieces[token] for token in tokens}
    first = {
        token: b" " * space + (tokenizer.first_pieces.get(token, piece) if begins else piece)
        for token, piece in middle.items()
    }

    def ended(pieces: dict[int, bytes]) -> set[bytes]:
        return {p[:-1] if token in tokenizer.spaced else p for token, p in pieces.items()}

    return Pieces({*first.values()}, {*middle.values()}, ended(middle), ended(first))
