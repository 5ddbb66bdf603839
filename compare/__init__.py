"""Ways of federated LoRA side by side on the same splits, seeds, steps and models, in one process: `make compare`.

docs/comparison.md says what is compared and shows the figures.
"""
