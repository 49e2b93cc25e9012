"""One run, assembled: configuration + lent model + pictures -> a finished LoRA."""

from lora_trainer.run.beginning import (
    check_files,
    check_processes,
    file_lender,
    look_at_data,
    with_all_others,
    with_work_for_all,
)
from lora_trainer.run.engine import Result, summary, train

__all__ = [
    "Result",
    "check_files",
    "check_processes",
    "file_lender",
    "look_at_data",
    "summary",
    "train",
    "with_all_others",
    "with_work_for_all",
]
