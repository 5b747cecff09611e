"""What each method needs, by its canonical path. What is not named here needs `admin`: new methods begin closed."""

from __future__ import annotations

LOOKUP = "predict"
"""Any scope over models or endpoints; which of them is checked where the call's names are looked up."""

NEEDS = {
    "/forno.v1.Predictor/Predict": LOOKUP,
    "/forno.v1.Predictor/PredictStream": LOOKUP,
    "/forno.v1.Predictor/Invoke": LOOKUP,
    "/forno.v1.Predictor/GetModel": LOOKUP,
    "/forno.v1.Predictor/ListModels": LOOKUP,
    "/forno.v1.Rest/Predict": LOOKUP,
    "/forno.v1.Rest/Invoke": LOOKUP,
    "/forno.v1.Rest/Health": "health",
    "/forno.v1.Rest/Ready": "health",
    "/forno.v1.Rest/Metrics": "metrics",
    "/grpc.health.v1.Health/Check": "health",
    "/grpc.health.v1.Health/List": "health",
    "/grpc.health.v1.Health/Watch": "health",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "reflection",
}
"""Path -> a page of scopes.py, or LOOKUP."""

ADMIN_DOOR_ONLY = frozenset(("metrics", "reflection", "admin"))
"""What is served at `security.admin_address` alone, where that is set."""


def need(path: str) -> str:
    """What a method needs."""
    return NEEDS.get(path, "admin")
