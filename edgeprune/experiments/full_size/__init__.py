"""Measures time and peak memory of commands on models of 2 to 12 G parameters with random weights.

    make bench-full                    # list the rows, with a forecast for this machine
    make bench-full ROW=synth          # measure one

A row is a few commands that a user would type. A forecast precedes them; above 45 minutes or 45 GB, a row is refused.
Each command is a process of its own. Its peak memory is the kernel's (ru_maxrss); if it starts other processes, the
largest sum sampled over all of them counts where that is more. An interrupted row resumes. Finished rows are merged,
with the processor's name, into docs/full-size.json, from which the tables of docs/full-size.md are made. Random weights
say nothing about image quality, so it is not measured.

measuring.py runs and measures commands, recording.py keeps what a row has so far, forecast.py says what it will take,
rows/ has the rows, results.py the committed results and their tables.
"""
