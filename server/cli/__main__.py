"""``python -m weft.server.cli``: the command line where the console script is not at hand."""

from weft.server.cli import main

main()
