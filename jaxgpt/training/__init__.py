"""Training: the setup of a run, its step and loop, optimizers, fine-tuning and checkpoints."""
