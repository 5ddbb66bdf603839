"""The operator's page: federations in a browser of this machine, with an operator's rights and no others."""
