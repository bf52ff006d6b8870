"""The picture of answers and their documents shows every share, and is safe for any text."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens import viz
from tests.support.pages import loads

HOSTILE = "</li></ol><script>alert(1)</script>"


def samples() -> list[fl.MultiDocSample]:
    documents = tuple(fl.Document(title, f"{HOSTILE} text") for title in (HOSTILE, "", "third"))
    return [
        fl.MultiDocSample(f"{HOSTILE}?", ("x",), documents, 1, "q1"),
        fl.MultiDocSample("why?", ("x",), documents[:2], None, "q2", "n"),
        fl.MultiDocSample("how?", ("x",), documents, None, "q3", "n"),
    ]


def sources(**changes: Any) -> fl.AnswerSources:
    fields: dict[str, Any] = {
        "scores": (torch.tensor([0.1, 0.2, 0.1]), torch.tensor([0.26, 0.24]), torch.full((3,), math.nan)),
        "heads": (fl.Head(0, 1),),
        "sample_ids": tuple(sample.id for sample in samples()),
        "responses": (HOSTILE, "because", ""),
    }
    return fl.AnswerSources(**{**fields, **changes})


def test_every_document_has_its_bar_and_the_source_is_marked() -> None:
    lengths = [[5, 3, 2], [1, 1], [1, 1, 1]]
    view = viz.answer_view(sources(), samples(), lengths=lengths, links={"q1@1": "views/001.html"})
    assert not loads(view.html)
    assert "<script" not in view.html
    assert view.html.count("<article") == 3
    widths = [float(width) for width in re.findall(r'class="fill" style="width:([\d.]+)%', view.html)]
    assert widths == [25, 50, 25, 52, 48, 0, 0, 0]
    even = [float(left) for left in re.findall(r'class="even" style="left:([\d.]+)%', view.html)]
    assert even == pytest.approx([50, 30, 20, 50, 50, 33.3, 33.3, 33.3])
    marked = re.findall(r'<li class="source"><span class="number">(\d)</span>', view.html)
    assert marked == ["2", "1"]
    assert view.html.count(" ★</summary>") == 1
    assert '<a href="views/001.html">token by token</a>' in view.html
    assert '"soft">from Document [2], 50%, 25 points ahead' in view.html
    assert '"soft">unclear: from Document [1], 52%, 4 points ahead' in view.html
    assert "The source is a relevant document in 1 of 1 responses to samples with one (★)." in view.html
    assert "The source of 1 responses is unclear" in view.html
    assert "1 responses are empty, or pay no attention to any document, and have no source" in view.html
    assert "an empty response" in view.html


def test_long_runs_show_their_first_samples() -> None:
    view = viz.answer_view(sources(), samples(), most=2, facts={"Model": HOSTILE})
    assert view.html.count("<article") == 2
    assert "The page shows the first 2 of 3 samples." in view.html
    assert "<script" not in view.html
    assert 'class="even"' not in view.html


def test_other_samples_are_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match="the samples are not those of the sources"):
        viz.answer_view(sources(), samples()[::-1])
    with pytest.raises(ValueError, match="lengths do not have one number of tokens per document"):
        viz.answer_view(sources(), samples(), lengths=[[1], [1, 1], [1, 1, 1]])
    with pytest.raises(TypeError, match=r"sources is a list; it must be a AnswerSources: scores.sources\(heads\)"):
        viz.answer_view([], samples())  # pyright: ignore[reportArgumentType]
