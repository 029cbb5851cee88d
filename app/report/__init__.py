"""What a run looked like: a page about one run, and a comparison of several.

Reads the files of run folders (docs/architecture.md, "The record of a run") and nothing else. Must never run anything.
"""

from fedge.report.compare import HEADS, Comparison, Row, compare
from fedge.report.page import write

__all__ = ["HEADS", "Comparison", "Row", "compare", "write"]
