"""The response cache by itself: what is kept, what shares a run, and who is told what."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tests.unit.puppets import Clock

from forno.server.cache import ResponseCache, key_of
from forno.server.config import CacheSettings
from forno.server.errors import DeadlineExceeded, EngineFailed, InvalidArgument, NotReady, Overloaded
from forno.server.request import NEVER_US, Answer, Request


class Oven:
    """Runs when told so. An answer is the input and one more, in a buffer that the next run overwrites."""

    def __init__(self, max_bytes: int = 1 << 20, ttl_s: float = 0.0) -> None:
        self.clock = Clock()
        self.counts: dict[str, int] = {}
        self.runs: list[Request] = []
        self.refusal: Exception | None = None
        self.slot = np.zeros((64, 4), np.int64)
        settings = CacheSettings(max_bytes=max_bytes, ttl_s=ttl_s)
        self.cache = ResponseCache("m/1", settings, self._take, self.counts, self.clock)

    def _take(self, request: Request) -> None:
        if request.expires_us <= request.arrived_us:
            raise DeadlineExceeded("too late")
        if self.refusal is not None:
            raise self.refusal
        self.runs.append(request)

    def ask(self, number: int = 0, *, width: int = 4, expires_us: int = NEVER_US, finish: Any = None) -> asyncio.Future:
        x = np.full((1, width), number, np.int64)
        future = asyncio.get_running_loop().create_future()
        given = finish or (lambda answer: (answer.outputs[0].tolist(), answer.queue_us, answer.batch_rows))
        self.cache.submit(Request((x,), 1, given, future, expires_us=expires_us))
        return future

    def bake(self) -> int:
        """Ends every run that somebody waits for, as the worker does it; returns how many those were."""
        baked = [request for request in self.runs if not request.future.done()]
        self.runs.clear()
        for request in baked:
            (x,) = request.inputs
            self.slot[:] = 0
            view = self.slot[:1, : x.shape[1]]
            view[:] = x + 1
            result = request.finish(Answer((view,), self.clock.now_us - request.arrived_us, 5, 8))
            if not request.future.done():
                request.future.set_result(result)
        self.slot[:] = -1
        return len(baked)

    def burn(self, error: Exception) -> None:
        """Ends every run with an error."""
        baked, self.runs = self.runs, []
        for request in baked:
            if not request.future.done():
                request.future.set_exception(error)

    def tally(self) -> tuple[int, int, int]:
        return self.counts["hit"], self.counts["miss"], self.counts["joined"]


async def test_an_equal_request_has_the_same_answer_at_once():
    oven = Oven()
    first = oven.ask(3)
    oven.clock.now_us += 7
    assert oven.bake() == 1
    assert await first == ([[4] * 4], 7, 8)
    again = oven.ask(3)
    assert again.done(), "a hit waits for nothing"
    assert await again == ([[4] * 4], 0, 0)
    assert not oven.runs
    assert oven.tally() == (1, 1, 0)


async def test_another_value_or_shape_runs():
    oven = Oven()
    waiting = [oven.ask(0), oven.ask(1), oven.ask(0, width=2)]
    assert oven.bake() == 3
    assert [(await each)[0] for each in waiting] == [[[1] * 4], [[2] * 4], [[1] * 2]]


async def test_equal_requests_in_the_air_share_one_run_and_each_encodes_for_itself():
    oven = Oven()
    first = oven.ask(3, finish=lambda answer: "first")
    oven.clock.now_us += 10
    second = oven.ask(3, finish=lambda answer: ("second", answer.outputs[0].tolist(), answer.queue_us))
    oven.clock.now_us += 10
    assert oven.bake() == 1
    assert await first == "first"
    assert await second == ("second", [[4] * 4], 10), "its own time in the queue"
    assert oven.tally() == (0, 1, 1)


async def test_a_cancelled_caller_leaves_the_others_their_run():
    oven = Oven()
    first, second, third = oven.ask(), oven.ask(), oven.ask()
    first.cancel()
    third.cancel()
    assert oven.bake() == 1
    assert (await second)[0] == [[1] * 4]


async def test_the_run_is_dropped_the_moment_that_the_last_caller_leaves():
    oven = Oven()
    first, second = oven.ask(), oven.ask()
    (run,) = oven.runs
    first.cancel()
    assert not run.future.done()
    second.cancel()
    assert run.future.done(), "the batcher asks in this very pass of the loop"
    third = oven.ask()
    assert len(oven.runs) == 2, "a run that nobody waits for takes no new passenger"
    assert oven.bake() == 1
    assert (await third)[0] == [[1] * 4]


async def test_what_nobody_waits_for_is_not_held():
    oven = Oven()
    for number in range(100):
        oven.ask(number).cancel()
    oven.runs.clear()  # the batcher has dropped them
    assert not oven.cache._flights


async def test_an_error_goes_to_all_and_is_not_kept():
    oven = Oven()
    waiting = [oven.ask() for _ in range(3)]
    oven.burn(EngineFailed("the model failed to run"))
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in errors] == [EngineFailed] * 3
    assert len({id(error) for error in errors}) == 3
    again = oven.ask()
    assert oven.bake() == 1
    assert (await again)[0] == [[1] * 4]


async def test_an_error_keeps_what_it_says():
    oven = Oven()
    waiting = [oven.ask(), oven.ask()]
    oven.burn(InvalidArgument("the third word is unknown", "inputs"))
    for error in await asyncio.gather(*waiting, return_exceptions=True):
        assert (str(error), error.field) == ("the third word is unknown", "inputs")


async def test_a_request_that_is_refused_leaves_nothing_behind():
    oven = Oven()
    oven.refusal = Overloaded("full", 2.5)
    with pytest.raises(Overloaded):
        oven.ask()
    oven.refusal = None
    again = oven.ask()
    assert oven.bake() == 1
    await again
    assert oven.tally() == (0, 1, 0)


async def test_who_joins_keeps_the_own_deadline():
    oven = Oven()
    patient = oven.ask()
    now_us = oven.clock.now_us
    hasty = oven.ask(expires_us=now_us + 5_000)
    with pytest.raises(DeadlineExceeded, match="an equal request"):
        await hasty
    assert not patient.done()
    assert oven.bake() == 1
    await patient


@pytest.mark.parametrize("error", [DeadlineExceeded("the deadline passed"), Overloaded("it cannot be in time")])
async def test_who_has_more_time_than_the_one_who_leads_tries_again(error):
    oven = Oven()
    now_us = oven.clock.now_us
    hasty, hastier = oven.ask(expires_us=now_us + 10_000), oven.ask(expires_us=now_us + 9_000)
    patient, more_patient = oven.ask(), oven.ask(expires_us=now_us + 10_000_000)
    oven.burn(error)
    for each in (hasty, hastier):
        with pytest.raises(type(error)):
            await each
    await asyncio.sleep(0)
    assert [run.expires_us for run in oven.runs] == [now_us + 10_000_000], "they share again, the most urgent first"
    assert oven.bake() == 1
    assert await patient
    assert await more_patient
    assert oven.tally() == (0, 1, 3), "each request is counted once"


async def test_a_second_try_can_be_refused():
    oven = Oven()
    hasty, patient = oven.ask(expires_us=oven.clock.now_us + 10_000), oven.ask()
    oven.refusal = NotReady("draining")
    oven.burn(DeadlineExceeded("the deadline passed"))
    with pytest.raises(DeadlineExceeded):
        await hasty
    with pytest.raises(NotReady):
        await patient


async def test_a_request_without_time_is_the_models_to_refuse():
    oven = Oven()
    with pytest.raises(DeadlineExceeded, match="too late"):
        oven.ask(expires_us=oven.clock.now_us)


async def test_an_answer_that_cannot_be_encoded_is_its_callers_alone(caplog):
    def broken(answer: Answer) -> None:
        raise ZeroDivisionError("secret internals")

    def refused(answer: Answer) -> None:
        raise InvalidArgument("no such label")

    oven = Oven()
    waiting = [oven.ask(finish=broken), oven.ask(finish=refused), oven.ask()]
    oven.bake()
    with pytest.raises(EngineFailed) as caught:
        await waiting[0]
    assert "secret" not in str(caught.value)
    assert str(caught.value).split()[-1] in caplog.text
    with pytest.raises(InvalidArgument):
        await waiting[1]
    assert (await waiting[2])[0] == [[1] * 4]
    with pytest.raises(EngineFailed):
        await oven.ask(finish=broken)
    assert (await oven.ask())[0] == [[1] * 4]


async def test_nobody_can_write_into_what_is_kept():
    def scribble(answer: Answer) -> None:
        answer.outputs[0][:] = 99

    oven = Oven()
    waiting = [oven.ask(finish=scribble), oven.ask()]
    oven.bake()
    assert isinstance((await asyncio.gather(*waiting, return_exceptions=True))[0], EngineFailed)
    assert (await waiting[1])[0] == [[1] * 4]


async def test_an_answer_lives_as_long_as_told():
    oven = Oven(ttl_s=1.5)
    for age_us, runs in [(0, 1), (1_499_999, 0), (1, 1), (1_500_000, 1)]:
        oven.clock.now_us += age_us
        waiting = oven.ask()
        assert oven.bake() == runs
        await waiting
    assert len(oven.cache) == 1


async def test_the_least_recently_asked_for_makes_room():
    one = Oven()
    one.ask(0)
    one.bake()
    size_bytes = one.cache.kept_bytes
    oven = Oven(max_bytes=3 * size_bytes)
    for number in (1, 2, 3, 1, 4):
        oven.ask(number)
        oven.bake()
    assert [oven.ask(number).done() for number in (1, 3, 4)] == [True] * 3
    assert not oven.ask(2).done()


async def test_what_is_larger_than_the_cache_is_answered_and_not_kept():
    oven = Oven(max_bytes=1024)
    waiting = [oven.ask(), oven.ask()]
    (run,) = oven.runs
    large = np.ones((1, 1000), np.int64)
    run.finish(Answer((large,), 0, 0, 1))
    assert (await waiting[0])[0] == large.tolist()
    assert (await waiting[1])[0] == large.tolist()
    assert len(oven.cache) == 0


async def test_the_bound_counts_what_memory_there_really_is():
    oven = Oven(max_bytes=2_000_000)
    words = [f"word {number} {'x' * 30}" for number in range(4)]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(3000):
        oven.ask(number)
        (run,) = oven.runs
        oven.runs.clear()
        strings = np.array([f"{number} {word}" for word in words], object)
        run.finish(Answer((np.full((1, 4), number), strings), 0, 0, 1))
        del run, strings
    used_bytes = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 1_900_000 < oven.cache.kept_bytes <= 2_000_000
    assert used_bytes <= 1.05 * oven.cache.kept_bytes
    oven.cache.clear()
    assert (len(oven.cache), oven.cache.kept_bytes) == (0, 0)


@given(seed=st.integers(0, 2**32), max_bytes=st.sampled_from([1, 2_000, 8_000, 1 << 20]))
def test_whatever_comes_in_whatever_order_each_has_its_own_answer(seed, max_bytes):
    chance = random.Random(seed)

    async def live() -> None:
        oven = Oven(max_bytes=max_bytes, ttl_s=chance.choice([0.0, 0.001]))
        asked: list[tuple[int, asyncio.Future]] = []
        for _ in range(chance.randrange(80)):
            oven.clock.now_us += chance.randrange(500)
            match chance.randrange(10):
                case 0:
                    oven.bake()
                case 1:
                    oven.burn(EngineFailed("no"))
                case 2:
                    oven.burn(DeadlineExceeded("no"))
                case 3:
                    for _, future in chance.sample(asked, len(asked) // 3):
                        future.cancel()
                case 4:
                    await asyncio.sleep(0)
                case _:
                    number = chance.randrange(5)
                    expires_us = chance.choice([NEVER_US, oven.clock.now_us + 1 + chance.randrange(10**9)])
                    asked.append((number, oven.ask(number, expires_us=expires_us)))
            keys = [run.inputs[0].tobytes() for run in oven.runs if not run.future.done()]
            assert len(keys) == len(set(keys)), "equal requests in the air run once"
            assert oven.cache.kept_bytes <= max_bytes
        for _ in range(90):  # each failure can make the others try again
            await asyncio.sleep(0)
            oven.bake()
        for number, future in asked:
            assert future.done(), "no request is lost"
            if not future.cancelled() and future.exception() is None:
                assert future.result()[0] == [[number + 1] * 4]
        assert not oven.cache._flights

    asyncio.run(live())


ARRAYS = npst.arrays(
    st.sampled_from(["f4", "f2", "i8", "u1", "?"]), npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
) | npst.arrays(object, npst.array_shapes(max_side=3), elements=st.text(max_size=3) | st.binary(max_size=3))


def same(one: tuple, other: tuple) -> bool:
    def identity(array: np.ndarray) -> Any:
        elements = [(type(v), v) for v in array.ravel().tolist()] if array.dtype == object else array.tobytes()
        return array.dtype, array.shape, elements

    return [identity(array) for array in one] == [identity(array) for array in other]


@given(st.lists(ARRAYS, max_size=3).map(tuple), st.lists(ARRAYS, max_size=3).map(tuple))
def test_keys_are_equal_where_requests_are(one, other):
    assert (key_of("m", one) == key_of("m", other)) == same(one, other)
    assert key_of("m", one) == key_of("m", tuple(array.copy() for array in one))
    assert key_of("m", one) != key_of("n", one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.array(["ab", "c"], object), np.array(["a", "bc"], object)),
        (np.array(["a"], object), np.array([b"a"], object)),
        (np.array(["", "a"], object), np.array(["a", ""], object)),
        (np.zeros((2, 3), "f4"), np.zeros((3, 2), "f4")),
        (np.zeros(2, "f4"), np.zeros(1, "f8")),
        (np.zeros(2, "f2"), np.zeros(2, ml_dtypes.bfloat16)),
        (np.zeros(1, "f4"), np.zeros((), "f4")),
        (np.float32([0.0]), np.float32([-0.0])),
    ],
)
def test_near_requests_have_keys_of_their_own(one, other):
    assert key_of("m", (one,)) != key_of("m", (other,))


def test_it_is_the_elements_that_count_and_not_where_they_lie():
    rows = np.arange(12, dtype="f4").reshape(3, 4)
    assert key_of("m", (rows.T,)) == key_of("m", (np.ascontiguousarray(rows.T),))
    odd = np.frombuffer(b"?" + rows.tobytes(), "f4", offset=1).reshape(3, 4)
    assert key_of("m", (odd,)) == key_of("m", (rows,))
    assert len(key_of("m", (rows,)) or b"") == 32


def test_elements_that_are_neither_number_nor_string_have_no_key():
    assert key_of("m", (np.array([{"a": 1}], object),)) is None
