"""The Runner: batching, answer cache, cost, progress."""

from nissl.runner.cache import AnswerCache
from nissl.runner.question import CHUNK, Asking, Question, chunks
from nissl.runner.runner import Cost, Job, Runner, make_questions
from nissl.runner.scores import Explained, explained

__all__ = [
    "CHUNK", "AnswerCache", "Asking", "Cost", "Explained", "Job", "Question", "Runner", "chunks", "explained",
    "make_questions",
]  # fmt: skip
