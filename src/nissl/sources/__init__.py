"""Models and data by name: what a user hands to the command line, read, checked and ready."""

from nissl.sources.data import Data, load_data
from nissl.sources.images import Preprocess, read_image
from nissl.sources.models import LoadedModel, load_model, load_weights
from nissl.sources.sentiment import Sentiment, load_sentiment
from nissl.sources.tasks import (
    PromptPairs,
    coding_prompts,
    factual_recall,
    greater_than,
    indirect_object,
    subject_verb_agreement,
)

__all__ = [
    "Data", "LoadedModel", "Preprocess", "PromptPairs", "Sentiment", "coding_prompts", "factual_recall", "greater_than",
    "indirect_object", "load_data", "load_model", "load_sentiment", "load_weights", "read_image",
    "subject_verb_agreement",
]  # fmt: skip
