"""Export of samples as a task for lm-evaluation-harness, with the same prompts and the same score as in FocusLens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from focuslens.model.stop_strings import checked_stop_strings
from focuslens.prompts.answers import require_answers
from focuslens.prompts.sample import MultiDocSample
from focuslens.util.files import write_atomically

__all__ = ["write_harness_task"]

_CODE = '''"""Data and score of the task beside this file; made by focuslens."""

from pathlib import Path

from datasets import Dataset

from focuslens import sub_exact_match
from focuslens.model.stop_strings import text_before_stop

STOP_STRINGS = {stops!r}


def load(**_):
    return {{"test": Dataset.from_json(str(Path(__file__).with_name("{name}.jsonl")))}}


def score(document, responses):
    response = text_before_stop(responses[0], STOP_STRINGS)
    return {{"em": float(sub_exact_match(response, document["answers"]))}}
'''


def write_harness_task(
    samples: Sequence[MultiDocSample],
    directory: str | Path,
    name: str = "focuslens_multidoc",
    *,
    case: str = "long",
    max_new_tokens: int = 100,
    stop_strings: Sequence[str] = (),
) -> Path:
    """Write a task for lm-evaluation-harness that scores greedy responses by sub-span exact match.

    To run the task on a checkpoint ``steered``, use
    ``lm-eval run --model hf --model_args pretrained=steered --include_path DIRECTORY --tasks NAME``. The resulting
    accuracy is the same as from :func:`focuslens.evaluate` on these samples, if ``stop_strings`` are those of the
    :class:`focuslens.FocusModel` (``model.decoding.stop_strings``). Instruct models need
    ``--apply_chat_template``. The task consists of three files: ``NAME.yaml``, ``NAME.jsonl`` and ``NAME_score.py``.
    ``NAME_score.py`` imports focuslens to compute the score.

    Args:
        samples: Samples of the task.
        directory: Folder for the three files.
        name: Name of the task. It consists of letters, digits and underscores, and does not begin with a digit.
        case: Case of the prompts: ``long``, ``gold`` or ``negative``.
        max_new_tokens: Maximum length of a response, in tokens.
        stop_strings: Texts that end a response. Those with other characters than white space are the ``until`` of the
            task. A harness would also cut an answer at a new line before it, which FocusLens does not. The score
            therefore cuts responses at the others.

    Returns:
        Path of the YAML file.

    Raises:
        ValueError: If there are no samples, if an answer is empty after normalisation, or if the name is not valid.
        TypeError: If ``stop_strings`` is not a sequence of texts.
    """
    if not samples:
        raise ValueError("there are no samples to make a task of")
    if not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII):
        raise ValueError(f"{name!r} is not a valid name of a task: use letters, digits and underscores")
    require_answers(samples, "a task of the harness")
    _require_plain(samples, case)
    stops = checked_stop_strings(stop_strings)
    directory = Path(directory)
    lines = [json.dumps(_document(sample, case), ensure_ascii=False) + "\n" for sample in samples]
    write_atomically(directory / f"{name}.jsonl", "".join(lines).encode())
    write_atomically(directory / f"{name}_score.py", _CODE.format(name=name, stops=stops).encode())
    write_atomically(directory / f"{name}.yaml", _task(name, max_new_tokens, stops).encode())
    return directory / f"{name}.yaml"


def _require_plain(samples: Sequence[MultiDocSample], case: Any) -> None:
    """Raise ``ValueError`` if a prompt is more than a text, of which the harness would run the text alone."""
    for sample in samples:
        around = sample.prompt(case).conversation.describe()
        if around:
            raise ValueError(
                f"the prompt of sample {sample.id!r} has {', '.join(around)} around its text (system prompt, earlier "
                "messages, beginning of the response, arguments of the chat template), which a task of the harness "
                "cannot hold; give a template without them"
            )


def _document(sample: MultiDocSample, case: Any) -> dict[str, Any]:
    return {
        "id": sample.id,
        "prompt": str(sample.prompt(case)),
        "question": sample.question,
        "answers": list(sample.answers),
    }


def _task(name: str, max_new_tokens: int, stops: Sequence[str]) -> str:
    until = [text for text in stops if text.strip()]
    settings = {
        "task": name,
        "custom_dataset": f"!function {name}_score.load",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answers[0]}}",
        "process_results": f"!function {name}_score.score",
        # Given even if it is empty, because the harness otherwise ends a response at an empty line.
        "generation_kwargs": {"until": until, "do_sample": False, "max_gen_toks": max_new_tokens},
        "metric_list": [{"metric": "em", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump(settings, sort_keys=False)
    return re.sub(r"'(!function [\w.]+)'", r"\1", text)
