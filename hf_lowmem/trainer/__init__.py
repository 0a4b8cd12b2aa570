"""The Hugging Face edge: optim names, their options, registration with transformers, checkpoints, TRL's scripts."""
