"""The client agent: trains on data that stays here, protects what it sends, applies what comes back."""
