"""Models on disk: Hugging Face's names, sharded safetensors, and whole checkpoint folders."""
