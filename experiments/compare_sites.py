"""Compare focus directions at the rotary site and the projection site, by exact match and by contextual scores.

    python experiments/compare_sites.py --questions 200 --out runs/sites

Directions at both sites are trained for the same heads on the same training questions. For each site, the strength and
the number of heads are chosen on validation questions. The chosen setting is evaluated once on test questions. All
comparisons are paired by sample.

The script uses the modules of ``focuslens paper``. Finished results therefore stay in the output folder, and a killed
run can resume. The script writes ``sites.csv`` (every setting on validation questions, the chosen settings on test
questions), ``scores.csv``, ``sites.json`` and ``sites.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from focuslens.evaluation import Interval, McNemar, Setting, Sweep, best_setting, bootstrap_mean, steering_settings
from focuslens.heads import Head
from focuslens.interventions.directions import Site
from focuslens.scores.contextual_scores import KINDS, ContextualScores
from focuslens.studies.paper.scored import KINDS_CAPTION
from focuslens.studies.paper.settings import PaperSettings, find_settings, load_settings
from focuslens.studies.paper.study import Part, Study
from focuslens.util.files import versions, write_atomically, write_csv, write_json

KEY = "sites"
SITES: tuple[Site, ...] = get_args(Site)
ALPHAS = [0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0]
KINDS_NAMED = {"relevant": "R", "irrelevant": "IR", "irrelevant_max": "IR max", "sink": "sink"}


@dataclass(frozen=True)
class Comparison:
    """Results of the comparison.

    Attributes:
        validation: Evaluations of the baseline and of every setting of both sites on validation questions.
        test: Evaluations of the baseline and of the chosen settings on test questions.
        chosen: The chosen setting of each site.
        scores: Rows of ``scores.csv``: site, head, kind, before, after, change, and the two ends of the change's
            interval.
    """

    validation: Sweep
    test: Sweep
    chosen: dict[Site, Setting]
    scores: list[tuple[str, str, str, float, float, float, float, float]]

    @property
    def between(self) -> tuple[Interval, McNemar]:
        """Gain in test accuracy of the projection site over the rotary site, and the exact McNemar test."""
        rotary, projection = (self.test[self.chosen[site].name] for site in ("rotary", "projection"))
        gains = [int(a) - int(b) for a, b in zip(projection.correct, rotary.correct, strict=True)]
        return bootstrap_mean(gains, groups=rotary.question_ids), projection.compare(rotary)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="demo", help="YAML file, or the name of one (default demo)")
    parser.add_argument("--questions", type=int, help="of training, validation and test each; default: the settings'")
    parser.add_argument("--seed", type=int, help="of every random choice; default: the settings'")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS, help="default: from 0.5 to 8")
    parser.add_argument("--ks", type=int, nargs="+", help="numbers of heads; default: those of the settings' sweep")
    parser.add_argument("--heads", type=int, help="heads to train, best first; default: the settings'")
    parser.add_argument("--epochs", type=int, help="of the training; default: the settings'")
    parser.add_argument("--documents", type=int, help="of a prompt; default: the settings'")
    parser.add_argument("--top", type=int, default=8, help="heads whose scores are compared (default 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/sites"), help="folder (default runs/sites)")
    options = parser.parse_args(arguments)
    if min(options.alphas) <= 0:
        parser.error("--alphas are above 0: a negative one turns attention away")
    return options


def settings_of(options: argparse.Namespace) -> PaperSettings:
    """Settings of the paper's reproduction, with the changes from the command-line options."""
    settings = load_settings(find_settings(options.settings))
    if options.questions is not None:
        parts = dict.fromkeys(("train", "validation", "test"), options.questions)
        settings = replace(settings, data=replace(settings.data, **parts))
    if options.documents is not None:
        spread = sorted({1 + i * (options.documents - 1) // 4 for i in range(5)})
        data = replace(settings.data, documents=options.documents, gold_positions=tuple(spread))
        settings = replace(settings, data=data)
    if options.seed is not None:
        settings = replace(settings, seed=options.seed)
    changed = {name: getattr(options, name) for name in ("heads", "epochs") if getattr(options, name) is not None}
    return replace(settings, directions=replace(settings.directions, **changed))


def grid(study: Study, site: Site, heads: Sequence[Head], alphas: Sequence[float], ks: Sequence[int]) -> list[Setting]:
    """Steering settings at one site, for all strengths and numbers of heads."""
    settings = steering_settings(study.directions_at(site), heads, alphas, ks)
    return [
        replace(setting, name=f"{site} {setting.name}", parameters={"site": site, **setting.parameters})
        for setting in settings
    ]


def compare(study: Study, alphas: Sequence[float], ks: Sequence[int], top: int) -> Comparison:
    """Train directions, choose settings on validation questions, and evaluate the chosen settings on test questions."""
    heads = study.ranking[: study.settings.directions.heads]
    ks = sorted({min(k, len(heads)) for k in ks})
    grids = {site: grid(study, site, heads, alphas, ks) for site in SITES}
    baseline = Setting("baseline")
    validation = study.sweep(KEY, "validation", [baseline, *(setting for site in SITES for setting in grids[site])])
    chosen: dict[Site, Setting] = {site: best_setting(validation, grids[site]) for site in SITES}
    test = study.sweep(KEY, "test", [baseline, *chosen.values()])
    plain, rows = study.scores("test", "long"), list[Any]()
    for site, setting in chosen.items():
        steered = study.scores("test", "long", setting.interventions)
        rows += [row for head in heads[:top] for row in changes(study, site, head, plain, steered)]
    return Comparison(validation, test, chosen, rows)


def changes(study: Study, site: Site, head: Head, plain: ContextualScores, steered: ContextualScores) -> list[Any]:
    """Changes of one head's test scores under steering. A sample with an empty response in either run is left out."""
    rows: list[Any] = []
    for kind in KINDS:
        before, after = (getattr(scores, kind)[:, head.layer, head.head] for scores in (plain, steered))
        change = study.interval("test", after - before, plain.sample_ids)
        if change is None:
            continue
        known = ~(after - before).isnan()
        means = (float(values[known].mean()) for values in (before, after))
        rows.append((site, str(head), kind, *means, change.mean, change.low, change.high))
    return rows


def markdown(comparison: Comparison, study: Study) -> str:
    """Markdown text of the comparison."""
    train, validation, test = (len(study.samples(part)) for part in get_args(Part))
    between = comparison.between
    lines = [
        f"Model `{study.settings.model}`: {train} training, {validation} validation and {test} test samples of "
        f"{study.settings.data.documents} documents, seed {study.settings.seed}. Strength and number of heads are "
        "chosen on validation questions, for each site; intervals are 95 % bootstrap intervals over questions, "
        "p-values exact.",
        "",
        *table(
            ("site", "chosen", "validation exact match", "test exact match", "against no steering"),
            [("no steering", "-", str(comparison.validation["baseline"].em), str(comparison.test["baseline"].em), "-")]
            + [
                (
                    site,
                    f"alpha = {setting.parameters['alpha']:g}, k = {setting.parameters['k']}",
                    str(comparison.validation[setting.name].em),
                    str(comparison.test[setting.name].em),
                    str(comparison.test[setting.name].compare(comparison.test["baseline"])),
                )
                for site, setting in comparison.chosen.items()
            ],
        ),
        "",
        f"Projection minus rotary, same test questions: {between[0]}, McNemar's {between[1]} (first: projection).",
        "",
        f"Change of contextual scores on test questions under the chosen settings. {KINDS_CAPTION}.",
        "",
    ]
    heads = list(dict.fromkeys(row[1] for row in comparison.scores))
    cells = {(row[0], row[1], row[2]): f"{row[5]:+.3f} [{row[6]:+.3f}, {row[7]:+.3f}]" for row in comparison.scores}
    header = ("head", *(f"{name}, {site}" for name in KINDS_NAMED.values() for site in SITES))
    body = [(head, *(cells.get((site, head, kind), "-") for kind in KINDS_NAMED for site in SITES)) for head in heads]
    return "\n".join([*lines, *table(header, body)]) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def write(comparison: Comparison, study: Study) -> str:
    """Write all files, and return the Markdown text."""
    columns = ("part", "site", "alpha", "k", "em", "low", "high", "mcnemar_p", "gained", "lost", "chosen")
    rows: list[Any] = []
    for part, sweep in (("validation", comparison.validation), ("test", comparison.test)):
        for setting in sweep.settings:
            em, against = sweep[setting.name].em, sweep[setting.name].compare(sweep["baseline"])
            values = [
                setting.parameters.get(name, default) for name, default in (("site", "none"), ("alpha", 0), ("k", 0))
            ]
            numbers = (against.p_value, against.only_first, against.only_second)
            is_chosen = int(setting in comparison.chosen.values())
            rows.append((part, *values, em.mean, em.low, em.high, *numbers, is_chosen))
    write_csv(study.out / "sites.csv", columns, rows)
    header = ("site", "head", "kind", "before", "after", "change", "low", "high")
    write_csv(study.out / "scores.csv", header, comparison.scores)
    gain, test = comparison.between
    content = {
        "settings": asdict(study.settings),
        "model": study.executor.description,
        "versions": versions(),
        "directions_sha256": {site: study.directions_at(site).digest for site in SITES},
        "chosen": {site: setting.describe() for site, setting in comparison.chosen.items()},
        "test": {name: evaluation.em.to_dict() for name, evaluation in comparison.test.evaluations.items()},
        "projection less rotary": {"difference": gain.to_dict(), "mcnemar": test.to_dict()},
    }
    write_json(study.out / "sites.json", content)
    text = markdown(comparison, study)
    write_atomically(study.out / "sites.md", text.encode())
    return text


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    study = Study(settings_of(options), options.out)
    comparison = compare(study, options.alphas, options.ks or study.settings.steering.ks, options.top)
    print(write(comparison, study))


if __name__ == "__main__":
    main()
