"""The compressed model on disk: checkpoint.py reads and writes it, surgery.py prunes, lora.py carries LoRAs over,
synth.py makes full-size models with random weights."""
