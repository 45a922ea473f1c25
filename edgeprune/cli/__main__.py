"""Run the command line as `python -m edgeprune.cli`; launchers of several processes start it this way."""

from edgeprune.cli import main

main()
