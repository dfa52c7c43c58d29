"""What a model is, without torch: its configuration, its presets, its table of parameters and what they cost."""
