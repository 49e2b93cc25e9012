"""One run, assembled: configuration + lent model + pictures -> a finished LoRA."""

from lora_trainer.run.engine import Result, check_files, file_lender, summary, train

__all__ = ["Result", "check_files", "file_lender", "summary", "train"]
