"""Where Envoy's filter chain ends: in this process, or at a gRPC server behind a router.

The chain before the end, its limits and the transcoder are the same everywhere (`bootstrap.py`), so that a caller
cannot tell which end answers. The edge before several replicas has an end of its own, `forno.server.fleet.edge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Door = Literal["public", "admin", "inner"]
"""Where calls come in: the public address, that of administration, or an edge of ours, whose word is taken."""

TYPES = "type.googleapis.com/envoy"
STRING = "type.googleapis.com/google.protobuf.StringValue"
MODULE = Path(__file__).parent / "_native.so"
HTTP_PREFIX = "http:"
"""Before the name of a method, where it takes REST calls as they come."""
HTTP_ROUTES = {
    "/forno.v1.Rest/Predict": r"/v1/(predict|models/[\w.-]+(/(versions|labels)/[\w.-]+)?:predict)",
}
"""Methods whose REST calls need no transcoder, and their paths; one with a query or an escape takes the usual way."""
MAX_STREAM_S = 3600
"""Longest deadline of a lasting call, and longest time in which nothing of it comes or goes."""
LASTING = (
    "/forno.v1.Predictor/PredictStream",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
"""Methods whose calls may last, and be silent for long."""
_DEADLINES_ONLY = {"max_stream_duration": {"grpc_timeout_header_max": f"{MAX_STREAM_S}s"}}
"""Envoy keeps the deadlines that callers bring: no timer per call in Python."""
_WITHOUT_TRANSCODER = {"rest": {"@type": f"{TYPES}.config.route.v3.FilterConfig", "disabled": True}}


class End(Protocol):
    """The end of the chain, as parts of Envoy's configuration."""

    def filter(self, door: Door) -> dict[str, Any]:
        """The last HTTP filter, of calls that come in there."""

    def routes(self) -> list[dict[str, Any]]:
        """The routes, in the order in which they are tried."""

    def clusters(self) -> list[dict[str, Any]]:
        """What the routes lead to; nothing where the filter itself answers."""


@dataclass(frozen=True, slots=True)
class ModuleEnd:
    """Calls are carried by the native module into the interpreter of the same process."""

    function: str  # "package.module:function", called on a thread of its own
    argument: str  # what it gets

    def filter(self, door: Door) -> dict[str, Any]:
        """The module, which takes from callers' headers what may come in there."""
        return {
            "name": "forno",
            "typed_config": {
                "@type": f"{TYPES}.extensions.filters.http.dynamic_modules.v3.DynamicModuleFilter",
                "dynamic_module_config": _module(),
                "filter_name": "forno",
                "filter_config": {"@type": STRING, "value": f"{door}\n{self.function}\n{self.argument}"},
                "terminal_filter": True,
            },
        }

    def routes(self) -> list[dict[str, Any]]:
        """Those past the transcoder, and one for all else: the module itself refuses what it does not know."""
        past = [
            http_route(path, route("servicers"), {"forno": _taking(method)}) for method, path in HTTP_ROUTES.items()
        ]
        return [_grpc_route(), *past, {"match": {"prefix": "/"}, "route": route("servicers")}]

    def clusters(self) -> list[dict[str, Any]]:
        """None."""
        return []


@dataclass(frozen=True, slots=True)
class ProxyEnd:
    """Calls go on to one gRPC server."""

    socket: Path  # the Unix socket it listens on

    def filter(self, door: Door) -> dict[str, Any]:
        """A router."""
        return router()

    def routes(self) -> list[dict[str, Any]]:
        """One for calls."""
        return [{"match": {"prefix": "/", "headers": [is_grpc()]}, "route": route("servicers")}, unknown_path()]

    def clusters(self) -> list[dict[str, Any]]:
        """The server."""
        return [socket_cluster("servicers", self.socket)]


def route(cluster: str) -> dict[str, Any]:
    """The way of a call to a cluster; `bounded` says how long it may take."""
    return {"cluster": cluster, "timeout": "0s"}


