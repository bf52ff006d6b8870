"""Values that differ between tasks, such as ``{"recall": 0.5, "rag": 1}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from focuslens.studies.helmet.tasks import NEEDLE_QA, TASKS, Task

__all__ = ["OTHER", "require_task_names", "value_of"]

T = TypeVar("T")

OTHER = "other"
"""Key of the value for all tasks that no other key names."""


def value_of(values: Mapping[str, T], task: Task) -> T:
    """The value for one task: that of the task itself, of its category, or of :data:`OTHER`, in this order.

    Args:
        values: Values by name of a task (``json_kv`` or ``JSON KV``), by category (``recall``) or :data:`OTHER`.
        task: The task.

    Raises:
        ValueError: If there is no value for the task.
    """
    by_key = {_key(name): value for name, value in values.items()}
    for name in (*_names(task), task.category, OTHER):
        if _key(name) in by_key:
            return by_key[_key(name)]
    raise ValueError(
        f"there is no value for {task.name} in {', '.join(values)}; name the task ({task.dataset}), its category "
        f"({_key(task.category)}) or {OTHER}"
    )


def require_task_names(names: Mapping[str, object]) -> None:
    """Raise ``ValueError`` if a key names neither a task nor a category."""
    every = (*TASKS, NEEDLE_QA)
    known = {_key(name) for task in every for name in (*_names(task), task.category)} | {OTHER}
    for name in names:
        if _key(name) not in known:
            categories = ", ".join(dict.fromkeys(_key(task.category) for task in every))
            raise ValueError(
                f"there is no task and no category {name!r}; categories are {categories}, tasks are "
                f"{', '.join(task.dataset for task in every)}, and {OTHER} stands for the rest"
            )


def _names(task: Task) -> tuple[str, str]:
    return task.dataset, task.name


def _key(name: str) -> str:
    return name.strip().casefold().replace(" ", "_")
