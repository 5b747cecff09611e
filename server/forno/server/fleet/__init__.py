"""Several server processes, replicas, behind one Envoy, the edge, on one machine.

    caller -> edge (limits, transcoder, router) -> replica 0 | replica 1 | ...   on Unix sockets in a private folder
                                                -> this process: health of the whole, summed metrics

`run.py` starts it all and holds the process; `fleet.py` says how many replicas there should be and in which order they
come and go; a `Place` (`place.py`) keeps one of them alive; a `Replica` (`replica.py`) is one process; `edge.py` is
Envoy's part. `services.py` is what this process answers itself, `exposition.py` the sums in its metrics.
"""
