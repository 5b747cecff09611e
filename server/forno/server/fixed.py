"""What a reload leaves: the settings that Envoy, the sockets and the processes were started with; all, if it fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    import logging

    from forno.server.config import Config

_CHANGING = {
    "server": ("drain_s", "log_level", "log_format"),
    "security": ("keys_file", "certificates", "anonymous", "admin_anonymous", "jwt", "rate_limit"),
}
"""Of sections that are otherwise fixed, the settings that a reload changes."""
_DERIVED = ("model_fields_set", "socket_mode")  # no settings of their own


def keep(before: Config, after: Config) -> tuple[Config, list[str]]:
    """The settings that a running server can change to, and the names of those that it has to keep.

    Models and endpoints change, and with replicas `telemetry` and what of `fleet` is no part of the edge.

    Args:
        before: Those it has.
        after: Those it was told.
    """
    fleet = bool(before.fleet.replicas)
    free = {**_CHANGING, "fleet": ("pin_cpus", "gpus", "hung_after_s", *(("replicas",) if fleet else ()))}
    if not fleet:
        free["telemetry"] = ()
    if fleet and not after.fleet.replicas:
        free["fleet"] = tuple(name for name in free["fleet"] if name != "replicas")  # an edge needs one
    kept = []
    update: dict[str, Any] = {}
    for section, changing in free.items():
        old, new = getattr(before, section), getattr(after, section)
        held = {name: value for name, value in vars(old).items() if name not in changing and name != _DERIVED[0]}
        kept += [f"{section}.{name}" for name in held if name not in _DERIVED and getattr(new, name) != held[name]]
        update[section] = new.model_copy(update=held)
    return after.model_copy(update=update), sorted(kept)


def told(kept: list[str]) -> str:
    """What to tell of settings that were kept."""
    return f"kept as they were until the server is started again: {', '.join(kept)}"


def log_refused(log: logging.Logger, error: Exception) -> None:
    """Logs why a reload has changed nothing; of what is no fault of ours, only what is wrong, a line at a time."""
    if not isinstance(error, ConfigError):
        log.error("not reloaded", exc_info=error)
        return
    for line in str(error).splitlines():
        log.error("not reloaded: %s", line)
