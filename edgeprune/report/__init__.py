"""The page about one artefact: figures.py measures, page.py writes report.html and the model card."""
