"""The demos of the guides, as the guides show them: minutes each (`make test-demos`)."""
