"""Tensors in, tensors out: each fast form beside its plain twin. Imports nothing of ours."""
