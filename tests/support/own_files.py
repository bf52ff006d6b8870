"""Small files in the forms of known data sets, and the samples that they hold."""

from __future__ import annotations

from typing import Any

__all__ = ["HOTPOTQA", "HOTPOTQA_HUB", "KILT", "KILT_EVIDENCE", "RGB", "SQUAD", "SQUAD_HUB"]

Json = dict[str, Any]

_HOTPOTQA_CONTEXT: list[tuple[str, list[str]]] = [
    ("Ferry", ["The ferry is slow.", " It crosses the harbour."]),
    ("Bridge", ["The bridge was opened in 1932.", " Ada Stone drew it."]),
    ("Ada Stone", ["Ada Stone was born in Leeds."]),
]

HOTPOTQA: list[Json] = [
    {
        "_id": "h1",
        "question": "where was the bridge's designer born?",
        "answer": "Leeds",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [["Bridge", 1], ["Ada Stone", 0]],
        "context": [[title, sentences] for title, sentences in _HOTPOTQA_CONTEXT],
    },
    {
        "_id": "h2",
        "question": "is the ferry slow?",
        "answer": "yes",
        "type": "comparison",
        "level": "easy",
        "supporting_facts": [["Ferry", 0]],
        "context": [[title, sentences] for title, sentences in _HOTPOTQA_CONTEXT],
    },
]

HOTPOTQA_HUB: list[Json] = [
    {
        **{name: row[name] for name in ("question", "answer", "type", "level")},
        "id": row["_id"],
        "supporting_facts": {
            "title": [title for title, _ in row["supporting_facts"]],
            "sent_id": [number for _, number in row["supporting_facts"]],
        },
        "context": {
            "title": [title for title, _ in _HOTPOTQA_CONTEXT],
            "sentences": [sentences for _, sentences in _HOTPOTQA_CONTEXT],
        },
    }
    for row in HOTPOTQA
]

_BRIDGE = "The bridge was opened in 1932 by the mayor."

SQUAD: Json = {
    "version": "v2.0",
    "data": [
        {
            "title": "Harbour_Bridge",
            "paragraphs": [
                {
                    "context": _BRIDGE,
                    "qas": [
                        {
                            "id": "s1",
                            "question": "when was the bridge opened?",
                            "answers": [{"text": "1932", "answer_start": 25}, {"text": "1932", "answer_start": 25}],
                            "is_impossible": False,
                        },
                        {"id": "s2", "question": "who closed the bridge?", "answers": [], "is_impossible": True},
                    ],
                },
                {
                    "context": "The toll is two crowns.",
                    "qas": [
                        {
                            "id": "s3",
                            "question": "what is the toll?",
                            "answers": [{"text": "two crowns", "answer_start": 12}],
                        }
                    ],
                },
            ],
        }
    ],
}

SQUAD_HUB: list[Json] = [
    {
        "id": "s1",
        "title": "Harbour_Bridge",
        "context": _BRIDGE,
        "question": "when was the bridge opened?",
        "answers": {"text": ["1932", "1932"], "answer_start": [25, 25]},
    },
    {
        "id": "s2",
        "title": "Harbour_Bridge",
        "context": _BRIDGE,
        "question": "who closed the bridge?",
        "answers": {"text": [], "answer_start": []},
    },
    {
        "id": "s3",
        "title": "Harbour_Bridge",
        "context": "The toll is two crowns.",
        "question": "what is the toll?",
        "answers": {"text": ["two crowns"], "answer_start": [12]},
    },
]

KILT: list[Json] = [
    {
        "id": "k1",
        "input": "when was the bridge opened?",
        "output": [
            {"answer": "1932", "provenance": [{"wikipedia_id": "77", "title": "Bridge", "start_paragraph_id": 1}]},
            {"answer": "March 1932"},
            {"provenance": [{"wikipedia_id": "77", "title": "Bridge", "start_paragraph_id": 4}]},
        ],
        "meta": {},
        "ctxs": [
            {"id": "9:0", "wikipedia_id": "9", "title": "Ferry", "text": "The ferry is slow."},
            {"id": "77:1", "wikipedia_id": "77", "title": "Bridge", "text": "It was opened in 1932."},
            {"id": "77:4", "wikipedia_id": "77", "title": "Bridge", "text": "The mayor opened it."},
        ],
    }
]

KILT_EVIDENCE: list[Json] = [
    {
        "id": "k2",
        "input": "what is the toll?",
        "output": [
            {
                "answer": "two crowns",
                "provenance": [
                    {
                        "wikipedia_id": "5",
                        "title": "Toll",
                        "meta": {"evidence_span": ["The toll is two crowns.", "It was one crown before."]},
                    }
                ],
            }
        ],
    }
]

RGB: list[Json] = [
    {
        "id": i,
        "query": f"what is the colour of door {i}?",
        "answer": [["green", "deep green"]] if i == 0 else ["red"],
        "positive": [f"Door {i} is painted.", f"The colour of door {i} is known."],
        "negative": [f"Window {n} is grey." for n in range(4)],
    }
    for i in range(3)
]
