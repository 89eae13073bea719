"""Turns a run's records into tables, plots and one self-contained `report.html`.

A `Report` is plain data: a title, headline cards, sections and facts of the run. It
goes to JSON and back unchanged, so the run's `record.json` keeps it under the key
"report", and

    python -m pref_jax.report RUN_DIR

makes the page again from the run folder alone. The page asks the network for nothing,
needs no javascript, and follows the reader's light or dark setting. Statistics
are not made here: whoever builds the report brings means and intervals.

>>> import pathlib, tempfile
>>> table = Table(
...     "True reward",
...     columns=(Column("stage"), Column("parts right", digits=1, percent=True)),
...     rows=(
...         ("base", Estimate(0.412, 0.38, 0.44)),
...         ("DPO", NotRun("no accelerator")),
...     ),
...     note="Means with 95 % intervals.",
... )
>>> report = Report("DPO, end to end", sections=(table,), meta={"duration": 75})
>>> with tempfile.TemporaryDirectory() as folder:
...     path = pathlib.Path(folder) / "report.html"
...     write_report(report, path)
...     page = path.read_text(encoding="utf-8")
>>> "41.2" in page, "[38.0, 44.0]" in page, "1 min 15 s" in page
(True, True, True)
"""

from pref_jax.report.metrics import read_metrics
from pref_jax.report.page import write_report
from pref_jax.report.parts import (
    Card,
    Column,
    Comparison,
    Comparisons,
    Config,
    Curves,
    Estimate,
    Histogram,
    NotRun,
    Panel,
    Report,
    Response,
    Sample,
    Samples,
    Series,
    Table,
    Text,
    TokenMap,
    TokenMaps,
    TokenSample,
    from_json,
    to_json,
)

__all__ = [
    "Card",
    "Column",
    "Comparison",
    "Comparisons",
    "Config",
    "Curves",
    "Estimate",
    "Histogram",
    "NotRun",
    "Panel",
    "Report",
    "Response",
    "Sample",
    "Samples",
    "Series",
    "Table",
    "Text",
    "TokenMap",
    "TokenMaps",
    "TokenSample",
    "from_json",
    "read_metrics",
    "to_json",
    "write_report",
]
