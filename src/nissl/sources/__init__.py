"""Models and data by name: what a user hands to the command line, read, checked and ready."""

from nissl.sources.data import Data, load_data
from nissl.sources.images import Preprocess, read_image
from nissl.sources.models import LoadedModel, load_model, load_weights
from nissl.sources.sentiment import Sentiment, load_sentiment

__all__ = [
    "Data", "LoadedModel", "Preprocess", "Sentiment", "load_data", "load_model", "load_sentiment", "load_weights",
    "read_image",
]  # fmt: skip
