"""`python -m refimpl` is the command `refimpl`."""

from refimpl.cli import main

main()
