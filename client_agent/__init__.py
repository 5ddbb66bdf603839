"""The client agent: trains on data that stays here, protects what it sends, applies what comes back."""

import logging
import os

# Before anything imports torch: idle OpenMP threads sleep in place of spinning. An agent shares its machine; with two
# threads on two busy cores a training step takes 2.1 s in place of 7.8 s (all-MiniLM-L6, 16 x 96 tokens).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# PEFT imports bitsandbytes where it is installed, which then warns of kernels that nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
