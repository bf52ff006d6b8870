"""The report of a growing run: pages that change, progress, files that are shown, and files that are not."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from focuslens.cli.main import main
from focuslens.util.record_file import RecordFile, unfinished_path
from focuslens.viz.run_report.live import LiveReport
from focuslens.viz.run_report.run_progress import unfinished_files
from focuslens.viz.run_report.server import PORT, ReportServer, open_server

SETTINGS = [
    {"name": "baseline", "case": "long", "parameters": {}, "interventions": []},
    {"name": "split", "case": "long", "parameters": {"tau": 0.1, "k": 1, "heads": "contextual"}, "interventions": []},
]
HEADER: dict[str, Any] = {"data": {"samples": 4, "file": "synthetic"}, "settings": SETTINGS, "seed": 1}


def record(i: int, correct: bool = True) -> dict[str, Any]:
    result = {"response": f"answer {i}", "correct": correct, "finished": True}
    results = {setting["name"]: result for setting in SETTINGS}
    return {"id": f"q{i}", "question_id": f"q{i}", "answers": ["x"], "results": results}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "my <run>"


@pytest.fixture
def report(folder: Path, tmp_path: Path) -> LiveReport:
    work = tmp_path / "work"
    work.mkdir()
    return LiveReport(folder, work)


@pytest.fixture
def server(report: LiveReport) -> Iterator[ReportServer]:
    with open_server(report, 0) as server:
        yield server


def fetch(
    server: ReportServer, address: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[int, bytes, Mapping[str, str]]:
    """Status, content and headers of an answer. The address is sent as it is, without being made shorter."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, address, headers=dict(headers or {}))
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def page(server: ReportServer) -> str:
    status, content, _ = fetch(server, "/")
    assert status == 200
    return content.decode()


def status(server: ReportServer) -> dict[str, Any]:
    return json.loads(fetch(server, "/status")[1])


def test_the_page_grows_with_the_records(server, report, folder):
    assert "The report is being built" in page(server)
    assert report.refresh()
    assert "There are no results" in page(server)
    assert "my &lt;run&gt;" in page(server)
    first = status(server)
    assert first["progress"] == []
    assert not report.refresh()  # nothing has changed
    assert status(server) == first

    file = RecordFile(folder / "split_softmax.jsonl", HEADER)
    file.append([record(0), record(1, correct=False)])
    assert status(server)["progress"] == ["split_softmax.jsonl: 4 of 8 responses"]  # before the page is built again
    assert report.refresh()
    assert status(server)["version"] != first["version"]
    text = page(server)
    assert "0.500" in text
    assert "2 of 4 samples are done" in text
    assert 'id="progress"' in text
    assert f'data-version="{status(server)["version"]}"' in text

    file.append([record(2), record(3)])
    assert report.refresh()
    assert "0.750" in page(server)
    assert status(server)["progress"] == []
    assert not (folder / "report.html").exists()  # nothing is written to the folder


