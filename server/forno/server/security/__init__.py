"""Who calls, and what they may: decided in the server itself, the same on every transport.

    headers, certificate --> Guard.admit --> Principal --> Registry.get, find_endpoint --> the model
                              |  who is it (keys, tokens, certificates)     |  may they use what this call names
                              |  may they call this method (methods)        |
                              |  not too often (rates)                      |
                              +-- Unauthenticated, PermissionDenied, RateLimited

A transport admits each call by its canonical method, after any REST path has been turned into one, and before any
handler runs; the principal then goes with the call as a context variable (`access.py`). What a call names is checked
where it is looked up, so that no path, body or stream item leads around the check. Off, none of it costs anything.
"""
