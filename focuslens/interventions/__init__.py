"""Interventions on attention heads. Each intervention is an immutable object that provides TransformerLens hooks."""

from focuslens.interventions.ablation import HeadAblation, mean_head_outputs
from focuslens.interventions.lanes import Lanes
from focuslens.interventions.logit_bias import LogitBias
from focuslens.interventions.pasta import Pasta
from focuslens.interventions.position_calibration import CalibratedAttention, PositionCalibration
from focuslens.interventions.random_focus import RandomFocus
from focuslens.interventions.registry import intervention_from
from focuslens.interventions.self_focus import Choice, SelfFocus
from focuslens.interventions.split_softmax import SplitSoftmax, split_softmax
from focuslens.interventions.spotlight import SpotLight
from focuslens.interventions.steering import FocusSteering
from focuslens.interventions.targets import TargetedSplitSoftmax, TargetedSteering
from focuslens.interventions.votes import HeadVotes

__all__ = [
    "CalibratedAttention",
    "Choice",
    "FocusSteering",
    "HeadAblation",
    "HeadVotes",
    "Lanes",
    "LogitBias",
    "Pasta",
    "PositionCalibration",
    "RandomFocus",
    "SelfFocus",
    "SplitSoftmax",
    "SpotLight",
    "TargetedSplitSoftmax",
    "TargetedSteering",
    "intervention_from",
    "mean_head_outputs",
    "split_softmax",
]
