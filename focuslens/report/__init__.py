"""What a run left behind, gathered into one page: read its files, say what they say, show where the model looked."""

from focuslens.report.examples import Sources
from focuslens.report.run import write_run_report

__all__ = ["Sources", "write_run_report"]
