"""Splits documents into training and validation sets by their content, the same in every run."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal

from jaxgpt.data.formats import Document
from jaxgpt.data.sources import TextSource

Split = Literal["train", "val"]

FEW = 100  # below this number of documents, the end of each one is held out, not whole ones


def split(source: TextSource, val_fraction: float) -> Iterator[tuple[Split, Document]]:
    """Assigns each document to the training or the validation set.

    Of 100 or more documents, about `val_fraction` are held out, chosen by a hash of their text.
    So equal documents are in the same set, and adding documents does not change the set of others.
    Of fewer, each document is cut at character `int((1 - val_fraction) * length)`, and its end is
    held out.

    Args:
        source: The documents.
        val_fraction: The fraction to hold out; 0: none.

    Yields:
        The split and the document, in order. Each document can be iterated once.
    """
    few = sum(1 for _ in islice(source.documents(), FEW)) < FEW
    yield from split_documents(source.documents(), val_fraction, few)


def split_documents(
    documents: Iterable[Document], val_fraction: float, few: bool
) -> Iterator[tuple[Split, Document]]:
    """As `split`, for documents of a source of which it is known whether it has fewer than 100."""
    for document in documents:
        if not val_fraction:
            yield "train", document
        elif few:
            length = sum(map(len, document))
            cut = int((1 - val_fraction) * length)
            if cut or not length:
                yield "train", _slice(document, 0, cut)
            if cut < length:
                yield "val", _slice(document, cut, length)
        else:
            yield ("val" if _uniform(document) < val_fraction else "train"), document


def _slice(document: Document, start: int, stop: int) -> Iterator[str]:
    at = 0
    for piece in document:
        if at >= stop:
            return
        if part := piece[max(start - at, 0) : max(stop - at, 0)]:
            yield part
        at += len(piece)


def _uniform(document: Document) -> float:
    digest = hashlib.sha256()
    for piece in document:
        digest.update(piece.encode())
    return int.from_bytes(digest.digest()[:8]) / 2**64
