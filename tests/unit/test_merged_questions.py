"""Questions that wait and are answered together: who rides with whom, who pays, who is told of an error. No torch."""

import asyncio
import threading

import pytest

from hosl.service.scheduler import CALL_TOKENS, Scheduler


class Desk:
    """A scheduler whose thread is held while questions queue up; `passes` are the questions of each call."""

    def __init__(self, merge_tokens, **how):
        self.told, self.passes, self.gate = [], [], threading.Event()
        self.scheduler = Scheduler(merge_tokens, tell=self.told.append, **how)

    def answer(self, questions):
        """The questions, in capitals; refuses "bad"."""
        self.passes.append(list(questions))
        if "bad" in questions:
            raise ValueError("bad")
        return [question.upper() for question in questions]

    def asked(self, client, question, tokens=10, kind="losses"):
        """A task that asks."""
        return asyncio.create_task(
            self.scheduler.run_merged(client, tokens, kind, question, self.answer), name=question
        )

    def work(self, client, name, **how):
        """A task whose work is answered alone."""
        return asyncio.create_task(
            self.scheduler.run(client, CALL_TOKENS, lambda: self.passes.append(name), **how)
        )

    def answers_of(self, queue_up):
        """What those that `queue_up` asks in one moment get: results, or errors."""

        async def run():
            holding = asyncio.create_task(self.scheduler.run("first", 0, self.gate.wait))
            await asyncio.sleep(0.01)
            asked = queue_up()
            await asyncio.sleep(0.01)
            self.gate.set()
            got = await asyncio.gather(*asked, return_exceptions=True)
            await holding
            self.scheduler.close()
            return [answer[0] if isinstance(answer, tuple) else answer for answer in got]

        return asyncio.run(asyncio.wait_for(run(), 20))


def test_questions_of_one_kind_are_answered_together_and_each_gets_its_own_answer():
    desk = Desk(100)
    kinds = {"a": "losses", "b": "other", "c": "losses"}
    assert desk.answers_of(lambda: [desk.asked(name, name, kind=kind) for name, kind in kinds.items()]) == [
        "A",
        "B",
        "C",
    ]
    assert desk.passes == [["a", "c"], ["b"]]
    assert desk.told == [2, 1]


def test_without_merging_each_question_is_answered_alone():
    desk = Desk(0)
    assert desk.answers_of(lambda: [desk.asked(name, name) for name in "abc"]) == ["A", "B", "C"]
    assert desk.passes == [["a"], ["b"], ["c"]]
    assert desk.told == []


def test_a_pass_has_so_many_tokens_at_most_and_smaller_questions_fill_it():
    desk = Desk(32)
    tokens = {"a": 16, "b": 20, "c": 8, "d": 8, "e": 40, "f": 1}
    desk.answers_of(lambda: [desk.asked(name, name, number) for name, number in tokens.items()])
    assert desk.passes == [["a", "c", "d"], ["b", "f"], ["e"]]


def test_whoever_rides_along_pays_as_much_as_whoever_waits():
    """a and b ask 5 questions each and ride together, c asks alone: each is served as many tokens in any stretch."""
    desk = Desk(1000)

    def queue_up():
        merged = [desk.asked(client, client) for client in "ababababab"]
        return [*merged, *(desk.work("c", "c") for _ in range(5))]

    desk.answers_of(queue_up)
    assert desk.passes == [list("ababababab"), *"ccccc"]
    assert {desk.scheduler._served[client] for client in "abc"} == {5 * CALL_TOKENS}


def test_nobody_waits_longer_than_its_turns_because_others_ride():
    """One client asks one question that cannot be merged, others many that can: it is third."""
    desk = Desk(40)

    def queue_up():
        return [
            *(desk.asked(f"rider-{number % 7}", f"{number}") for number in range(70)),
            desk.work("alone", "alone"),
        ]

    desk.answers_of(queue_up)
    place = desk.passes.index("alone")
    assert place == 2  # of the 7 before it in the queue, all with no tokens served, 4 ride in each pass
    assert all(len(together) == 4 for together in desk.passes[:place])


