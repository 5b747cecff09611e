"""Bodies of Envoy's own answers: plain for gRPC, JSON in the form of google.rpc.Status for REST."""

from __future__ import annotations

from typing import Any

# What a REST caller gets where Envoy itself answers: HTTP status -> the gRPC code that stands for it in the body.
_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 405: 12, 408: 4, 413: 8, 415: 3, 429: 8, 431: 8, 503: 14, 504: 4}

METHODS = {
    "/(health|ready)": ("GET", "HEAD"),
    "/metrics": ("GET",),
    "/v1/models(/[^/:]+(/(versions|labels)/[^/:]+)?)?": ("GET",),
    "/v1/.+": ("POST",),
}
"""What methods REST's paths take, by regular expressions; the first that matches a path holds."""


def render() -> dict[str, Any]:
    """The `local_reply_config` of a connection manager."""
    plain = {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}}
    grpc_call = {
        "and_filter": {
            "filters": [
                {"header_filter": {"header": {"name": "content-type", "string_match": {"prefix": "application/grpc"}}}},
                {
                    "header_filter": {
                        "header": {"name": "x-envoy-original-path", "present_match": True, "invert_match": True}
                    }
                },
            ]
        }
    }

    def status_is(status: int) -> dict[str, Any]:
        value = {"default_value": status, "runtime_key": f"forno.local_reply.{status}"}
        return {"status_code_filter": {"comparison": {"op": "EQ", "value": value}}}

    def refused(condition: dict[str, Any], body_format: dict[str, Any]) -> dict[str, Any]:
        """By the `refuser` of ceilings.py."""
        return {
            "filter": {"and_filter": {"filters": [{"response_flag_filter": {"flags": ["FI"]}}, condition]}},
            "body": {"inline_string": "the server's memory is full (server.max_heap_bytes); try again in a moment"},
            "body_format_override": body_format,
            "headers_to_add": [{"header": {"key": "retry-after", "value": "1"}}],
        }

    def misused(path: str, methods: tuple[str, ...]) -> dict[str, Any]:
        """A known path, by another method than those that it takes."""
        others = {"name": ":method", "string_match": {"safe_regex": {"regex": "|".join(methods)}}, "invert_match": True}
        here = {"name": ":path", "string_match": {"safe_regex": {"regex": rf"{path}(\?.*)?"}}}
        conditions = [status_is(404), *({"header_filter": {"header": header}} for header in (here, others))]
        return {
            "filter": {"and_filter": {"filters": conditions}},
            "status_code": 405,
            "body_format_override": document(
                _CODES[405], f"this path takes {' and '.join(methods)}, not %REQ(:METHOD)%"
            ),
            "headers_to_add": [{"header": {"key": "allow", "value": ", ".join(methods)}}],
        }

    def document(code: int, message: str = "%LOCAL_REPLY_BODY%") -> dict[str, Any]:
        return {"json_format": {"code": code, "message": message, "details": []}}

    mappers: list[dict[str, Any]] = [
        refused(grpc_call, plain),
        refused(status_is(503), document(14)),
        {"filter": grpc_call, "body_format_override": plain},
        *(misused(path, methods) for path, methods in METHODS.items()),
    ]
    for status, code in _CODES.items():
        mapper: dict[str, Any] = {"filter": status_is(status), "body_format_override": document(code)}
        if status == 408:
            mapper["status_code"] = 504
        mappers.append(mapper)
    return {
        "mappers": mappers,
        "body_format": document(13),
    }
