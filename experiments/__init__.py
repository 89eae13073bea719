"""One module for each paper, the quickstart, and the worlds that they share."""
