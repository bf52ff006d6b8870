"""Accuracy of responses with confidence intervals, under one setting or a grid of settings."""

from focuslens.evaluation.saved_sweeps import load_sweep
from focuslens.evaluation.settings import BASELINES, best_setting, split_softmax_settings, steering_settings
from focuslens.evaluation.sweeps import Evaluation, Setting, Sweep, evaluate, run_sweep
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
    resampled_means,
)

__all__ = [
    "BASELINES",
    "BUDGET_PARTS",
    "AttentionBudget",
    "Attribution",
    "DocumentScores",
    "Evaluation",
    "Interval",
    "McNemar",
    "OtherResultsError",
    "Setting",
    "Sweep",
    "attention_budget",
    "best_setting",
    "bootstrap_mean",
    "document_scores",
    "evaluate",
    "load_sweep",
    "mcnemar_exact",
    "percentile_interval",
    "read_records",
    "resampled_means",
    "run_sweep",
    "split_softmax_settings",
    "steering_settings",
]
