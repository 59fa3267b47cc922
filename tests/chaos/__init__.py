"""What goes wrong, done on purpose: the fault suite. `make chaos` runs all of it, `make test` a short form."""
