import os

# gRPC's core writes lines of its own to standard error, between what we say; only this, before its import, stops it.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
