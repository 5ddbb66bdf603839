"""Makes and keeps the keys of every epoch and releases them to agents. Decrypts nothing."""
