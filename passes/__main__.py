"""`python -m passes`."""

from passes.cli import main

main()
