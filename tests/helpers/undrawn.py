"""Leaves the figures out of pages."""

from easyaira import pages
from easyaira.data import report as data_report
from easyaira.run import report as run_report

PICTURES = [
    (run_report, "figure", run_report.figure),
    (pages, "svg", pages.svg),
    (data_report, "histograms", data_report.histograms),
]


def leave_out(setattr_of=setattr):
    for module, name, _ in PICTURES:
        setattr_of(module, name, lambda *_: "")
