"""Monitor: report each converge, and write the reports.

In: what observing, steering and converging return (:func:`assemble`). Out: a :class:`Report` of plain values, passed to
every monitor: a function, a file of JSON lines (:class:`JsonLines`), TensorBoard (:class:`TensorBoard`).
"""

from hdet.monitor.base import Callback, JsonLines, Monitor, MonitorLike, as_monitors, read_jsonl, read_run
from hdet.monitor.publisher import Publisher
from hdet.monitor.report import Converged, HyperparameterReport, Moment, Report, assemble, report_of
from hdet.monitor.tensorboard import TensorBoard

__all__ = [
    "Callback",
    "Converged",
    "HyperparameterReport",
    "JsonLines",
    "Moment",
    "Monitor",
    "MonitorLike",
    "Publisher",
    "Report",
    "TensorBoard",
    "as_monitors",
    "assemble",
    "read_jsonl",
    "read_run",
    "report_of",
]
