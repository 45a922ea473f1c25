"""Make a diffusers folder from what is none: single files of other programs, and folders with weights in 8 bits.

    opening.py     what a path is: safetensors, GGUF, a folder, or something that is not read, which it names
    safetensors.py the tensors of safetensors files, with their scales
    gguf_file.py   the tensors of a GGUF file
    identity.py    which model the tensors are, from names and shapes, and what else is known by its names
    layouts.py     where each tensor of diffusers lies in the file
    make.py        the plan, and writing it

Nothing here holds more than one shard in memory. Headers say everything that can be refused, so data is read only once
the whole file is accounted for.
"""
