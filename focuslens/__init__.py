"""Contextual heads, split-softmax and focus directions: where a language model looks, and how to change it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from focuslens.anatomy import (
    Decomposition,
    HeadKeys,
    collect_keys,
    decompose,
    decompose_heads,
    frequency_energy,
    logit_bias,
    position_bias,
    token_preferences,
)
from focuslens.batch import EncodedPrompt, Generation, Prefix, PromptBatch
from focuslens.batching import WorkerLostError
from focuslens.cluster import RayPool
from focuslens.data.multidoc import MultiDocData, load_multidoc
from focuslens.data.needles import (
    Needle,
    NeedleSample,
    load_haystack,
    load_needles,
    needle_samples,
    synthetic_needles,
)
from focuslens.data.synthetic import load_synthetic
from focuslens.directions import FocusDirections
from focuslens.evaluation import (
    AttentionBudget,
    Attribution,
    DocumentScores,
    Evaluation,
    Interval,
    McNemar,
    Setting,
    Sweep,
    attention_budget,
    best_setting,
    document_scores,
    evaluate,
    load_sweep,
    run_sweep,
    split_softmax_settings,
    steering_settings,
)
from focuslens.execution import Executor, InProcess
from focuslens.heads import Head, HeadList, Sparsity, load_ranking, random_heads, rank_heads, sparsity
from focuslens.hooks import Cursor, Intervention
from focuslens.interventions import FocusSteering, HeadAblation, SplitSoftmax, mean_head_outputs, split_softmax
from focuslens.metrics import normalize_answer, sub_exact_match
from focuslens.model import FocusModel
from focuslens.prompts import Document, MultiDocSample, Prompt
from focuslens.published import PublishedModel, load_published, load_published_ranking
from focuslens.response_attention import ResponseAttention, UnitAttention, response_attention
from focuslens.retrieval_heads import RetrievalScores, retrieval_scores
from focuslens.scoring import ContextualScores, contextual_scores, contextual_scores_by_case
from focuslens.serving import ExportedCheckpoint, FoldedCheckpoint, export, fold, write_harness_task
from focuslens.training import TrainingConfig, train_focus_directions
from focuslens.windows import WindowAttention, window_attention

if TYPE_CHECKING:
    from focuslens import viz as viz

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``fl.viz`` is there without an import of its own; what it draws with is imported when it is first asked for."""
    if name == "viz":
        return import_module("focuslens.viz")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AttentionBudget",
    "Attribution",
    "ContextualScores",
    "Cursor",
    "Decomposition",
    "Document",
    "DocumentScores",
    "EncodedPrompt",
    "Evaluation",
    "Executor",
    "ExportedCheckpoint",
    "FocusDirections",
    "FocusModel",
    "FocusSteering",
    "FoldedCheckpoint",
    "Generation",
    "Head",
    "HeadAblation",
    "HeadKeys",
    "HeadList",
    "InProcess",
    "Interval",
    "Intervention",
    "McNemar",
    "MultiDocData",
    "MultiDocSample",
    "Needle",
    "NeedleSample",
    "Prefix",
    "Prompt",
    "PromptBatch",
    "PublishedModel",
    "RayPool",
    "ResponseAttention",
    "RetrievalScores",
    "Setting",
    "Sparsity",
    "SplitSoftmax",
    "Sweep",
    "TrainingConfig",
    "UnitAttention",
    "WindowAttention",
    "WorkerLostError",
    "attention_budget",
    "best_setting",
    "collect_keys",
    "contextual_scores",
    "contextual_scores_by_case",
    "decompose",
    "decompose_heads",
    "document_scores",
    "evaluate",
    "export",
    "fold",
    "frequency_energy",
    "load_haystack",
    "load_multidoc",
    "load_needles",
    "load_published",
    "load_published_ranking",
    "load_ranking",
    "load_sweep",
    "load_synthetic",
    "logit_bias",
    "mean_head_outputs",
    "needle_samples",
    "normalize_answer",
    "position_bias",
    "random_heads",
    "rank_heads",
    "response_attention",
    "retrieval_scores",
    "run_sweep",
    "sparsity",
    "split_softmax",
    "split_softmax_settings",
    "steering_settings",
    "sub_exact_match",
    "synthetic_needles",
    "token_preferences",
    "train_focus_directions",
    "window_attention",
    "write_harness_task",
]
