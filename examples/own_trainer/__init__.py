"""Your own training code in a federation: a script around a Trainer, and a loop (docs/own-trainer.md)."""
