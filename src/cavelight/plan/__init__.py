"""Planning, without torch: what a model will need before anything is built or downloaded."""
