"""Memory, latency and quality of several models, each measured in a fresh process.

`run.py` starts one `worker.py` per variant; `results.py` holds the figures and reads and writes their JSON; `tables.py`
shows them and `assertions.py` checks them. `disk.py` counts bytes of weights, `machine.py` describes the computer, and
`start.py` times the start of the command.
"""
