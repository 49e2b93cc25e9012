"""``python -m lora_trainer``."""

from lora_trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
