"""A finished run as one HTML page that needs nothing else: to keep, or to show to somebody."""

from lora_trainer.report.page import report_of
from lora_trainer.report.run_folder import RunFolder

__all__ = ["RunFolder", "report_of"]