def test_a_question_passes_no_earlier_call_of_its_own_client():
    desk = Desk(1000)

    def queue_up():
        return [
            desk.asked("a", "a1"),
            desk.work("b", "step of b"),
            desk.asked("b", "b2"),
            desk.asked("c", "c1"),
        ]

    desk.answers_of(queue_up)
    assert desk.passes == [["a1", "c1"], "step of b", ["b2"]]


def test_no_question_rides_past_work_that_holds_its_kind_back():
    desk = Desk(1000)

    def queue_up():
        return [
            desk.asked("a", "a1"),
            desk.work("b", "step", holds_back=["losses"]),
            desk.asked("c", "c1"),
            desk.asked("d", "d1", kind="other"),
        ]

    desk.answers_of(queue_up)
    assert desk.passes == [["a1"], "step", ["c1"], ["d1"]]


def test_an_error_is_told_to_the_one_whose_question_causes_it():
    desk = Desk(100)
    one, bad, two = desk.answers_of(
        lambda: [desk.asked("a", "one"), desk.asked("b", "bad"), desk.asked("c", "two")]
    )
    assert (one, two) == ("ONE", "TWO")
    assert isinstance(bad, ValueError)
    assert desk.passes == [["one", "bad", "two"], ["one"], ["bad"], ["two"]]


def test_whoever_goes_away_before_its_turn_is_not_asked_for():
    desk = Desk(100)

    def queue_up():
        tasks = [desk.asked(name, name) for name in "abc"]
        asyncio.get_running_loop().call_later(0.005, tasks[1].cancel)
        return tasks

    first, gone, third = desk.answers_of(queue_up)
    assert (first, third) == ("A", "C")
    assert isinstance(gone, asyncio.CancelledError)
    assert desk.passes == [["a", "c"]]


@pytest.mark.parametrize("who", [0, 1], ids=["whose turn it is", "who rides along"])
def test_whoever_goes_away_during_the_pass_harms_no_other(who):
    desk = Desk(100)
    begun, go_on = threading.Event(), threading.Event()

    def slow(questions):
        begun.set()
        assert go_on.wait(10)
        return list(questions)

    async def run():
        scheduler = desk.scheduler
        holding = asyncio.create_task(scheduler.run("first", 0, desk.gate.wait))
        await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(scheduler.run_merged(c, 10, "losses", c, slow)) for c in "ab"]
        await asyncio.sleep(0.01)
        desk.gate.set()
        while not begun.is_set():
            await asyncio.sleep(0.001)
        tasks[who].cancel()
        await asyncio.sleep(0.01)
        behind = asyncio.create_task(scheduler.run("c", 0, lambda: "behind"))
        await asyncio.sleep(0.01)
        assert not behind.done()  # the pass goes on to its end
        go_on.set()
        answers = await asyncio.gather(*tasks, behind, holding, return_exceptions=True)
        scheduler.close()
        return answers

    answers: list = asyncio.run(asyncio.wait_for(run(), 20))
    assert isinstance(answers[who], asyncio.CancelledError)
    assert answers[1 - who][0] == "ab"[1 - who]
    assert answers[2][0] == "behind"


def test_the_seconds_of_a_pass_are_shared_by_tokens():
    desk = Desk(100)

    async def run():
        holding = asyncio.create_task(desk.scheduler.run("first", 0, desk.gate.wait))
        await asyncio.sleep(0.01)
        tasks = [desk.asked("a", "a", 30), desk.asked("b", "b", 10)]
        await asyncio.sleep(0.01)
        desk.gate.set()
        (_, long_s), (_, short_s) = await asyncio.gather(*tasks)
        await holding
        desk.scheduler.close()
        return long_s, short_s

    long_s, short_s = asyncio.run(run())
    assert long_s == pytest.approx(3 * short_s)
