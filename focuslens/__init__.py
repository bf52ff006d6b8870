"""Contextual heads, split-softmax and focus directions: where a language model looks, and how to change it."""

from focuslens.batch import EncodedPrompt, Generation, Prefix, PromptBatch
from focuslens.data.multidoc import MultiDocData, load_multidoc
from focuslens.data.synthetic import load_synthetic
from focuslens.directions import FocusDirections
from focuslens.evaluation import (
    Evaluation,
    Interval,
    McNemar,
    Setting,
    Sweep,
    evaluate,
    run_sweep,
    split_softmax_settings,
    steering_settings,
)
from focuslens.heads import Head, Sparsity, load_ranking, random_heads, rank_heads, sparsity
from focuslens.hooks import Cursor, Intervention
from focuslens.interventions import FocusSteering, HeadAblation, SplitSoftmax, mean_head_outputs, split_softmax
from focuslens.metrics import normalize_answer, sub_exact_match
from focuslens.model import FocusModel
from focuslens.prompts import Document, MultiDocSample, Prompt
from focuslens.scoring import ContextualScores, contextual_scores, contextual_scores_by_case
from focuslens.training import TrainingConfig, train_focus_directions

__version__ = "0.1.0"

__all__ = [
    "ContextualScores",
    "Cursor",
    "Document",
    "EncodedPrompt",
    "Evaluation",
    "FocusDirections",
    "FocusModel",
    "FocusSteering",
    "Generation",
    "Head",
    "HeadAblation",
    "Interval",
    "Intervention",
    "McNemar",
    "MultiDocData",
    "MultiDocSample",
    "Prefix",
    "Prompt",
    "PromptBatch",
    "Setting",
    "Sparsity",
    "SplitSoftmax",
    "Sweep",
    "TrainingConfig",
    "contextual_scores",
    "contextual_scores_by_case",
    "evaluate",
    "load_multidoc",
    "load_ranking",
    "load_synthetic",
    "mean_head_outputs",
    "normalize_answer",
    "random_heads",
    "rank_heads",
    "run_sweep",
    "sparsity",
    "split_softmax",
    "split_softmax_settings",
    "steering_settings",
    "sub_exact_match",
    "train_focus_directions",
]
