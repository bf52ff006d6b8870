"""Training says once, and truly, at which site directions can be trained on an architecture."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

import focuslens as fl
from tests.support.architectures import ARCHITECTURES, build_architecture

NO_ROTARY = r"has no rotary embeddings \(its positional embedding is '(standard|alibi)'\), and both sites"


@pytest.fixture(scope="module")
def architecture(checkpoint, tmp_path_factory):
    """``architecture("GPT-2")`` is a bridge to the tiny checkpoint of that name."""
    loaded: dict[str, fl.FocusModel] = {}

    def load(name: str) -> fl.FocusModel:
        if name not in loaded:
            (found,) = [one for one in ARCHITECTURES if one.name == name]
            tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint("llama"))
            directory = build_architecture(found, tmp_path_factory.mktemp("architecture"), tokenizer)
            loaded[name] = fl.FocusModel.from_pretrained(str(directory), backend="bridge", device="cpu", chat=False)
        return loaded[name]

    return load


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("GPT-2", "rotary", NO_ROTARY),
        ("GPT-2", "projection", NO_ROTARY),
        ("BLOOM", "rotary", NO_ROTARY),
        ("Falcon, ALiBi", "projection", NO_ROTARY),
        (
            "GPT-NeoX",
            "rotary",
            r"never fires, so a hook there would have no effect; train with site='projection' \(--site",
        ),
        ("Gemma 3", "projection", r"Gemma3ForCausalLM cannot be differentiated .*; train with site='rotary' \(--site"),
        ("GPT-J", "rotary", "never fires, .*; site='projection' is impossible too, so directions cannot be trained"),
        ("GPT-J", "projection", "does not tell by what it scales .*; site='rotary' is impossible too"),
    ],
)
def test_one_error_says_where_directions_can_be_trained(name, site, message, architecture, samples, monkeypatch):
    model = architecture(name)
    # Before any response is generated.
    monkeypatch.setattr(fl.FocusModel, "generate", lambda *_, **__: pytest.fail("work was done"))
    monkeypatch.setattr(fl.FocusModel, "decode", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        fl.train_focus_directions(model, samples[3:], [(0, 1)], site=site, max_new_tokens=2, epochs=1)


@pytest.mark.parametrize("site", ["rotary", "projection"])
def test_fused_projections_can_be_steered_at_both_sites(site, architecture, samples):
    trained = fl.train_focus_directions(
        architecture("Phi-3"), samples[3:], [(0, 1)], site=site, max_new_tokens=2, epochs=1
    )
    assert trained.heads == ((0, 1),)
