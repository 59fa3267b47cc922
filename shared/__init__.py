"""What api and worker both stand on: the vocabulary, the settings, the log protocol, the queue."""
