"""How much a language model forgot: a tuned one beside what it was, on texts; see ``command``."""
