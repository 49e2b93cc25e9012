"""The command line: ``python -m lora_trainer COMMAND``.

Exit codes: 0 done; 2 something the user can put right, said in one message; 130 interrupted by Ctrl-C with the state
saved; 1 anything else.
"""

from lora_trainer.cli.main import main

__all__ = ["main"]
