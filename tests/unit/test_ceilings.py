"""When an Envoy that is short of memory is told to refuse work."""

from __future__ import annotations

from forno.server.transport.envoy.ceilings import HeapWatch


class Administration:
    """Envoy's, as far as the watch asks it."""

    def __init__(self) -> None:
        self.pressure = ""
        self.told: list[str] = []

    def ask(self, method: str, path: str) -> str:
        if method == "POST":
            self.told.append(path.partition("=")[2])
            return "OK"
        return f"overload.envoy.resource_monitors.fixed_heap.pressure: {self.pressure}\n" if self.pressure else ""


def test_work_is_refused_from_the_ceiling_on_and_no_longer_than_needed():
    envoy = Administration()
    watch = HeapWatch(envoy.ask, 1 << 20)
    told = []
    for percent in ("", "0", "94", "95", "120", "", "94", "94", "99", "3"):
        envoy.pressure = percent
        envoy.told.clear()
        watch.look()
        told.append([*envoy.told])
    # Told again while it is full, since an Envoy that was started anew has forgotten it; never without an answer.
    assert told == [[], [], [], ["100"], ["100"], [], ["0"], [], ["100"], ["0"]]
