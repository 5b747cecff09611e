"""The commands, one file each, and what they print. A command imports what it needs when it runs."""
