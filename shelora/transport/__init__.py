"""How bytes and errors travel between agents, servers and the command line."""

import os

# gRPC's C core writes unstructured lines about ordinary disconnections to standard error, past any logger; every
# failure that matters also ends an RPC with a status. Read when the first channel or server is made.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
