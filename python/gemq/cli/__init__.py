"""The ``gemq`` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line: errors in one line with exit code 2 (1 for internal ones), 130 on Ctrl-C."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) != len(sys.argv) - 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from gemq.cli.run import run
        from gemq.launch import leave
    except KeyboardInterrupt:
        # long enough on a busy machine to change one's mind
        sys.exit(130)
    leave(run(arguments, debug))
