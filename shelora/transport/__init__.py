"""How bytes and errors travel between agents, servers and the command line."""
