"""``python -m lora_trainer``."""

import sys

from lora_trainer.requirements import missing_package

try:
    from lora_trainer.cli import main
except ModuleNotFoundError as error:
    if (message := missing_package(error)) is None:
        raise
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from error

if __name__ == "__main__":
    raise SystemExit(main())
