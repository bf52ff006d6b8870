"""The sixteen HELMET tasks in the paper: names, categories and metrics."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CATEGORIES", "NEEDLE_QA", "TASKS", "Task", "task_of"]


@dataclass(frozen=True)
class Task:
    """A HELMET task, which is one column in the paper's tables.

    Attributes:
        name: Name of the column.
        dataset: HELMET's name for the data set, or the beginning of this name (``icl_nlu`` for
            ``icl_nlu_510shot_balance``).
        category: Category of the task in the tables of averages.
        metric: HELMET's name for the metric in HELMET's tables and in the paper's tables.
    """

    name: str
    dataset: str
    category: str
    metric: str

    @property
    def has_documents(self) -> bool:
        """Whether the contexts are retrieved passages, which are the documents of the prompts."""
        return self.category in ("RAG", "Re-ranking")


TASKS = (
    Task("MK Needle", "ruler_niah_mk_2", "Recall", "ruler_recall"),
    Task("MK UUID", "ruler_niah_mk_3", "Recall", "ruler_recall"),
    Task("MV", "ruler_niah_mv", "Recall", "ruler_recall"),
    Task("JSON KV", "json_kv", "Recall", "substring_exact_match"),
    Task("NQ", "kilt_nq", "RAG", "substring_exact_match"),
    Task("TriviaQA", "kilt_triviaqa", "RAG", "substring_exact_match"),
    Task("HotpotQA", "kilt_hotpotqa", "RAG", "substring_exact_match"),
    Task("PopQA", "kilt_popqa_3", "RAG", "substring_exact_match"),
    Task("MS MARCO", "msmarco_rerank_psg", "Re-ranking", "NDCG@10"),
    Task("TREC Coarse", "icl_trec_coarse", "ICL", "exact_match"),
    Task("TREC Fine", "icl_trec_fine", "ICL", "exact_match"),
    Task("BANKING77", "icl_banking77", "ICL", "exact_match"),
    Task("CLINC150", "icl_clinic150", "ICL", "exact_match"),
    Task("NLU", "icl_nlu", "ICL", "exact_match"),
    Task("Infbench QA", "infbench_qa_eng", "Long QA", "rougeL_f1"),
    Task("Infbench MC", "infbench_choice_eng", "Long QA", "exact_match"),
)
"""The paper's tasks, in the order of the paper's tables."""

NEEDLE_QA = Task("Needle QA", "ruler_qa_1", "Facts", "substring_exact_match")
"""Task for the embedded demo model: questions about facts in documents, in RULER's format. It is not in the paper."""

CATEGORIES = tuple(dict.fromkeys(task.category for task in (*TASKS, NEEDLE_QA)))
"""Categories of the tasks: first those in the paper, in the order of the paper's tables, and then ``Facts``."""

_OTHERS = (
    *("alce_", "infbench_sum", "multi_lexsum", "narrativeqa", "ruler_"),
    *("countdown_", "html_to_tsv_", "path_traversal_", "pseudo_to_code_", "tom_tracking_", "travel_planning_"),
)
"""Name prefixes of the data sets in HELMET that the paper does not use.

For some of these data sets, a second model judges the responses. Others need long responses (LongProc).
"""


def task_of(dataset: str) -> Task | None:
    """Task of a HELMET data set, or ``None`` if no task in this module uses the data set.

    Raises:
        ValueError: If HELMET has no data set with this name.
    """
    for task in (*TASKS, NEEDLE_QA):
        if dataset == task.dataset or dataset.startswith(f"{task.dataset}_"):
            return task
    if dataset.startswith(_OTHERS):
        return None
    known = ", ".join(task.dataset for task in (*TASKS, NEEDLE_QA))
    raise ValueError(
        f"there is no task {dataset!r}; the paper's tasks begin with {known} (in-context learning and InfiniteBench "
        "end with a size, as in HELMET's configs/: icl_nlu_510shot_balance)"
    )
