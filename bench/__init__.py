"""Measures Forno against its floors and its limit, all in one run on one machine: `python -m bench`."""
