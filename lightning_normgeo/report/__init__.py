"""Reports from records. Needs the extra ``report``."""

from lightning_normgeo.report.page import REPORT_NAME as REPORT_NAME
from lightning_normgeo.report.page import write_report as write_report
