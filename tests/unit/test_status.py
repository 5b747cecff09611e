"""The one table of errors."""

from __future__ import annotations

import logging

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from tests.unit.calls import Aborted, CallContext

from forno.server import errors
from forno.server.servicers import status

CODES = [
    (errors.InvalidArgument("m"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    (errors.NotFound("m"), grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (errors.NotReady("m"), grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
    (errors.Overloaded("m"), grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    (errors.DeadlineExceeded("m"), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    (errors.EngineFailed("m"), grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
]


async def aborted(error):
    context = CallContext()
    with pytest.raises(Aborted):
        await status.abort(context, error)
    return context


def detail(message, kind):
    for packed in message.details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None


@pytest.mark.parametrize(("error", "code", "reason"), CODES)
async def test_each_error_has_its_code_and_reason(error, code, reason):
    context = await aborted(error)
    assert (context.code, context.message) == (code, "m")
    sent = Status.FromString(context.trailing[status.DETAILS_KEY])
    assert (sent.code, sent.message) == (code.value[0], "m")
    info = detail(sent, ErrorInfo)
    assert (info.reason, info.domain) == (reason, "forno")


def test_every_error_a_caller_can_meet_is_in_the_table():
    def below(kind):
        return {each for child in kind.__subclasses__() for each in (child, *below(child))}

    ours = {kind for kind in below(errors.FornoError) if kind.__module__ == errors.__name__}
    assert ours == set(status.TABLE) | {errors.ConfigError}


async def test_an_overloaded_server_says_when_to_come_back():
    context = await aborted(errors.Overloaded("full", retry_after_s=1.25))
    assert context.trailing["retry-after"] == "2"
    sent = Status.FromString(context.trailing[status.DETAILS_KEY])
    assert detail(sent, RetryInfo).retry_delay.ToMilliseconds() == 1250
    assert (await aborted(errors.Overloaded("full", retry_after_s=0.0))).trailing["retry-after"] == "1"


def test_a_wrong_argument_names_its_field():
    sent = status.to_status(errors.InvalidArgument("m", "inputs[0].shape"))
    (violation,) = detail(sent, BadRequest).field_violations
    assert (violation.field, violation.description) == ("inputs[0].shape", "m")


async def test_an_unexpected_error_reveals_an_id_only(caplog):
    with caplog.at_level(logging.ERROR):
        context = await aborted(ValueError("secret /path"))
    assert context.code is grpc.StatusCode.INTERNAL
    assert "secret" not in context.message
    (record,) = caplog.records
    assert record.args[0] in context.message
    assert record.exc_info[1].args == ("secret /path",)


async def test_a_message_fits_into_trailers():
    context = await aborted(errors.InvalidArgument("\N{FIRE}" * 5000, "\N{FIRE}" * 5000))
    size = len(context.message.encode()) * 3 + len(context.trailing[status.DETAILS_KEY]) * 4 / 3
    assert size < 8192
    assert context.message.endswith("...")


async def test_a_call_that_is_ending_already_goes_on_doing_so():
    error = Aborted()
    with pytest.raises(Aborted) as caught:
        await status.abort(CallContext(), error)
    assert caught.value is error


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ("", False),
        ("/v1/models/m:predict", False),
        ("/v1/models/m:predict?x=model", False),
        ("/v1/models/m:predict?model=n", True),
        ("/v1/models/m:predict?x=1&model", True),
        ("/v1/models/m:predict?mod%65l=n", True),
        ("//[?model=n", True),
    ],
)
def test_a_query_cannot_say_what_the_path_says(path, refused):
    context = CallContext(path=path)
    if refused:
        with pytest.raises(errors.InvalidArgument, match="`model`"):
            status.refuse_path_variables_in_query(context, ("model",))
    else:
        status.refuse_path_variables_in_query(context, ("model",))


def test_an_unknown_endpoint_names_the_nearest():
    endpoints = {"spam/detect": 1, "digits/classify": 2}
    assert status.find_endpoint(endpoints, "spam/detect") == 1
    with pytest.raises(errors.NotFound, match="did you mean 'spam/detect'"):
        status.find_endpoint(endpoints, "spam/detct")
    with pytest.raises(errors.NotFound, match="there is digits/classify and spam/detect"):
        status.find_endpoint(endpoints, "q")
    with pytest.raises(errors.NotFound, match="and 80 more"):
        status.find_endpoint({f"endpoint-{number}": 1 for number in range(100)}, "q")
    with pytest.raises(errors.NotFound, match="there is none"):
        status.find_endpoint({}, "q")
