"""The report of an evaluation: figures, intervals, groups, and the files that show single examples.

``Collect`` is the metric of an evaluation; ``make_report`` makes a ``Report`` of what it computed. The other
modules write a report as text, files and pictures. Nothing here prints.
"""

from jaxtrain.evaluation.bootstrap import Bootstrap
from jaxtrain.evaluation.collect import Collect
from jaxtrain.evaluation.report import Report, check_collects, make_report

__all__ = ["Bootstrap", "Collect", "Report", "check_collects", "make_report"]
