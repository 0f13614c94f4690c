"""`python -m passes`."""

from passes.cli.main import main

main()
