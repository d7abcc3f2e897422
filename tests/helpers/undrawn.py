"""Pages without their pictures."""

from easyaira import report
from easyaira.data import report as data_report

PICTURES = [
    (report, "figure", report.figure),
    (report, "svg", report.svg),
    (data_report, "histograms", data_report.histograms),
]


def leave_out(setattr_of=setattr):
    for module, name, _ in PICTURES:
        setattr_of(module, name, lambda *_: "")
