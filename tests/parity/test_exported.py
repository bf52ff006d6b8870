"""FocusLens opens its own exports: the model computes what the exported code computes, with hooks and without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import focuslens as fl
from focuslens.directions.checkpoints import export
from tests.support.tiers import first_quick

HEADS = (fl.Head(0, 2), fl.Head(2, 0), fl.Head(2, 1))


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path_factory, monkeypatch):
    """Copy the code of checkpoints to a temporary cache instead of the user's cache."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


def steering(model: fl.FocusModel, heads: Any = HEADS) -> fl.FocusSteering:
    vectors = torch.randn(len(heads), model.shape.d_head, generator=torch.Generator().manual_seed(3))
    return fl.FocusSteering(fl.FocusDirections(heads, vectors, None, "rotary"), 1.0)


def opened(directory: Path, backend: str, **settings: Any) -> fl.FocusModel:
    settings = {"trust_remote_code": True, "stop_strings": (), **settings}
    options: dict[str, Any] = {"backend": backend, "device": "cpu", **settings}
    return fl.FocusModel.from_pretrained(str(directory), **options)


@pytest.mark.parametrize(
    "name", first_quick(["llama", "llama_rope", "llama_tied", "qwen2", "qwen3", "mistral", "mistral_window"])
)
def test_an_export_is_opened_as_what_its_code_computes(name, backend, load_model, checkpoint, samples, tmp_path):
    base = load_model(name, backend)
    chosen = steering(base)
    export(checkpoint(name), chosen, tmp_path / "out")
    model, prompt = opened(tmp_path / "out", backend), base.encode(samples[0].prompt())
    plain: Any = AutoModelForCausalLM
    own = plain.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        right = own(prompt.tokens[None]).logits[0]
    torch.testing.assert_close(model.logits(prompt), right, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.hooked(prompt.tokens[None])[0], right, atol=1e-4, rtol=0)
    assert (right - base.logits(prompt)).abs().max() > 0.1
    # Interventions and generation act on top of the directions, as they do on the base under steering.
    more = [fl.SplitSoftmax([(1, 2)], 0.1), fl.HeadAblation([(0, 1)])]
    torch.testing.assert_close(model.logits(prompt, more), base.logits(prompt, [chosen, *more]), atol=1e-4, rtol=0)
    expected = base.generate(prompt, [chosen], max_new_tokens=6).tokens.tolist()
    assert model.generate(prompt, max_new_tokens=6).tokens.tolist() == expected


def test_the_directions_stay_and_count_as_weights(backend, load_model, checkpoint, samples, tmp_path):
    base = load_model("llama", backend)
    export(checkpoint("llama"), steering(base), tmp_path / "out")
    export(checkpoint("llama"), steering(base, HEADS[:2]), tmp_path / "fewer")
    model, fewer = opened(tmp_path / "out", backend), opened(tmp_path / "fewer", backend)
    digests = {one.description["weights"] for one in (base, model, fewer)}
    assert len(digests) == 3
    prompt = model.encode(samples[0].prompt())
    before = model.logits(prompt)
    model.hooked.reset_hooks(including_permanent=True)
    assert torch.equal(model.logits(prompt), before)


def test_code_is_not_run_unless_asked_for(backend, load_model, checkpoint, tmp_path, capsys):
    from focuslens.cli.main import main

    export(checkpoint("llama"), steering(load_model("llama", backend)), tmp_path / "out")
    expected = (
        r"out' contains Python code of its own, .* pass trust_remote_code=True \(--trust-remote-code in the shell\), "
        r"or open '.*', its base, and steer it with the directions"
    )
    with pytest.raises(ValueError, match=expected):
        opened(tmp_path / "out", backend, trust_remote_code=False)
    with pytest.raises(ValueError, match="cannot be spread with device_map; give device"):
        opened(tmp_path / "out", "bridge", device=None, device_map="auto")
    command = [
        "generate",
        "--model",
        str(tmp_path / "out"),
        "--backend",
        backend,
        "--device",
        "cpu",
        "--prompt",
        "a question",
    ]
    assert main(command) != 0
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main([*command, "--trust-remote-code", "--max-new-tokens", "2"]) == 0


def test_an_export_whose_code_computes_something_else_is_refused(backend, load_model, checkpoint, tmp_path):
    """The comparison with transformers holds for exports too, and is not taken from the base's record."""
    export(checkpoint("llama"), steering(load_model("llama", backend)), tmp_path / "out")
    code = tmp_path / "out" / "modeling_focus_directions.py"
    # Transformers keeps attention functions by name, so the changed one needs a name of its own.
    changed = code.read_text().replace("query + module.focus_query", "query - module.focus_query")
    code.write_text(changed.replace("focus_directions|", "changed_directions|"))
    with pytest.raises(ValueError, match=r"does not compute .* as transformers does"):
        opened(tmp_path / "out", backend)


def test_other_code_is_run_if_trusted_and_compared(load_model, backend, checkpoint, samples, tmp_path):
    """A bridge runs a checkpoint's own code, and so does transformers. A HookedTransformer cannot, and is refused."""
    shutil.copytree(checkpoint("llama"), tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n"
        "    def forward(self, *args, **kwargs):\n        out = super().forward(*args, **kwargs)\n"
        "        out.logits = -out.logits\n        return out\n"
    )
    prompt, base = samples[0].prompt(), load_model("llama", backend)
    torch.testing.assert_close(
        opened(tmp_path / "own", backend, trust_remote_code=False).logits(prompt), base.logits(prompt)
    )
    if backend == "hooked":
        with pytest.raises(ValueError, match="contains code of its own, and a HookedTransformer would compute"):
            opened(tmp_path / "own", backend)
    else:
        own = opened(tmp_path / "own", backend)
        torch.testing.assert_close(own.logits(prompt), -base.logits(prompt), atol=1e-4, rtol=0)


OWN_ATTENTION = """
import torch
from transformers import LlamaForCausalLM as Base
from transformers.models.llama.modeling_llama import LlamaAttention as BaseAttention


class LlamaAttention(BaseAttention):
    def forward(self, hidden_states, attention_mask=None, **other):
        cache = other.get("cache") or other.get("past_key_values")  # its name since transformers 5.24, and before
        before = cache.get_seq_length(self.layer_idx) if cache is not None else 0
        n = hidden_states.shape[1]
        keys, rows = torch.arange(before + n)[None], torch.arange(before, before + n)[:, None]
        hidden = (keys > rows) | (keys <= rows - 64)
        mask = torch.where(hidden, torch.finfo(torch.float32).min, 0.0)[None, None]
        return super().forward(hidden_states, attention_mask=mask, **other)


class LlamaForCausalLM(Base):
    def __init__(self, config):
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = LlamaAttention(config, i)
        self.post_init()
"""


def test_own_attention_of_a_known_name_is_not_taken_for_the_known_one(checkpoint, tmp_path):
    """The window of 64 keys shows only behind the short prompts with which other checkpoints are compared."""
    directory = shutil.copytree(checkpoint("llama"), tmp_path / "own")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_own.py").write_text(OWN_ATTENTION)
    with pytest.raises(ValueError, match="as transformers does: the logits of a pass of 600 tokens differ"):
        fl.FocusModel.from_pretrained(str(directory), device="cpu", trust_remote_code=True)
