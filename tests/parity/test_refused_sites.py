"""Sites at which directions cannot be added are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import focuslens as fl
from tests.support.architectures import ARCHITECTURES, build_architecture
from tests.support.checkpoints import _tokenizer


@pytest.mark.parametrize("name", ["DeepSeek V2", "DeepSeek V3"])
@pytest.mark.usefixtures("unchecked")
def test_the_projection_site_of_latent_attention_is_refused(name: str, tmp_path: Path, samples) -> None:
    (architecture,) = [one for one in ARCHITECTURES if one.name == name]
    tokenizer = _tokenizer(bos=True, chat_template=None)
    model = fl.FocusModel.from_pretrained(str(build_architecture(architecture, tmp_path, tokenizer)))
    d_head = model.shape.d_head
    directions = fl.FocusDirections([(0, 0)], torch.ones(1, d_head), torch.ones(1, d_head), "projection")
    steering = fl.FocusSteering(directions, 1.0)
    message = (
        r"hook_[qk] has the shape .* directions need \[batch, row, 4 heads, 8 dimensions\]; this attention, such as"
    )
    with pytest.raises(ValueError, match=message):
        model.generate("who?", [steering], max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        fl.evaluate(model, samples, [steering], max_new_tokens=2)
    with pytest.raises(
        ValueError, match="has queries of 24 dimensions at the projection site and heads of 8, as in mul"
    ):
        fl.train_focus_directions(model, samples, [(0, 0)], site="projection", max_new_tokens=2)
