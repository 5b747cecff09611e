"""What was worked out for one request, for those that repeat it: the short ways' memory (hot.py, hot_rest.py).

A request is cut into a key, which says all but its numbers, and the numbers. What a key asks for is found out and
checked once, by the ordinary way, and kept as a plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from forno.server.model import Model
    from forno.server.registry import Registry
    from forno.server.request import Answer
    from forno.server.signature import Signature

MAX_PLANS = 256
"""Keys that are remembered; the oldest goes first. A caller chooses keys, and must not choose our memory."""

Place = TypeVar("Place")
"""Where the elements of one input are in a request."""


class Plan(NamedTuple, Generic[Place]):
    """How to treat requests of one key."""

    name: str  # as the caller names it, like the next two
    version: str
    label: str
    signature: Signature
    model: Model
    inputs: tuple[Place, ...]  # in the signature's order; none where the requests go the ordinary way
    rows: int
    priority: int
    timeout_us: int  # in the queue; 0 without one
    write: Callable[[Answer], Any]


class Plans(Generic[Place]):
    """Plans by their keys. Owned by one short way; event loop only.

    Args:
        registry: Where models are found, at each look, so that versions can be swapped and rights are asked for.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._plans: dict[bytes, Plan[Place]] = {}

    def get(self, key: bytes) -> Plan[Place] | None:
        """The plan of a key; None where there is none, or none that still holds.

        Raises:
            FornoError: Its model is not there, or not for who calls.
        """
        plan = self._plans.get(key)
        return plan if plan is not None and self.holds(plan) else None

    def holds(self, plan: Plan[Place]) -> bool:
        """Whether a plan is for the model that its requests still mean.

        Raises:
            FornoError: The model is not there, or not for who calls.
        """
        model = plan.model
        return self._registry.get(plan.name, plan.version, plan.label) is model and model.signature is plan.signature

    def keep(self, key: bytes, plan: Plan[Place]) -> Plan[Place]:
        """Remembers a plan, and returns it."""
        if len(self._plans) >= MAX_PLANS:
            del self._plans[next(iter(self._plans))]
        self._plans[key] = plan
        return plan

    def __len__(self) -> int:
        return len(self._plans)
