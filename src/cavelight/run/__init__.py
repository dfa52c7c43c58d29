"""Running a model: the latent cache, sampling, speculation with the MTP modules, and streams of tokens and text."""
