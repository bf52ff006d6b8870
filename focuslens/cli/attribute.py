"""``focuslens attribute``: the document that each answer came from."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.cli import cluster, options, paths
from focuslens.cli.answer_table import COLUMNS, Rows, answer_entry, answer_rows, print_answers
from focuslens.cli.command import Command
from focuslens.cli.common import (
    RunSettings,
    SampleOptions,
    Samples,
    open_executor,
    open_samples,
    run_description,
)
from focuslens.cli.figures import can_draw, note_figures
from focuslens.cli.output import document
from focuslens.cli.own_data import form_of_further_data
from focuslens.cli.rankings import count_heads, get_ranking, remove_scores

if TYPE_CHECKING:
    from focuslens.data.own_samples import OwnForm
    from focuslens.heads import Head
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel
    from focuslens.prompts.sample import MultiDocSample
    from focuslens.prompts.template import PromptTemplate
    from focuslens.scores.answer_sources import AnswerSources
    from focuslens.scores.document_scores import DocumentScores
    from focuslens.scores.response_attention import UnitAttention

__all__ = ["COMMAND"]

_LOG = logging.getLogger(__name__)

_TOP_K = 8
"""Number of heads."""

_SYNTHETIC = "synthetic"


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_samples(parser)
    parser.set_defaults(samples=None)  # all rows of a user's table
    options.add_run(parser)
    own = parser.add_argument_group("one question, in place of --data")
    question = own.add_argument("--question", help="the text, or @FILE")
    paths.remember(own, question, paths.prompt)
    options.add_file(
        own,
        "--document",
        action="append",
        default=[],
        help="text file with a document, whose title is the file's name; repeatable, in the order of the prompt",
    )
    response = own.add_argument("--response", help="the answer, or @FILE; default: the model generates it")
    paths.remember(own, response, paths.prompt)
    given = parser.add_argument_group("answers that you already have; default: the model generates them")
    options.add_file(
        given,
        "--responses",
        help="table with 'response' (text) or 'tokens' (ids), and with the ids of the data, or 'question'",
    )
    given.add_argument("--response-column", metavar="NAME", help="column of the --data file that holds the answers")
    options.add_file(
        parser,
        "--heads",
        check=paths.ranking,
        help="ranking of heads: heads.json of focuslens heads; default: the ranking that ships with the model, or "
        "contextual scores on --rank-on",
    )
    parser.add_argument("--top-k", type=options.positive, help=f"number of heads to average over (default {_TOP_K})")
    options.add_file(
        parser,
        "--rank-on",
        check=None,
        help="data with known relevant documents that rank the heads: what --data takes, a table with usual columns or "
        "those of --columns; default: the passages of this package",
    )
    parser.add_argument(
        "--rank-samples", type=options.positive, default=50, help="samples that rank the heads (default 50)"
    )
    parser.add_argument(
        "--views", type=options.count, default=3, help="samples with a further page token by token (default 3)"
    )
    cluster.add_options(parser)


@dataclass(frozen=True)
class _Answers:
    """Samples, and the responses that one already has; ``None`` if the model generates them."""

    samples: Sequence[MultiDocSample]
    data: Samples | None
    responses: list[Any] | None


@dataclass(frozen=True)
class _Found:
    """Documents that the answers came from.

    Attributes:
        answers: The samples and their answers.
        ranking: All heads, the best first.
        sources: Sources of the answers.
        lengths: Number of tokens of each document.
        rows: Rows of the table, per sample.
        result: Content of the result file.
    """

    answers: _Answers
    ranking: Sequence[Head]
    sources: AnswerSources
    lengths: Sequence[Sequence[int]]
    rows: Sequence[Rows]
    result: dict[str, Any]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the document that each answer came from and, with ``--out``, write a table and a picture."""
    _check_options(args)
    rank_form = _rank_form(args)
    settings = RunSettings.of(args)
    note_figures(settings.out)
    with open_executor(args, settings.model) as model:
        return _attribute(args, settings, model, rank_form)


def _check_options(args: argparse.Namespace) -> None:
    """Check, before any model or file is opened, that the options fit together.

    Raises:
        ValueError: If they do not.
    """
    if args.question is None and (args.document or args.response is not None):
        raise ValueError("--document and --response belong to one question; give --question too, or use --data")
    if args.question is not None:
        if not args.document:
            raise ValueError("--question needs the documents that the answer can come from; give --document FILE ...")
        if args.data != _SYNTHETIC:
            raise ValueError(f"--question and --data {args.data} are both given; give one of them")
    n_given = sum(value is not None for value in (args.response, args.responses, args.response_column))
    if n_given > 1:
        raise ValueError("--response, --responses and --response-column all give the answers; give one of them")
    if args.response_column is not None and args.data == _SYNTHETIC:
        raise ValueError(f"--response-column {args.response_column} is a column of a data file; name the file: --data")


