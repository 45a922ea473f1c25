"""The compressed model on disk: a diffusers folder plus `edgeprune.json`.

manifest.py is `edgeprune.json`; resolve.py finds a model's folder, teachers.py the teachers of shapes world; loading.py
and writing.py read and write folders; surgery.py makes the shorter model; lora/ remaps and merges LoRAs; synth.py makes
full-size models with random weights.
"""
