"""`python -m edgeprune.cli`, as launchers start it."""

from edgeprune.cli import main

main()