def test_links_of_the_page_lead_to_the_records(server, report, folder):
    RecordFile(folder / "deep" / "a b.jsonl", HEADER).append([record(0)])
    report.refresh()
    assert 'href="/files/deep/a%20b.jsonl"' in page(server)
    code, content, headers = fetch(server, "/files/deep/a%20b.jsonl")
    assert (code, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert content == (folder / "deep" / "a b.jsonl").read_bytes()
    figures = [line for line in page(server).split('"') if line.startswith("report_files/")]
    assert figures
    assert fetch(server, f"/{figures[0]}")[0] == 200


def test_the_page_may_ask_its_server_and_no_other(server, report):
    text = page(server)
    assert "connect-src 'self'" in text
    assert "default-src 'none'" in text
    code, content, headers = fetch(server, "/", "HEAD")
    assert (code, content, headers["Cache-Control"]) == (200, b"", "no-store")


@pytest.mark.parametrize(
    "address",
    [
        "/files/../secret.json",
        "/files/%2e%2e/secret.json",
        "/files/..%2fsecret.json",
        "/files/%2e%2e%2fsecret.json",
        "/files/a/../../secret.json",
        "/files//etc/passwd.json",
        "/files/link.json",
        "/files/.hidden.json",
        "/files/notes.txt",
        "/files/..\\secret.json",
        "/files/x%00.json",
        "/files/",
        "/files/deep",
        "/report_files/../report.html",
        "/../secret.json",
        "/secret.json",
    ],
)
def test_files_outside_the_run_are_not_shown(address, server, folder):
    (folder / "deep").mkdir(parents=True)
    secret = folder.parent / "secret.json"
    for file in (secret, folder / ".hidden.json", folder / "notes.txt"):
        file.write_text("{}")
    (folder / "link.json").symlink_to(secret)
    (folder / "shown.json").write_text("{}")
    assert fetch(server, address)[0] == 404
    assert fetch(server, "/files/shown.json")[0] == 200


def test_pages_of_other_sites_are_refused(server):
    assert fetch(server, "/", headers={"Host": "attacker.example"})[0] == 403
    assert fetch(server, "/", headers={"Host": f"localhost:{server.server_port}"})[0] == 200
    assert fetch(server, "/", "POST")[0] == 501
    assert server.server_address[0] == "127.0.0.1"


def test_a_file_that_cannot_be_read_does_not_end_the_server(server, report, folder):
    folder.mkdir()
    (folder / "heads.json").write_text("{")
    assert report.refresh()
    assert "could not be read" in page(server)
    (folder / "generate.json").write_text("[1]")  # another form than the report expects
    assert report.refresh()
    assert "cannot be built yet" in page(server)


def test_progress_counts_settings_of_unfinished_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("focuslens.util.record_file._PART_SECONDS", 0)
    path = tmp_path / "sub" / "sweep.jsonl"
    file = RecordFile(path, HEADER)
    file.append_part("baseline", {"q0": {}, "q1": {}, "q2": {}})
    assert unfinished_path(path).is_file()
    assert not path.is_file()
    assert [str(one) for one in unfinished_files(tmp_path)] == ["sub/sweep.jsonl: 3 of 8 responses"]
    file.append([record(0)])
    assert [str(one) for one in unfinished_files(tmp_path)] == ["sub/sweep.jsonl: 4 of 8 responses"]
    scores = {"data": {"samples": 3}, "scores": ["long", "gold"]}
    RecordFile(tmp_path / "unfinished_scores.jsonl", scores).append([{"id": "long q0"}])
    (tmp_path / "notes.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "sweep.1.jsonl").write_bytes(path.read_bytes())
    found = [str(one) for one in unfinished_files(tmp_path)]
    assert found == ["sub/sweep.jsonl: 4 of 8 responses", "unfinished_scores.jsonl: 1 of 6 responses"]
    assert unfinished_files(tmp_path / "nowhere") == []


def test_progress_tells_the_time_that_is_left(report, folder, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("focuslens.viz.run_report.live.time.monotonic", lambda: now[0])
    file = RecordFile(folder / "s.jsonl", HEADER)
    file.append([record(0)])
    assert report.progress() == ["s.jsonl: 2 of 8 responses"]
    file.append([record(1)])
    now[0] = 300.0  # two responses in five minutes, and four are left
    assert report.progress() == ["s.jsonl: 4 of 8 responses, about 10 min left"]


def test_a_port_in_use_is_named(report, capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["watch", str(tmp_path), "--port", str(port), "--no-browser"]) == 1
        assert f"port {port} cannot be used (Address already in use); name another one" in capsys.readouterr().err
    assert main(["watch", str(tmp_path), "--port", "70000"]) == 1
    assert "--port 70000: ports go up to 65535" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["watch", str(tmp_path / "file")]) == 1
    assert "is a file; name the --out of a command" in capsys.readouterr().err


def test_without_a_port_any_is_taken_if_the_usual_one_is_in_use(report):
    with open_server(report) as first, open_server(report) as second:
        assert first.server_port != second.server_port
        assert second.server_port != PORT
        assert fetch(second, "/")[0] == 200


def test_a_keyboard_interrupt_ends_the_command(folder, tmp_path, monkeypatch, capsys):
    ports: list[int] = []

    def interrupted(server: ReportServer) -> None:
        server.report.refresh()
        ports.append(server.server_port)
        assert fetch(server, "/")[0] == 200
        raise KeyboardInterrupt

    monkeypatch.setattr(ReportServer, "watch", interrupted)
    monkeypatch.setattr("webbrowser.open", lambda url: pytest.fail("there is no terminal"))
    assert main(["watch", str(folder), "--port", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["url"] == f"http://127.0.0.1:{ports[0]}/"
    assert "as it grows; Ctrl-C ends it" in err
    with socket.socket() as connection:
        assert connection.connect_ex(("127.0.0.1", ports[0])) != 0
    assert not folder.exists()


def test_watching_builds_the_page_until_the_interrupt(report, folder, monkeypatch):
    file, waits = RecordFile(folder / "s.jsonl", HEADER), list[float]()
    pages: list[bytes] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        pages.append(report.html)
        if len(waits) == 3:
            raise KeyboardInterrupt
        file.append([record(len(waits))])

    monkeypatch.setattr("focuslens.viz.run_report.server.time.sleep", sleep)
    server = ReportServer(report, 0)
    with pytest.raises(KeyboardInterrupt):
        server.watch()
    server.server_close()
    assert len(set(pages)) == 3
    assert min(waits) >= 1
