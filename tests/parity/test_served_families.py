"""Steered checkpoints of many families, run by plain transformers, have FocusLens's steered logits and responses.

The table in the documentation lists the outcomes. ``FOCUSLENS_WRITE_TABLES=1`` writes it anew.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import focuslens as fl
from focuslens.directions.checkpoints import modeling_focus_directions
from focuslens.directions.checkpoints.families import FAMILIES
from tests.support.architectures import ARCHITECTURES, Architecture, build_architecture
from tests.support.paths import ROOT
from tests.support.versions import HAS_HOOKED

PAGE = ROOT / "docs" / "serving.md"
START, END = "<!-- table: written by a test -->\n", "<!-- end of the table -->\n"
TOLERANCE = 1e-3
"""Largest difference between logits whose standard deviation is about 1.6."""

HEADS = (fl.Head(0, 2), fl.Head(2, 0), fl.Head(2, 1))
WAYS = ("fold", "export, projection", "export, rotary")
NAMES = (
    *("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3-MoE", "Gemma", "Gemma 2", "Gemma 3", "OLMo", "OLMo 2", "OLMo 3"),
    *("OLMoE", "Granite", "GraniteMoE", "SmolLM3", "GLM", "GLM-4", "Seed-OSS", "Arcee", "Apertus", "EXAONE 4", "Phi-3"),
    *(
        "gpt-oss",
        "Llama 4",
        "Nemotron",
        "StarCoder 2",
        "ERNIE 4.5",
        "Ministral 3",
        "StableLM",
        "Qwen2-MoE",
        "GLM-4-MoE",
    ),
    *("Mixtral", "GPT-2"),
)
"""Architectures of the table. The last two are those of families that are refused."""

QUICK = ("Gemma 2", "Gemma 3", "OLMo 2", "SmolLM3", "GLM", "Phi-3")


@pytest.fixture(autouse=True, scope="module")
def _modules_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Copy the code of checkpoints to a temporary cache instead of the user's cache."""
    import transformers.dynamic_module_utils as dynamic

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@dataclass(frozen=True)
class Steered:
    """A tiny checkpoint, and what FocusLens computes on it."""

    directory: Path
    model: fl.FocusModel

    @classmethod
    def of(cls, name: str, directory: Path, tokenizer: Any) -> Steered:
        (architecture,) = (one for one in ARCHITECTURES if one.name == name)
        return cls(*cls._opened(architecture, directory, tokenizer))

    @staticmethod
    def _opened(architecture: Architecture, directory: Path, tokenizer: Any) -> tuple[Path, fl.FocusModel]:
        build_architecture(architecture, directory, tokenizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = fl.FocusModel.from_pretrained(str(directory), device="cpu", chat=False, stop_strings=())
        return directory, fl.FocusModel(model.backend, model.tokenizer, chat=False, stop_strings=(), stop_tokens=())

    def steering(self, site: Any) -> fl.FocusSteering:
        noise = torch.randn(2, len(HEADS), self.model.shape.d_head, generator=torch.Generator().manual_seed(3))
        return fl.FocusSteering(fl.FocusDirections(HEADS, noise[0], noise[1], site), 1.5)

    def written(self, way: str, out: Path) -> tuple[fl.FocusSteering, Path]:
        """The steering, and the steered checkpoint."""
        steering = self.steering("rotary" if way.endswith("rotary") else "projection")
        write: Callable[..., Any] = fl.fold if way == "fold" else fl.export
        return steering, write(self.directory, steering, out).directory

    def difference(self, way: str, out: Path) -> float:
        """Largest difference to the logits of a steered checkpoint in plain transformers. Responses must be equal."""
        steering, written = self.written(way, out)
        loading: Any = AutoModelForCausalLM
        own, info = loading.from_pretrained(written, output_loading_info=True, trust_remote_code=way != "fold")
        assert not any(info.values()), info  # no weights are missing or unused
        largest = 0.0
        for length in (60, 21):
            tokens = 5 + (torch.arange(length) * 31) % 490
            with torch.no_grad():
                logits = own.eval()(tokens[None]).logits[0]
            ours = self.model.logits(tokens, [steering])
            assert (ours - self.model.logits(tokens)).abs().max() > 0.1
            largest = max(largest, float((logits - ours).abs().max()))
            prompt = fl.EncodedPrompt(tokens, {})
            response = self.model.generate(prompt, [steering], max_new_tokens=6).tokens.tolist()
            made = own.generate(tokens[None], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2)
            assert made[0, length:].tolist() == response
        return largest


def outcome(steered: Steered, way: str, out: Path) -> tuple[float, str]:
    """Difference of a steered checkpoint, or the reason of a refusal."""
    try:
        return steered.difference(way, out), ""
    except ValueError as error:
        return 0.0, str(error).replace(str(steered.directory), "the checkpoint")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Any) -> Any:
    return cast("Any", AutoTokenizer).from_pretrained(checkpoint("llama"))


