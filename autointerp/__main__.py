"""`python -m autointerp`: the command line, where the script is not on the path."""

from autointerp.cli import main

main()
