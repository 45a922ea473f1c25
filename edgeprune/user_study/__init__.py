"""A user study: people rate images blindly in a web page of this machine; what comes out has intervals.

`make.py` turns folders of images into a study, `design.py` decides who sees what in which order, `server.py` shows it
and `store.py` keeps every answer, `results.py` computes what they say with the formulas of `statistics.py`. What it
leaves out: recruiting raters, accounts, and encryption on the way (put a proxy or a tunnel in front).
"""
