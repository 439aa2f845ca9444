"""Data for training: tokenizers, encoded text, made-up retrieval documents, packed batches."""

from foveal.train.data.corpus import Corpus, data_cache
from foveal.train.data.feed import Feed, TrainingBatch
from foveal.train.data.settings import DataSettings, RetrievalSettings, TextSettings, TokenizerSettings
from foveal.train.data.tokenizer import open_tokenizer

__all__ = [
    "Corpus",
    "DataSettings",
    "Feed",
    "RetrievalSettings",
    "TextSettings",
    "TokenizerSettings",
    "TrainingBatch",
    "data_cache",
    "open_tokenizer",
]
