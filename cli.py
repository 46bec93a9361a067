"""The command line from an editable checkout: `python cli.py embed photos/`."""

from embedkit.cli import main

main()
