"""Interventions on attention heads. Each intervention is an immutable object that provides TransformerLens hooks."""

from focuslens.interventions.ablation import HeadAblation, mean_head_outputs
from focuslens.interventions.lanes import Lanes
from focuslens.interventions.registry import intervention_from
from focuslens.interventions.self_focus import Choice, SelfFocus
from focuslens.interventions.split_softmax import SplitSoftmax, split_softmax
from focuslens.interventions.steering import FocusSteering

__all__ = [
    "Choice",
    "FocusSteering",
    "HeadAblation",
    "Lanes",
    "SelfFocus",
    "SplitSoftmax",
    "intervention_from",
    "mean_head_outputs",
    "split_softmax",
]
