"""`python -m fuser.cli`."""

from fuser.cli import main

main()
