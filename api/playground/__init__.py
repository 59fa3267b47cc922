"""The playground: one static page, served as it is, that starts a generation, leaves it and rejoins it."""
