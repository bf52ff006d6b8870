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
from .data.own_samples import OwnData, load_samples
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
from .directions.attention_shift import attention_shift
from .directions.checkpoints import ExportedCheckpoint, FoldedCheckpoint, export, fold
from .directions.published import PublishedModel, load_published, load_published_ranking
from .directions.training import TrainingConfig, train_focus_directions
from .evaluation import (
    AttentionBudget,
    Attribution,
    Choices,
    DocumentEffects,
    DocumentScores,
    Evaluation,
    Faithfulness,
    Interval,
    McNemar,
    Setting,
    Sweep,
    attention_budget,
    best_setting,
    choices,
    document_effects,
    document_scores,
    evaluate,
    load_sweep,
    run_sweep,
    split_softmax_settings,
    steering_settings,
)
from .evaluation.harness import write_harness_task
from .evaluation.methods import ContextAwareDecoding, DocumentFilter, DySCO, SelfElicit
from .heads import (
    Head,
    HeadKind,
    HeadList,
    Sparsity,
    load_ranking,
    random_heads,
    rank_heads,
    save_ranking,
    sparsity,
    whole_prompt_heads,
)
from .hooks import Cursor, HookTarget, Intervention
from .interventions import (
    CalibratedAttention,
    Choice,
    FocusSteering,
    HeadAblation,
    HeadVotes,
    LogitBias,
    Pasta,
    PositionCalibration,
    RandomFocus,
    SelfFocus,
    SplitSoftmax,
    SpotLight,
    TargetedSplitSoftmax,
    TargetedSteering,
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
from .prompts.template import PromptTemplate
from .scores.answer_sources import AnswerSources
from .scores.contextual_scores import ContextualScores, contextual_scores, contextual_scores_by_case
from .scores.given_attentions import document_scores_from_attentions, scores_from_attentions
from .scores.question_scores import QuestionScores, Reranking, question_scores, rerank
from .scores.relevant_documents import relevant_scores
from .scores.response_attention import ResponseAttention, UnitAttention, response_attention
from .scores.retrieval_scores import RetrievalScores, retrieval_scores
from .scores.window_attention import WindowAttention, window_attention
from .util.progress import disable_progress_bars, enable_progress_bars

__version__: str

__all__ = [
    "AnswerSources",
    "AttentionBudget",
    "Attribution",
    "CalibratedAttention",
    "Choice",
    "Choices",
    "ContextAwareDecoding",
    "ContextualScores",
    "Cursor",
    "Decomposition",
    "Document",
    "DocumentEffects",
    "DocumentFilter",
    "DocumentScores",
    "DySCO",
    "EncodedPrompt",
    "Evaluation",
    "Executor",
    "ExportedCheckpoint",
    "Faithfulness",
    "FocusDirections",
    "FocusModel",
    "FocusSteering",
    "FoldedCheckpoint",
    "Generation",
    "Head",
    "HeadAblation",
    "HeadKeys",
    "HeadKind",
    "HeadList",
    "HeadVotes",
    "HookTarget",
    "InProcess",
    "Interval",
    "Intervention",
    "LogitBias",
    "McNemar",
    "MultiDocData",
    "MultiDocSample",
    "Needle",
    "NeedleSample",
    "OwnData",
    "Pasta",
    "PositionCalibration",
    "Prefix",
    "Prompt",
    "PromptBatch",
    "PromptTemplate",
    "PublishedModel",
    "QuestionScores",
    "RandomFocus",
    "RayPool",
    "Reranking",
    "ResponseAttention",
    "RetrievalScores",
    "SelfElicit",
    "SelfFocus",
    "Setting",
    "Sparsity",
    "SplitSoftmax",
    "SpotLight",
    "Sweep",
    "TargetedSplitSoftmax",
    "TargetedSteering",
    "TrainingConfig",
    "UnitAttention",
    "WindowAttention",
    "WorkerLostError",
    "attention_budget",
    "attention_shift",
    "best_setting",
    "choices",
    "collect_keys",
    "contextual_scores",
    "contextual_scores_by_case",
    "decompose",
    "decompose_heads",
    "disable_progress_bars",
    "document_effects",
    "document_scores",
    "document_scores_from_attentions",
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
    "load_samples",
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
    "relevant_scores",
    "rerank",
    "response_attention",
    "retrieval_scores",
    "run_sweep",
    "save_ranking",
    "scores_from_attentions",
    "sparsity",
    "split_softmax",
    "split_softmax_settings",
    "steering_settings",
    "sub_exact_match",
    "synthetic_needles",
    "token_preferences",
    "train_focus_directions",
    "whole_prompt_heads",
    "window_attention",
    "with_distractors",
    "write_harness_task",
]
