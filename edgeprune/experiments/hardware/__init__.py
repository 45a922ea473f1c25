"""Makes the calls of docs/never-executed.md on a machine that has the hardware: `make check-gpu`, `make check-mac`.

    python -m edgeprune.experiments.hardware gpu       # one NVIDIA GPU, at most 10 minutes, no network
    python -m edgeprune.experiments.hardware mac       # Core ML, and torch on mps

Works in a checkout without an installation, with whatever packages are there: a check whose package is missing is left
out with the reason. A check that fails says why in one line, and the next one runs. The results of each machine are
merged into docs/gpu.json or docs/mac.json, from which the page of the same name is made. Weights are random, or those
of the built-in model's size, so nothing is said about the quality of images.

registry.py has what a check is, checks/ has the checks, running.py runs them in a process of their own, place.py gives
them models, results.py keeps results and makes the page.
"""
