"""The public names and where they live; they are imported from there when they are first used."""

from . import viz as viz
from .anatomy import (
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
from .batch import EncodedPrompt, Generation, Prefix, PromptBatch
from .batching import WorkerLostError
from .cluster import RayPool
from .data.multidoc import MultiDocData, load_multidoc
from .data.needles import (
    Needle,
    NeedleSample,
    load_haystack,
    load_needles,
    needle_samples,
    synthetic_needles,
)
from .data.synthetic import load_synthetic
from .directions import FocusDirections
from .evaluation import (
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
from .execution import Executor, InProcess
from .heads import Head, HeadList, Sparsity, load_ranking, random_heads, rank_heads, sparsity
from .hooks import Cursor, Intervention
from .interventions import FocusSteering, HeadAblation, SplitSoftmax, mean_head_outputs, split_softmax
from .metrics import normalize_answer, sub_exact_match
from .model import FocusModel
from .progress import disable_progress_bars, enable_progress_bars
from .prompts import Document, MultiDocSample, Prompt
from .published import PublishedModel, load_published, load_published_ranking
from .response_attention import ResponseAttention, UnitAttention, response_attention
from .retrieval_heads import RetrievalScores, retrieval_scores
from .scoring import ContextualScores, contextual_scores, contextual_scores_by_case
from .serving import ExportedCheckpoint, FoldedCheckpoint, export, fold, write_harness_task
from .training import TrainingConfig, train_focus_directions
from .windows import WindowAttention, window_attention

__version__: str

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
    "disable_progress_bars",
    "document_scores",
    "enable_progress_bars",
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
