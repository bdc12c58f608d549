"""BLEU of translations."""

from collections.abc import Sequence


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU (Papineni et al. 2002), 0 to 100. Needs sacrebleu."""
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(list(translations), [list(references)]).score)
