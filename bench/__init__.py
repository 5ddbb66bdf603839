"""Our protection modes against the published way, in one run on one machine: `python -m bench`.

Everything is measured as CPU time of this process with one thread a library, so that the figures compare work.
"""

import os

for _library in ("OPENBLAS", "OMP", "MKL"):  # read when numpy is first imported, so before it is
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")