def _rank_form(args: argparse.Namespace) -> OwnForm | None:
    """Form of the table in ``--rank-on``; ``None`` for other data.

    Raises:
        ValueError: If the first row of the data is invalid.
    """
    if args.rank_on is None:
        return None
    try:
        return form_of_further_data(args, args.rank_on)
    except (ValueError, OSError) as error:
        raise ValueError(f"--rank-on: {error}") from error


def _attribute(
    args: argparse.Namespace, settings: RunSettings, model: Executor, rank_form: OwnForm | None
) -> dict[str, Any]:
    from focuslens.scores.document_scores import document_scores

    n_heads = model.shape.n_layers * model.shape.n_heads
    k = count_heads("--top-k", args.top_k, n_heads, default=_TOP_K)
    answers = _answers(args, settings, model)
    ranking, source = _ranking(args, settings, model, rank_form)
    heads = ranking[:k]
    scores = document_scores(
        model,
        answers.samples,
        responses=answers.responses,
        max_new_tokens=settings.max_new_tokens,
        batch_tokens=settings.batch_tokens,
    )
    sources = scores.sources(heads)
    lengths = [_document_lengths(model, sample) for sample in answers.samples]
    rows = answer_rows(sources, answers.samples, lengths)
    how = "given" if answers.responses is not None else "generated"
    print(f"{model.name}: {_counted(answers)} {how} answers, by {len(heads)} heads {source['text']}\n")
    print_answers(sources, answers.samples)
    result = {
        **run_description(settings, model, answers.data),
        "heads": [list(head) for head in heads],
        "heads_from": source,
        "responses": how,
        "known": _known(scores, heads, settings.seed),
        "samples": [answer_entry(sources, sample, i, rows[i]) for i, sample in enumerate(answers.samples)],
    }
    if settings.out is None:
        print("\nwith --out DIR, this command writes a picture, a table (CSV) and all numbers (JSON)")
        return document(result)
    found = _Found(answers, ranking, sources, lengths, rows, result)
    return _write(model, settings, settings.out, found, args.views)


# The samples, their responses and the heads


def _answers(args: argparse.Namespace, settings: RunSettings, model: Executor) -> _Answers:
    from focuslens.data.stored_responses import responses_of_column, responses_of_file

    if args.question is not None:
        sample = _sample_of(_text(args.question), [Path(path) for path in args.document], settings.samples.template)
        responses = None if args.response is None else [_text(args.response)]
        if args.responses is not None:
            responses = responses_of_file(args.responses, [sample])
        return _Answers([sample], None, responses)
    is_file = args.data != _SYNTHETIC
    samples = settings.samples
    if is_file:
        samples = replace(samples, split=samples.split or "all", in_order=True)
    fitted = replace(settings, samples=samples).fitted(model)
    data = open_samples(fitted.samples, "test")
    responses = None
    if args.responses is not None:
        responses = responses_of_file(args.responses, data.samples, args.columns)
    elif args.response_column is not None:
        responses = responses_of_column(args.response_column, data.samples)
    return _Answers(list(data.samples), data, responses)


def _counted(answers: _Answers) -> str:
    """Number of samples; of a table from which rows are left out, beside the number of rows."""
    n, rows = len(answers.samples), 0 if answers.data is None else answers.data.rows
    return f"{n} of {rows} samples," if n < rows else str(n)


def _text(value: str) -> str:
    """Text of an option, or of the file that it names after ``@``."""
    return Path(value[1:]).read_text(encoding="utf-8-sig") if value.startswith("@") else value


def _sample_of(question: str, files: Sequence[Path], template: PromptTemplate | None) -> MultiDocSample:
    from focuslens.prompts.sample import Document, MultiDocSample

    documents = tuple(Document(path.stem, path.read_text(encoding="utf-8-sig").strip()) for path in files)
    return MultiDocSample(question.strip(), (), documents, None, name="question", template=template)


def _ranking(
    args: argparse.Namespace, settings: RunSettings, model: Executor, own: OwnForm | None
) -> tuple[Sequence[Head], dict[str, Any]]:
    """All heads, the best first, and where their order is from."""
    from focuslens.util.shipped import shipped_ranking

    file = args.heads
    if file is None and args.rank_on is None and shipped_ranking(args.model) is not None:
        file = args.model
    if file is not None:
        ranking, source = get_ranking(file, settings, model)
        return ranking, {**source, "text": f"of {source['file']}"}
    # The embedded model was trained on the synthetic corpus, and knows no other words.
    data = args.rank_on or (_SYNTHETIC if args.model == "demo" else "passages")
    _LOG.info("ranking heads by contextual scores on %d samples of %s", args.rank_samples, data)
    documents = args.documents or _documents(model)
    chosen = SampleOptions(
        data,
        samples=args.rank_samples,
        seed=settings.seed,
        documents=documents,
        template=settings.samples.template,
        own=own,
        chosen_by="--rank-samples chooses",
    )
    # A table of the user may be small, and no accuracy is measured on it.
    part = "train" if own is None else "all"
    ranking, source = get_ranking(None, replace(settings, samples=chosen), model, evaluated=False, part=part)
    return ranking, {**source, "text": f"ranked on {data}"}


