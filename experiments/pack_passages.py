"""Pack ``passages.txt`` as ``focuslens/assets/passages.jsonl.gz``, in the format of lost-in-the-middle's oracle files.

    python experiments/pack_passages.py

``passages.txt`` has 18 groups of 8 passages. The passages of a group are easily confused: they have the same subject,
the same structure and many common words. Blank lines separate the passages and the headings of the groups:

    ## Heading of a group

    # Title of a passage
    ? question, in lower case and without a question mark
    = answer | another accepted answer
    Text of the passage, on one or more lines.

The first answer stands in the text word for word. No answer stands in another passage. ``tests/unit/data`` checks this.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "experiments" / "passages.txt"
ASSET = ROOT / "focuslens" / "assets" / "passages.jsonl.gz"

_PASSAGE = re.compile(r"# (?P<title>.+)\n\? (?P<question>.+)\n= (?P<answers>.+)\n(?P<text>(?:[^#?=\n].*\n?)+)")


def read_groups(source: str) -> dict[str, list[dict[str, Any]]]:
    """Records of the passages per group, in the order of the source.

    Raises:
        ValueError: If a block is neither a heading nor a passage, if a passage comes before the first heading, or if
            two groups have the same heading.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for block in re.split(r"\n\s*\n", source.strip()):
        if block.startswith("## "):
            if block[3:] in groups:
                raise ValueError(f"there are two groups with the heading {block[3:]!r}")
            groups[block[3:]] = []
        elif not groups:
            raise ValueError(f"this passage comes before the first heading: {block[:80]!r}")
        else:
            groups[list(groups)[-1]].append(_record(block))
    return groups


def _record(block: str) -> dict[str, Any]:
    match = _PASSAGE.fullmatch(block)
    if match is None:
        raise ValueError(f"this block is no passage with a title, a question, answers and a text: {block[:80]!r}")
    passage = {"title": match["title"], "text": " ".join(match["text"].split()), "hasanswer": True, "isgold": True}
    answers = [answer.strip() for answer in match["answers"].split("|")]
    return {"question": match["question"], "answers": answers, "ctxs": [passage]}


def pack(source: str) -> bytes:
    """Content of the asset. The header of the gzip file has neither a time nor a file name."""
    lines = [json.dumps(record) + "\n" for records in read_groups(source).values() for record in records]
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write("".join(lines).encode())
    return buffer.getvalue()


if __name__ == "__main__":
    ASSET.write_bytes(pack(SOURCE.read_text(encoding="utf-8")))
    print(f"{ASSET.relative_to(ROOT)}: {ASSET.stat().st_size} bytes")
