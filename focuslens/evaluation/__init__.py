"""Accuracy of responses with confidence intervals, under one setting or a grid of settings."""

from focuslens.evaluation.document_choices import Choices, choices
from focuslens.evaluation.effects_of_documents import DocumentEffects, document_effects
from focuslens.evaluation.faithfulness import Faithfulness
from focuslens.evaluation.saved_sweeps import load_sweep
from focuslens.evaluation.setting import Method, Setting
from focuslens.evaluation.settings import BASELINES, best_setting, split_softmax_settings, steering_settings
from focuslens.evaluation.sweeps import Evaluation, Sweep, evaluate, run_sweep
from focuslens.scores.document_scores import (
    BUDGET_PARTS,
    AttentionBudget,
    Attribution,
    DocumentScores,
    attention_budget,
    document_scores,
)
from focuslens.util.record_file import read_records
from focuslens.util.refused_runs import OtherResultsError
from focuslens.util.statistics import (
    Interval,
    McNemar,
    bootstrap_mean,
    mcnemar_exact,
    percentile_interval,
    rank_correlation,
    resampled_means,
    sign_flip_exact,
)

__all__ = [
    "BASELINES",
    "BUDGET_PARTS",
    "AttentionBudget",
    "Attribution",
    "Choices",
    "DocumentEffects",
    "DocumentScores",
    "Evaluation",
    "Faithfulness",
    "Interval",
    "McNemar",
    "Method",
    "OtherResultsError",
    "Setting",
    "Sweep",
    "attention_budget",
    "best_setting",
    "bootstrap_mean",
    "choices",
    "document_effects",
    "document_scores",
    "evaluate",
    "load_sweep",
    "mcnemar_exact",
    "percentile_interval",
    "rank_correlation",
    "read_records",
    "resampled_means",
    "run_sweep",
    "sign_flip_exact",
    "split_softmax_settings",
    "steering_settings",
]
