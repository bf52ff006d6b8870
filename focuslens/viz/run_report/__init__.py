"""One-page report of a run: findings from its result files, and the model's attention on individual samples."""

from focuslens.viz.run_report.examples import Sources
from focuslens.viz.run_report.run import run_facts, write_run_report

__all__ = ["Sources", "run_facts", "write_run_report"]
