"""What compression changed: `measure.py` measures it, `page.py` writes page and model card, `make.py` does both."""
