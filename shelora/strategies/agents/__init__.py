"""Secret halves of strategies: what protects and opens updates. Servers cannot import them."""
