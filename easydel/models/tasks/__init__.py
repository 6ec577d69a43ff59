"""Task heads on any backbone."""

from easydel.models.tasks.base import TaskModule
from easydel.models.tasks.causal_lm import BiasedCausalLM, CausalLM
from easydel.models.tasks.classification import (
    DecoderTokenClassifier,
    FirstTokenClassifier,
    PooledClassifier,
    SequenceClassifier,
    TokenClassifier,
)
from easydel.models.tasks.embedding import Embedding
from easydel.models.tasks.masked_lm import MaskedLM
from easydel.models.tasks.moe import MoECausalLM, RoutedCausalLM
from easydel.models.tasks.question_answering import QuestionAnswering
from easydel.models.tasks.seq2seq import Seq2SeqLM
from easydel.models.tasks.vocabulary import VocabularyTask

__all__ = [
    "BiasedCausalLM",
    "CausalLM",
    "DecoderTokenClassifier",
    "Embedding",
    "FirstTokenClassifier",
    "MaskedLM",
    "MoECausalLM",
    "PooledClassifier",
    "QuestionAnswering",
    "RoutedCausalLM",
    "Seq2SeqLM",
    "SequenceClassifier",
    "TaskModule",
    "TokenClassifier",
    "VocabularyTask",
]
