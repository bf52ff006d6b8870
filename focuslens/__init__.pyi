"""Public names of the package and the modules that define them. Each name is imported on first use."""

from . import viz as viz
from .data.distractors import with_distractors
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
from .directions.anatomy import (
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
from .directions.checkpoints import ExportedCheckpoint, FoldedCheckpoint, export, fold
from .directions.published import PublishedModel, load_published, load_published_ranking
from .directions.training import TrainingConfig, train_focus_directions
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
from .evaluation.harness import write_harness_task
from .heads import Head, HeadList, Sparsity, load_ranking, random_heads, rank_heads, sparsity
from .hooks import Cursor, HookTarget, Intervention
from .interventions import (
    Choice,
    FocusSteering,
    HeadAblation,
    SelfFocus,
    SplitSoftmax,
    mean_head_outputs,
    split_softmax,
)
from .interventions.directions import FocusDirections
from .model.batching import WorkerLostError
from .model.cluster import RayPool
from .model.execution import Executor, InProcess
from .model.focus_model import FocusModel
from .model.generation import Generation, Prefix
from .prompts.answers import normalize_answer, sub_exact_match
from .prompts.batch import EncodedPrompt, PromptBatch
from .prompts.prompt import Prompt
from .prompts.sample import Document, MultiDocSample
from .scores.contextual_scores import ContextualScores, contextual_scores, contextual_scores_by_case
from .scores.question_scores import QuestionScores, Reranking, question_scores, rerank
from .scores.response_attention import ResponseAttention, UnitAttention, response_attention
from .scores.retrieval_scores import RetrievalScores, retrieval_scores
from .scores.window_attention import WindowAttention, window_attention
from .util.progress import disable_progress_bars, enable_progress_bars

__version__: str

__all__ = [
    "AttentionBudget",
    "Attribution",
    "Choice",
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
    "HookTarget",
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
    "QuestionScores",
    "RayPool",
    "Reranking",
    "ResponseAttention",
    "RetrievalScores",
    "SelfFocus",
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
    "question_scores",
    "random_heads",
    "rank_heads",
    "rerank",
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
    "with_distractors",
    "write_harness_task",
]
