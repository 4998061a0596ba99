"""``python -m gemq`` is the ``gemq`` command."""

from gemq.cli import main

main()
