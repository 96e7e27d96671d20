"""Weight sync: versioned weights from the actor into the servers."""
