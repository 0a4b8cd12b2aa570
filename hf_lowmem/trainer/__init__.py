"""The side of the package that faces Hugging Face: optim names, registration, checkpoints, and TRL's scripts."""
