"""`python -m embedkit`: the command line."""

from embedkit.commands import main

main()
