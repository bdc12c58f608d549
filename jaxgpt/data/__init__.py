"""Data loading: text or records to batches, where batch k is a pure function of the seed and k.

corpus = prepare(cfg, tokenizer)                 # tokenizes, or opens the cache
batches = Batches(corpus, cfg, context=1024, batch=16, seed=0)
batches.batch(step)                              # the same rows at every call
for batch in prefetch(batches.batch, start=step): ...
for batch in eval_batches(corpus.val, cfg, context=1024, batch=16): ...
dataset = stream(cfg, tokenizer, context=1024, batch=16)   # downloaded during training
"""

from jaxgpt.data.batches import Batches, eval_batches, streams
from jaxgpt.data.corpus import (
    Corpus,
    DataConfig,
    held_out_texts,
    prepare,
    refuse_changed,
    texts,
    token_entries,
)
from jaxgpt.data.dataset import Batch, Dataset
from jaxgpt.data.examples import examples
from jaxgpt.data.prefetch import prefetch
from jaxgpt.data.records import (
    Reader,
    Record,
    RecordsConfig,
    RecordSource,
    mixture,
    read_splits,
    strings,
)
from jaxgpt.data.remote import pin
from jaxgpt.data.streaming import stream
from jaxgpt.data.tokens import TokenStream, find_entry_damage

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "DataConfig",
    "Dataset",
    "Reader",
    "Record",
    "RecordSource",
    "RecordsConfig",
    "TokenStream",
    "eval_batches",
    "examples",
    "find_entry_damage",
    "held_out_texts",
    "mixture",
    "pin",
    "prefetch",
    "prepare",
    "read_splits",
    "refuse_changed",
    "stream",
    "streams",
    "strings",
    "texts",
    "token_entries",
]
