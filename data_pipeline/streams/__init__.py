"""Streams of micro-batches from prepared shards; the names that training and evaluation import.

`image_loader` yields pictures with captions, `document_loader` packed documents. Both are a `StreamLoader`:
endless and shuffled for training, one ordered pass for validation, its place saved and restored exactly.
"""

from data_pipeline.errors import DatasetError
from data_pipeline.shards.index import prepare_dataset
from data_pipeline.streams.documents import (
    BlendEntry,
    DocumentLoader,
    DocumentStreamConfig,
    StreamStatistics,
    document_loader,
)
from data_pipeline.streams.images import ImageFolder, ImageStreamConfig, ImageTextBatch, image_loader
from data_pipeline.streams.loader import StreamLoader

__all__ = [
    "BlendEntry",
    "DatasetError",
    "DocumentLoader",
    "DocumentStreamConfig",
    "ImageFolder",
    "ImageStreamConfig",
    "ImageTextBatch",
    "StreamLoader",
    "StreamStatistics",
    "document_loader",
    "image_loader",
    "prepare_dataset",
]
