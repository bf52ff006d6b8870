"""Report that is built again when result files change, and the pages and files that a server may show of it."""

from __future__ import annotations

import os
import time
from html import escape
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from focuslens.util.progress import duration
from focuslens.viz.page import POLICY, asset, page
from focuslens.viz.report import CSS
from focuslens.viz.run_report.examples import Sources
from focuslens.viz.run_report.run import write_run_report
from focuslens.viz.run_report.run_progress import FileProgress, result_files, unfinished_files

__all__ = ["LiveReport"]

_SERVED = (".json", ".jsonl", ".csv", ".png", ".html")
"""Suffixes of files that reports link to."""


class LiveReport:
    """Report of a run's folder that may still grow, or may not exist yet. No model is loaded.

    Args:
        folder: Folder of the run. Nothing is written to it.
        work: Empty folder for the report's page and figures.

    Attributes:
        html: The current page. Its script asks for :meth:`status`, and loads the page again when the version changes.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self._work = folder, work
        self._state: tuple[tuple[str, int, int], ...] | None = None
        self._first: dict[str, tuple[float, int]] = {}
        self._start, self._number = time.time_ns(), 0
        self.html = self._waiting("The report is being built.")

    @property
    def version(self) -> str:
        """Text that is different for every page that any server has built."""
        return f"{self._start}-{self._number}"

    def refresh(self) -> bool:
        """Build the page again if result files have changed, and return whether they have."""
        state = tuple(_facts(path) for path in result_files(self.folder))
        if state == self._state:
            return False
        self._state = state
        self._number += 1
        self.html = self._built()
        return True

    def status(self) -> dict[str, object]:
        """Version of the page, and a line on the progress of each unfinished run, as JSON values."""
        return {"version": self.version, "progress": self.progress()}

    def progress(self) -> list[str]:
        """A line on each unfinished run. The remaining time counts from the first look at the run's file."""
        now = time.monotonic()
        return [self._line(progress, now) for progress in unfinished_files(self.folder)]

    def _line(self, progress: FileProgress, now: float) -> str:
        then, before = self._first.setdefault(progress.file, (now, progress.done))
        if progress.done <= before:
            return str(progress)
        left = (now - then) * (progress.wanted - progress.done) / (progress.done - before)
        return f"{progress}, about {duration(left)} left"

    def file(self, address: str) -> Path | None:
        """File that a link of the page leads to.

        Args:
            address: Path of the address, decoded.

        Returns:
            The file; ``None`` if there is none, or if it lies outside the run's folder and the report's own.
        """
        for prefix, folder in (("/files/", self.folder), ("/report_files/", self._work / "report_files")):
            if address.startswith(prefix):
                return _inside(folder, address.removeprefix(prefix))
        return None

    def _built(self) -> bytes:
        target = self._work / "report.html"
        try:
            write_run_report(self.folder, target, sources=Sources(views=0))
            text = target.read_text(encoding="utf-8")
        except FileNotFoundError:
            return self._waiting(f"There are no results in {self.folder} yet. This page changes when there are.")
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
            return self._waiting(f"The report cannot be built yet ({error}). It is built again when files change.")
        # Links of the report are relative to the work folder.
        prefix = Path(os.path.relpath(self.folder.resolve(), self._work.resolve())).as_posix()
        text = text.replace(f'href="{escape(quote(prefix))}/', 'href="/files/')
        return self._alive(text)

    def _waiting(self, message: str) -> bytes:
        title = f"FocusLens: {self.folder.resolve().name}"
        return self._alive(page(title, f"<h1>{escape(title)}</h1>\n<p>{escape(message)}</p>", css=CSS))

    def _alive(self, text: str) -> bytes:
        """A page with the progress of unfinished runs, and with the script that asks for changes."""
        lines = "".join(f"<p>{escape(line)}</p>" for line in self.progress())
        place = f'<div id="progress" role="status" data-version="{self.version}">{lines}</div>'
        text = text.replace(POLICY, f"{POLICY}; connect-src 'self'", 1).replace("</h1>", f"</h1>\n{place}", 1)
        body, _, end = text.rpartition("</body>")
        return f"{body}<script>{asset('live.js')}</script>\n</body>{end}".encode()


def _facts(path: Path) -> tuple[str, int, int]:
    """Path, time of the last change and size of a file."""
    try:
        facts = path.stat()
    except OSError:  # removed meanwhile
        return str(path), 0, 0
    return str(path), facts.st_mtime_ns, facts.st_size


def _inside(folder: Path, address: str) -> Path | None:
    """File of a relative address inside a folder. Hidden files, and links out of the folder, are not shown."""
    parts = PurePosixPath(address).parts
    if not parts or "\0" in address or "\\" in address or any(part.startswith((".", "/")) for part in parts):
        return None
    path = folder.joinpath(*parts).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.suffix in _SERVED and path.is_file() else None
