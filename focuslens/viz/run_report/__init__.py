"""What a run left behind, gathered into one page: read its files, say what they say, show where the model looked."""

from focuslens.viz.run_report.examples import Sources
from focuslens.viz.run_report.run import run_facts, write_run_report

__all__ = ["Sources", "run_facts", "write_run_report"]