def bounded(routes: list[dict[str, Any]], max_call_s: float) -> list[dict[str, Any]]:
    """The routes with how long their calls may take; first among them, those of lasting calls.

    Args:
        routes: In the order in which they are tried.
        max_call_s: Of other calls, from their first byte to the answer, whatever deadline they bring. Envoy tells a
            gRPC server of it as a deadline, in place of none or of one that nobody can read. Routes with limits of
            their own keep them.
    """

    def leads(match: dict[str, Any], path: str) -> bool:
        return match.get("path") == path or path.startswith(match.get("prefix", "?"))

    def exactly(match: dict[str, Any], path: str) -> dict[str, Any]:
        return {key: value for key, value in match.items() if key != "prefix"} | {"path": path}

    silent = {"idle_timeout": f"{MAX_STREAM_S}s", "max_stream_duration": _duration(0, MAX_STREAM_S)}
    lasting = [
        {**usual, "match": exactly(usual["match"], path), "route": usual["route"] | silent}
        for path in LASTING
        for usual in routes
        if "route" in usual and leads(usual["match"], path)
    ]
    limit = {"max_stream_duration": _duration(max_call_s, max_call_s)}
    return [*lasting, *({**one, "route": limit | one["route"]} if "route" in one else one for one in routes)]


def _duration(most_s: float, longest_deadline_s: float) -> dict[str, str]:
    return {"max_stream_duration": f"{most_s:.3f}s", "grpc_timeout_header_max": f"{longest_deadline_s:.3f}s"}


def _module() -> dict[str, Any]:
    return {"module": {"local": {"filename": str(MODULE)}}, "do_not_close": True}


def _grpc_route() -> dict[str, Any]:
    """Of gRPC calls, which the transcoder would only pass on: left out, it costs nothing.

    It passes other content types of gRPC as well, such as application/grpc+proto; those go by the usual route. How long
    a body may take is seen to by the module: a limit of Envoy's would give each call a deadline and a timer.
    """
    exactly = {"name": "content-type", "string_match": {"exact": "application/grpc"}}
    return {
        "match": {"prefix": "/", "headers": [exactly]},
        "route": route("servicers") | _DEADLINES_ONLY,
        "typed_per_filter_config": _WITHOUT_TRANSCODER,
    }


def http_route(path: str, way: dict[str, Any], filters: dict[str, Any] | None = None) -> dict[str, Any]:
    """A route of REST calls past the transcoder.

    Args:
        path: A regular expression for all of the path, the query with it.
        way: Where they go.
        filters: What they have of their own, by filter.
    """
    headers = [
        {"name": ":method", "string_match": {"exact": "POST"}},
        {"name": ":path", "string_match": {"safe_regex": {"regex": path}}},
        {**is_grpc(), "invert_match": True},
    ]
    return {
        "match": {"prefix": "/v1/", "headers": headers},
        "route": way,
        "typed_per_filter_config": {**_WITHOUT_TRANSCODER, **(filters or {})},
    }


def _taking(method: str) -> dict[str, Any]:
    """What tells the module that a method takes the calls of a route as they are."""
    return {
        "@type": f"{TYPES}.extensions.filters.http.dynamic_modules.v3.DynamicModuleFilterPerRoute",
        "dynamic_module_config": _module(),
        "filter_name": "forno",
        "filter_config": {"@type": STRING, "value": HTTP_PREFIX + method},
    }


def is_grpc() -> dict[str, Any]:
    """Matches gRPC calls, which those of REST are by now."""
    return {"name": "content-type", "string_match": {"prefix": "application/grpc"}}


def unknown_path() -> dict[str, Any]:
    """The last route: what is no gRPC call by now is no path that the transcoder knows. The module says so itself."""
    return {"match": {"prefix": "/"}, "direct_response": {"status": 404, "body": {"inline_string": "no such path"}}}


def router() -> dict[str, Any]:
    """The filter that sends calls on, and adds nothing of its own to what comes back."""
    typed = {"@type": f"{TYPES}.extensions.filters.http.router.v3.Router", "suppress_envoy_headers": True}
    return {"name": "envoy.filters.http.router", "typed_config": typed}


def socket_cluster(name: str, socket: Path) -> dict[str, Any]:
    """A gRPC server on a Unix socket."""
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [{"max_pending_requests": 100_000, "max_requests": 100_000}]},
        "typed_extension_protocol_options": http2_upstream(),
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": str(socket)}}}}]}],
        },
    }


def http2_upstream(**options: Any) -> dict[str, Any]:
    """A cluster's `typed_extension_protocol_options`: HTTP/2 with large windows, and what `options` add."""
    windows = {
        "initial_stream_window_size": 1024 * 1024,
        "initial_connection_window_size": 16 * 1024 * 1024,
        "max_concurrent_streams": 10_000,
    }
    return {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {**windows, **options}},
        }
    }
