"""Claims generations and writes their logs. Never imports api."""
