"""How large the update is: that of a large model, divided. `make test-lines SCALE=1` sends all of it in some hours."""

import os

FULL_BYTES = 758e6
SCALE = int(os.environ.get("SCALE", "24"))
