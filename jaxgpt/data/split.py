"""Which text is held out for validation: decided by content alone, the same in every run."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from jaxgpt.data.formats import Document
from jaxgpt.data.sources import Source

Split = Literal["train", "val"]

FEW = 100  # documents; below this, whole ones are too coarse to hold out


def split(source: Source, val_fraction: float) -> Iterator[tuple[Split, Document]]:
    """The documents of `source` in order, each with its split, to be read once each.

    Of many documents, about `val_fraction` are held out, chosen by a hash of their text, so that
    equal documents go together and a choice outlives additions to the corpus. Of fewer than 100,
    each is cut in two at character `int((1 - val_fraction) * length)`, and its tail is held out.
    """
    few = sum(1 for _ in islice(source.documents(), FEW)) < FEW
    for document in source.documents():
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
