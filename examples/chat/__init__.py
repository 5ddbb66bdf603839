"""Questions and answers of three topics, one at each agent: `make demo-chat`."""
