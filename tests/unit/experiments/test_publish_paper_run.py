"""Published results of the paper's study: what goes into the folder, and what into the package."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import publish_paper_run
import torch

import focuslens as fl
from focuslens.util.files import write_json
from focuslens.util.record_file import read_records
from focuslens.util.shipped import shipped_names


def test_the_ranking_and_the_directions_of_both_sites_go_into_the_package(tmp_path: Path):
    run, assets = tmp_path / "run", tmp_path / "assets"
    write_json(run / "ranking.json", {"artefact": "ranking", "heads": [[1, 0], [0, 1]]})
    for site in ("rotary", "projection"):
        fl.FocusDirections([(1, 0)], torch.ones(1, 4), site=site).save(run / "directions" / site)
    write_json(run / "directions" / "rotary" / "made_of.json", {})  # training at the other site has not ended
    assets.mkdir()
    publish_paper_run.main([str(run), "--out", str(tmp_path / "real"), "--assets", str(assets)])
    assert fl.load_ranking(assets / "rankings" / "real.json") == fl.load_ranking(tmp_path / "real" / "ranking.json")
    assert fl.load_ranking(assets / "rankings" / "real.json") == [(1, 0), (0, 1)]
    assert [path.name for path in (assets / "directions").iterdir()] == ["real"]
    assert fl.FocusDirections.load(assets / "directions" / "real").heads == ((1, 0),)
    assert not (assets / "directions" / "real" / "made_of.json").exists()


def test_records_lose_their_responses_and_nothing_else(tmp_path: Path):
    record = {"id": "1@0", "results": {"baseline": {"correct": True, "response": "Paris", "finished": True}}}
    source, out = tmp_path / "sweep.jsonl", tmp_path / "sweep.jsonl.gz"
    source.write_text(json.dumps({"header": {"seed": 1}}) + "\n" + json.dumps(record) + "\n")
    assert read_records(source)[1] == [record]
    publish_paper_run.publish_sweep(source, out)
    published = gzip.decompress(out.read_bytes()).decode()
    (tmp_path / "published.jsonl").write_text(published)
    assert read_records(tmp_path / "published.jsonl")[0] == {"seed": 1}
    assert "Paris" not in published
    assert json.loads(published.splitlines()[1])["results"]["baseline"] == {"correct": True, "response": ""}


def test_what_is_in_the_package_has_a_published_run():
    assert {name.removesuffix("-projection") for name in shipped_names("directions")} <= set(shipped_names("rankings"))
