"""Options of commands for data and prompts of the user: ``--columns``, ``--form`` and ``--template``.

``focuslens --help`` imports this module. The module therefore imports no slow libraries.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from focuslens.data.own_samples import OwnForm
    from focuslens.prompts.template import PromptTemplate

__all__ = ["add_own_data", "columns", "form_of_further_data", "own_form_of", "template_of"]

_FORMS = ("columns", "hotpotqa", "squad", "kilt", "rgb")


def columns(text: str) -> dict[str, str | None]:
    """Parse names of columns, such as ``question=query,documents=contexts``. A part without a name is not read.

    Raises:
        argparse.ArgumentTypeError: If the text is of another form, or names a part twice.
    """
    named: dict[str, str | None] = {}
    for entry in text.split(","):
        part, equals, name = (piece.strip() for piece in entry.partition("="))
        if not (part and equals):
            raise argparse.ArgumentTypeError(f"{entry!r} is not PART=COLUMN, as in question=query,documents=contexts")
        if part in named:
            raise argparse.ArgumentTypeError(
                f"{part!r} is named twice; join several columns with +: documents=doc1+doc2"
            )
        named[part] = name or None
    return named


def add_own_data(group: Any) -> None:
    """Add ``--columns`` and ``--form``."""
    group.add_argument(
        "--columns",
        type=columns,
        metavar="PART=COLUMN,...",
        help="columns of a file of your own (.jsonl, .json, .csv, .tsv, .parquet), such as "
        "question=query,documents=contexts,answers=answer,relevant=gold; default: columns with usual names; "
        "nothing after the = leaves a part unread: answers=",
    )
    group.add_argument("--form", choices=_FORMS, help="form of a file of your own; default: recognised by its fields")


def own_form_of(args: argparse.Namespace) -> OwnForm | None:
    """Form of the user's own file in ``--data``, or ``None`` if the data are others.

    Raises:
        ValueError: If the first row of the file is invalid, or an option has no effect on the data.
    """
    from focuslens.data.selection import own_form

    form = own_form(args.data, args.columns, args.form, args.documents)
    if form is None:
        return None
    for option, value in (("--gold-positions", args.gold_positions), ("--distractors", args.distractors)):
        if value not in (None, "random"):
            raise ValueError(
                f"{option} is for lost-in-the-middle files, and {args.data} has documents of its own in each row; "
                f"leave {option} out"
            )
    return form


def form_of_further_data(args: argparse.Namespace, path: str) -> OwnForm | None:
    """Form of data beside ``--data``, or ``None`` if they are no table of the user.

    ``--columns`` and ``--form`` describe ``--data``. They count for other data as far as these have the same columns.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the first row of the file is invalid.
    """
    from focuslens.data._rows import is_table
    from focuslens.data.selection import own_form

    named = args.columns is not None or args.form is not None
    if not named or not is_table(path):
        return own_form(path, num_documents=args.documents)
    try:
        return own_form(path, args.columns, args.form, args.documents)
    except ValueError as error:
        try:
            return own_form(path, num_documents=args.documents)
        except ValueError:
            raise error from None


def template_of(args: argparse.Namespace) -> PromptTemplate | None:
    """Wording of the prompts in the file ``--template``; ``None`` without the option."""
    from focuslens.prompts.template import PromptTemplate

    return None if args.template is None else PromptTemplate.load(args.template)
