"""Settings of a YAML file, which need no label: self-focus, biases and other interventions, with values by task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from focuslens.evaluation import Setting
from focuslens.heads import Head
from focuslens.hooks import Intervention
from focuslens.interventions.logit_bias import LogitBias
from focuslens.interventions.pasta import Pasta
from focuslens.interventions.random_focus import RandomFocus
from focuslens.interventions.self_focus import SelfFocus
from focuslens.interventions.split_softmax import SplitSoftmax
from focuslens.interventions.spotlight import SpotLight
from focuslens.studies.helmet.by_task import require_task_names, value_of
from focuslens.studies.helmet.tasks import Task

__all__ = ["WINDOW", "Declared", "declared_settings", "read_declared"]

WINDOW = 64
"""Tokens of the windows from which self-focus chooses in a task whose prompts have no documents."""

_KINDS: Mapping[str, Callable[..., Intervention]] = {
    "self_focus": SelfFocus,
    "random_focus": RandomFocus,
    "split_softmax": SplitSoftmax,
    "logit_bias": LogitBias,
    "pasta": Pasta,
    "spotlight": SpotLight,
}
_PARTED = ("self_focus", "random_focus")
"""Kinds that choose a part of the prompt."""

_WRITTEN = "an entry is a mapping such as {name: self-focus, kind: self_focus, heads: 8, tau: 0.1}"


class Declared:
    """One entry of a settings file.

    Args:
        entry: The entry, with ``name``, ``kind`` and the arguments of the intervention. An argument that is a mapping
            has one value per task or category; see :func:`~focuslens.studies.helmet.by_task.value_of`.
        where: File and place of the entry, for messages.

    Raises:
        ValueError: If the name or the kind is missing or unknown, or a key of a mapping is not a task.
    """

    def __init__(self, entry: Any, where: str) -> None:
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} is {entry!r:.60}; {_WRITTEN}")
        fields = {str(key): value for key, value in cast("Mapping[Any, Any]", entry).items()}
        name, self._kind, self._where = fields.pop("name", ""), fields.pop("kind", None), where
        self.name = name if isinstance(name, str) else ""
        if not self.name or "/" in self.name:
            raise ValueError(
                f"{where} has the name {name!r}, which must be a text that can be part of a folder's name; {_WRITTEN}"
            )
        if self._kind not in _KINDS:
            raise ValueError(f"{where} has the kind {self._kind!r}; it must be one of {', '.join(_KINDS)}")
        self._fields = fields
        for value in fields.values():
            if isinstance(value, Mapping):
                require_task_names(cast("Mapping[str, Any]", value))

    def setting(self, task: Task, ranking: Sequence[Head] | None) -> Setting:
        """The setting for one task.

        Args:
            task: The task.
            ranking: Heads, best first, from which a number of heads is taken; ``None`` without a ranking.

        Raises:
            ValueError: If an argument is wrong, has no value for the task, or needs a ranking.
        """
        arguments = {
            name: value_of(cast("Mapping[str, Any]", value), task) if isinstance(value, Mapping) else value
            for name, value in self._fields.items()
        }
        parameters = {name: value for name, value in arguments.items() if isinstance(value, int | float | str)}
        heads = self._heads(arguments.pop("heads", None), ranking)
        if "focused" in arguments:
            arguments["focused"] = self._heads(arguments["focused"], ranking)
        if self._kind in _PARTED:
            window = arguments.pop("window", WINDOW)
            arguments.setdefault("parts", "document" if task.has_documents else window)
            parameters = {key: value for key, value in parameters.items() if key != "window"}
            parameters["parts"] = arguments["parts"]
        self._check_spans(arguments, task)
        try:
            return Setting(self.name, (_KINDS[self._kind](heads, **arguments),), parameters=parameters)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._where}, {self.name}, for {task.name}: {error}") from error

    def _check_spans(self, arguments: Mapping[str, Any], task: Task) -> None:
        """Raise ``ValueError`` unless the prompts of a task have the span or the parts that an entry names."""
        documents = ["document"] if task.has_documents else []
        argument, possible = "span", ["context", "question", *documents]
        if self._kind in _PARTED:
            argument, possible = "parts", ["a number of tokens", *documents]
        named = arguments.get(argument)
        if named not in possible and not (argument == "parts" and isinstance(named, int)):
            raise ValueError(
                f"{self._where}, {self.name}, for {task.name}: {argument} is {named!r}; it must be "
                f"{' or '.join(possible)}"
            )

    def _heads(self, value: Any, ranking: Sequence[Head] | None) -> Any:
        """A number of best heads, or the heads that are named."""
        if isinstance(value, list):
            return [tuple(head) if isinstance(head, list) else head for head in cast("list[Any]", value)]
        if not isinstance(value, int):
            return value
        if ranking is None:
            raise ValueError(f"{self._where}, {self.name}: heads is {value}, a number of best heads; give --ranking")
        if not 1 <= value <= len(ranking):
            raise ValueError(f"{self._where}, {self.name}: heads is {value}; it must be 1 to {len(ranking)}")
        return list(ranking[:value])


def declared_settings(
    path: Path | None, settings: Mapping[Task, Sequence[Setting]], ranking: Sequence[Head] | None
) -> dict[str, tuple[Setting, ...]]:
    """Settings of each task by the task's name: the given ones, followed by those of a settings file.

    Args:
        path: The file; ``None`` for no file.
        settings: The given settings of each task.
        ranking: Heads, best first, from which numbers of heads are taken; ``None`` without a ranking.

    Raises:
        ValueError: If the file or an entry is wrong, or an entry has the name of a given setting.
    """
    declared = [] if path is None else read_declared(path)
    taken = {setting.name for given in settings.values() for setting in given} & {entry.name for entry in declared}
    if taken:
        raise ValueError(f"{path} has a setting {min(taken)!r}, which is the name of another setting of the run")
    return {
        task.name: (*given, *(entry.setting(task, ranking) for entry in declared)) for task, given in settings.items()
    }


def read_declared(path: Path) -> list[Declared]:
    """Read a settings file: a YAML list, in the order of the rows of the tables.

    Raises:
        ValueError: If the file is not such a list, an entry is wrong, or two entries have the same name.
    """
    try:
        content: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} must be a list of settings; {_WRITTEN}")
    declared = [Declared(entry, f"{path}, entry {i}") for i, entry in enumerate(cast("list[Any]", content), start=1)]
    names = [entry.name for entry in declared]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"{path} has the name {repeated[0]!r} twice; names of settings are unique")
    return declared
