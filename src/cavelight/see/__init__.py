"""Looking: what a run, its drafts and a model are, as pictures. Matplotlib is met when something is drawn."""
