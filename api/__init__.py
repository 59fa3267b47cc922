"""HTTP in, HTTP out: takes prompts, relays logs. Never imports worker."""
