"""The judge: a plain restatement of the DeepSeek-V3 report's mathematics (and of V2's gates).

It is written from the reports and not from the package, one token, one head and one expert at a time, so that it can
be held against the equations line by line. It reads a dict of tensors under their Hugging Face names, and computes in
the type of those tensors (float32, or float64 when rounding is in question). Nothing here is fast, and nothing is
shared with the code it judges; of the package it knows the configuration alone. `ours.py` and `witness.py` are the two
bridges: they carry the same dict into the package's model and into transformers'.
"""