@pytest.mark.parametrize("name", QUICK)
def test_a_steered_checkpoint_has_the_steered_logits(name: str, tokenizer: Any, tmp_path: Path) -> None:
    steered = Steered.of(name, tmp_path / "base", tokenizer)
    site_and_code = "export, projection" if name == "Phi-3" else "fold"
    assert steered.difference(site_and_code, tmp_path / "projection") < TOLERANCE
    assert steered.difference("export, rotary", tmp_path / "rotary") < TOLERANCE


def test_folding_adds_zeros_where_the_entry_of_biases_adds_them_too(tokenizer: Any, tmp_path: Path) -> None:
    """Most checkpoints of StarCoder 2 have all biases; without them, the MLPs get zeros."""
    bare = Architecture("bare", "no biases", "Starcoder2Config", {"use_bias": False})
    steered = Steered(*Steered._opened(bare, tmp_path / "base", tokenizer))  # pyright: ignore[reportPrivateUsage]
    assert steered.difference("fold", tmp_path / "folded") < TOLERANCE


def test_focuslens_opens_an_export_with_biases(tokenizer: Any, tmp_path: Path) -> None:
    for name in ("Phi-3", "Mistral"):
        steered = Steered.of(name, tmp_path / name, tokenizer)
        steering, written = steered.written("export, projection", tmp_path / f"{name} out")
        opened = fl.FocusModel.from_pretrained(str(written), device="cpu", trust_remote_code=True)
        tokens = 5 + (torch.arange(40) * 31) % 490
        expected = steered.model.logits(tokens, [steering])
        torch.testing.assert_close(opened.logits(tokens), expected, atol=TOLERANCE, rtol=0)


def test_every_family_of_the_code_is_one_that_can_be_exported() -> None:
    exported = {kind: family for kind, family in FAMILIES.items() if not family.converted}
    configs = {family.prefix: family.config or family.prefix for family in exported.values()}
    assert configs == modeling_focus_directions.CONFIGS
    for kind, family in exported.items():
        made = getattr(modeling_focus_directions, f"Steered{family.config_class}")
        assert made.model_type == f"steered_{kind}"
        assert getattr(modeling_focus_directions, f"Steered{family.model_class}").config_class is made
    with pytest.raises(AttributeError, match="has no attribute 'SteeredBertForCausalLM'"):
        _ = modeling_focus_directions.SteeredBertForCausalLM


@pytest.fixture(scope="module")
def outcomes(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[float, str]]]:
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for name in NAMES:
        place = tmp_path_factory.mktemp("family")
        steered = Steered.of(name, place / "base", tokenizer)
        found[name] = {way: outcome(steered, way, place / way) for way in WAYS}
    return found


@pytest.mark.slow
def test_every_family_is_written_or_refused(outcomes: dict[str, dict[str, tuple[float, str]]]) -> None:
    wrong = {(name, way) for name, ways in outcomes.items() for way, (gap, _) in ways.items() if gap > TOLERANCE}
    assert wrong == set()
    in_some_way = [name for name, ways in outcomes.items() if any(not reason for _, reason in ways.values())]
    assert in_some_way == list(NAMES[:-2])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_HOOKED, reason="the page lists the outcomes with TransformerLens 3")
def test_the_documentation_lists_the_outcomes(outcomes: dict[str, dict[str, tuple[float, str]]]) -> None:
    head, rest = PAGE.read_text().split(START)
    old, tail = rest.split(END)
    rows = table_of(outcomes)
    if os.environ.get("FOCUSLENS_WRITE_TABLES"):
        PAGE.write_text(head + START + "\n" + "\n".join(rows) + "\n\n" + END + tail)
        return
    assert [row.strip() for row in old.strip().splitlines()] == rows


def table_of(outcomes: dict[str, dict[str, tuple[float, str]]]) -> list[str]:
    lines = ["| Architecture | fold | export, projection site | export, rotary site |", "|---|---|---|---|"]
    for name, ways in outcomes.items():
        cells = " | ".join("equal" if not reason else short(reason) for _, reason in ways.values())
        lines.append(f"| {name} | {cells} |")
    return lines


def short(reason: str) -> str:
    """The reason of a refusal in a few words."""
    for text, words in (
        ("use fold, which needs no code", "use fold"),
        ("has no biases, and Llama", "no: a window, and no biases"),
        ("whose code adds biases", "no: no biases"),
        ("its experts' weights", "no: converted experts"),
        ("is of the type", "no: another family"),
    ):
        if text in " ".join(reason.split()):
            return words
    return reason
