"""The `rejoin` command. Starts the parts as processes; imports neither api nor worker."""
