"""A user study: people rate images blindly on a web page that this machine serves.

`make.py` turns folders of images into a study, `design.py` decides who sees what in which order, `server.py` serves the
page, `store.py` keeps every answer, and `results.py` turns the answers into scores with the formulas of
`statistics.py`. The server does not encrypt; put a proxy or a tunnel in front of it.
"""
