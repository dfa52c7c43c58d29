"""The model, as the papers write it. Tokens meet other tokens only in `Attend`, and leave home only in `Dispatch`."""