def _documents(model: Executor) -> int | None:
    """Number of documents per prompt that ranks the heads: ten, or as many as fit a short context."""
    return 10 if model.shape.n_ctx >= 4096 else None


def _document_lengths(model: Executor, sample: MultiDocSample) -> list[int]:
    """Number of tokens of each document in the prompt."""
    return [end - start for start, end in model.encode(sample.prompt()).spans["document"]]


# Results


def _known(scores: DocumentScores, heads: Sequence[Head], seed: int) -> dict[str, Any] | None:
    """How often the source is the document that is known to be relevant; ``None`` if none is known."""
    known = [
        gold is not None and not bool(values.isnan().any())
        for gold, values in zip(scores.gold, scores.scores, strict=True)
    ]
    if not any(known):
        return None
    ranks = scores.attribution(heads, seed=seed)
    measures = {name: getattr(ranks, name).to_dict() for name in ("accuracy", "mrr", "ndcg")}
    print(f"\n{sum(known)} answers have a known relevant document; share whose source it is: {ranks.accuracy}")
    return {"samples": sum(known), **measures}


def _write(model: Executor, settings: RunSettings, out: Path, found: _Found, n_views: int) -> dict[str, Any]:
    """Write all results to a directory."""
    from focuslens.util.files import write_csv, write_json

    result, source = found.result, found.result["heads_from"]
    numbers, table, picture = (out / f"attribution.{suffix}" for suffix in ("json", "csv", "html"))
    write_json(numbers, result)
    write_csv(table, COLUMNS, [row for own in found.rows for row in own])
    written = [numbers, table]
    if "scored_on" in source:
        written.append(out / "heads.json")
        write_json(written[-1], {"heads": [list(head) for head in found.ranking], **source})
        print(f"\nto use the same heads again: --heads {written[-1]}")
    if can_draw():
        written += _draw(model, settings, out, picture, found, n_views)
    remove_scores(settings)
    print(f"\nwrote {' and '.join(map(str, written[:2]))}")
    if picture in written:
        print(f"the picture of the answers and their documents: {picture}")
    return document(result, *written)


def _draw(model: Executor, settings: RunSettings, out: Path, picture: Path, found: _Found, n_views: int) -> list[Path]:
    """Draw the picture, and the pages on the first samples. Return their paths."""
    from focuslens.viz.answers import answer_view

    result, sources, answers = found.result, found.sources, found.answers
    links = _write_views(out, model, sources, answers, n_views, settings.max_new_tokens)
    facts = {
        "Model": model.name,
        "Data": "one question" if answers.data is None else str(answers.data.description.get("file", "")),
        "Answers": str(result["responses"]),
        "Heads": f"{', '.join(map(str, sources.heads))}, {result['heads_from']['text']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }
    view = answer_view(sources, answers.samples, lengths=found.lengths, facts=facts, links=links)
    return [view.save(picture), *(out / address for address in links.values())]


def _write_views(
    out: Path, model: Executor, sources: AnswerSources, answers: _Answers, n_views: int, max_new_tokens: int
) -> dict[str, str]:
    """Write a page on each of the first samples with a source, and return their addresses by sample id."""
    from focuslens.viz.documents import document_view

    places = [i for i, top in enumerate(sources.top) if top is not None][:n_views]
    given = answers.responses
    calls = [
        (str(answers.samples[i].id), None if given is None else given[i], model.encode(answers.samples[i].prompt()))
        for i in places
    ]
    heads, links = [tuple(head) for head in sources.heads], dict[str, str]()
    work = ((prompt, heads, response, max_new_tokens) for _, response, prompt in calls)
    for number, ((name, _, _), attention) in enumerate(zip(calls, model.map(_by_unit, work), strict=True), start=1):
        address = f"views/{number:03d}.html"
        sample = answers.samples[places[number - 1]]
        document_view(attention, title=sample.question).save(out / address)
        links[name] = address
    return links


def _by_unit(model: FocusModel, prompt: Any, heads: Any, response: Any, max_new_tokens: int) -> UnitAttention:
    """Attention of a response to the documents, token by token."""
    from focuslens.scores.response_attention import response_attention

    return response_attention(model, prompt, heads, response=response, max_new_tokens=max_new_tokens).by_unit()


COMMAND = Command(
    name="attribute",
    help="the document that each answer came from",
    description="Say for each answer which document it came from, by the attention of the answer's tokens to the\n"
    "documents. The model generates the answers, or you give them (--responses, --response-column). No gold document\n"
    "and no accepted answer is needed. With --out, attribution.html is a picture, attribution.csv a table, and\n"
    "attribution.json holds all numbers.",
    example="focuslens attribute --model smollm2-135m-instruct --data nq-open-oracle.jsonl.gz --out runs/mine",
    add_options=_add_options,
    run=run,
)
